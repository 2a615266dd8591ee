"""Seats: which slots and ranks hold which expert of a layer while a search moves them, and the moves.

A move changes slot x, which has expert a: either it gets expert b instead of a, which has other slots (y = -1); or it
swaps with slot y on another rank, which has expert b (-1 = y is empty). Ranks of an expert are a list, so that a move
costs the same whatever the number of ranks.

Shape letters: E experts (and empty slots, which search tables list behind them), R ranks, S slots.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.search.annealing import random_below
from moeplace.profiling.kernel_cache import njit


class Holders(NamedTuple):
    """The ranks of each expert.

    Attributes:
        rank_EH: (E, R) int16, the first `count_E[e]` of row e are its ranks, in any order.
        count_E: (E,) int64 replicas of each expert.
        held_ER: (E, R) bool, the same as a table.
    """

    rank_EH: np.ndarray
    count_E: np.ndarray
    held_ER: np.ndarray


class Seats(NamedTuple):
    """A layer's slots while they are searched.

    Attributes:
        slots_S: (S,) int32 slot -> expert, -1 = empty.
        rank_S: (S,) int64 rank of each slot.
        start_R: (R + 1,) int64 first slot of each rank.
        holders: the ranks of each expert.
        num_real: experts of the layer.
    """

    slots_S: np.ndarray
    rank_S: np.ndarray
    start_R: np.ndarray
    holders: Holders
    num_real: int


class Move(NamedTuple):
    """See the module's docstring; g and h are the ranks of x and y. x = -1: no move."""

    x: int
    y: int
    a: int
    b: int
    g: int
    h: int


def seat(slots_S: np.ndarray, start_R: np.ndarray, num_entries: int, num_real: int) -> Seats:
    """Seats over `slots_S` itself, which the moves change.

    Args:
        slots_S: (S,) int32 slot -> expert.
        start_R: (R + 1,) first slot of each rank.
        num_entries: E of the tables.
        num_real: experts of the layer.
    """
    rank_S = np.repeat(np.arange(len(start_R) - 1), np.diff(start_R))
    return Seats(slots_S, rank_S, start_R, find_holders(slots_S, rank_S, num_entries, len(start_R) - 1), num_real)


def find_holders(slots_S: np.ndarray, rank_S: np.ndarray, num_entries: int, num_ranks: int) -> Holders:
    """The ranks of each of `num_entries` experts."""
    holders = Holders(
        np.full((num_entries, num_ranks), -1, np.int16),
        np.zeros(num_entries, np.int64),
        np.zeros((num_entries, num_ranks), np.bool_),
    )
    for expert, rank in zip(slots_S.tolist(), rank_S.tolist(), strict=True):
        if expert >= 0:
            add_holder(expert, rank, holders)
    return holders


@njit(cache=True, nogil=True, inline="always")
def add_holder(e, r, holders):  # type: ignore[no-untyped-def]
    holders.rank_EH[e, holders.count_E[e]] = r
    holders.count_E[e] += 1
    holders.held_ER[e, r] = True


@njit(cache=True, nogil=True, inline="always")
def _drop_holder(e, r, holders):  # type: ignore[no-untyped-def]
    rank_EH, count = holders.rank_EH, holders.count_E[e] - 1
    holders.count_E[e] = count
    for i in range(count):
        if rank_EH[e, i] == r:
            rank_EH[e, i] = rank_EH[e, count]
    holders.held_ER[e, r] = False


@njit(cache=True, nogil=True, inline="always")
def _change_holder(e, r, q, holders):  # type: ignore[no-untyped-def]
    """Expert e is on rank q instead of rank r."""
    rank_EH = holders.rank_EH
    for i in range(holders.count_E[e]):
        if rank_EH[e, i] == r:
            rank_EH[e, i] = q
    holders.held_ER[e, r], holders.held_ER[e, q] = False, True


@njit(cache=True, nogil=True, inline="always")
def propose(slots_S, rank_S, count_E, held_ER, num_real, min_replicas, room_R, over, state):  # type: ignore[no-untyped-def]
    """A random move that puts no expert on a rank twice and leaves every expert `min_replicas`; x = -1 if it would.

    While load is above the limits (`over` > 0), half of the moves start from a rank without room. Plain arrays: most
    proposals are dismissed at once, and taking arrays from tuples would cost more than that.
    """
    slots, none = len(slots_S), Move(-1, -1, -1, -1, -1, -1)
    x = random_below(state, slots)
    if over > 0.0 and random_below(state, 2):
        for _ in range(slots):
            if room_R[rank_S[x]] < 0.0:
                break
            x = (x + 1) % slots
    a, g = slots_S[x] + 0, rank_S[x]
    if a < 0:
        return none
    if count_E[a] > min_replicas and random_below(state, 5) < 3:
        b = random_below(state, num_real)
        return none if b == a or held_ER[b, g] else Move(x, -1, a, b, g, -1)
    y = random_below(state, slots)
    b, h = slots_S[y] + 0, rank_S[y]
    if g == h or a == b or held_ER[a, h] or (b >= 0 and held_ER[b, g]):
        return none
    return Move(x, y, a, b, g, h)


@njit(cache=True, nogil=True, inline="always")
def make_move(move, seats):  # type: ignore[no-untyped-def]
    """Carry a move out, in place."""
    seats.slots_S[move.x] = move.b
    if move.y < 0:
        _drop_holder(move.a, move.g, seats.holders)
        add_holder(move.b, move.g, seats.holders)
    else:
        seats.slots_S[move.y] = move.a
        if move.a >= 0:
            _change_holder(move.a, move.g, move.h, seats.holders)
        if move.b >= 0:
            _change_holder(move.b, move.h, move.g, seats.holders)


@njit(cache=True, nogil=True, inline="always")
def take_back(move, seats):  # type: ignore[no-untyped-def]
    """Undo a move, in place: the same seats with the experts the other way round."""
    make_move(Move(move.x, move.y, move.b, move.a, move.g, move.h), seats)


@njit(cache=True, nogil=True, inline="always")
def reaches(move, r, held_ER):  # type: ignore[no-untyped-def]
    """Whether the move changes what rank r holds, or its share of a replicated expert."""
    if move.y >= 0:
        return r == move.g or r == move.h
    return r == move.g or held_ER[move.a, r] or held_ER[move.b, r]


@njit(cache=True, nogil=True)
def rank_risk(first, last, slots_S, count_E, risk_EE):  # type: ignore[no-untyped-def]
    """Quadratic form of the hedge over the slots first..last-1, each expert with its share 1/replicas."""
    total = 0.0
    for x in range(first, last):
        if slots_S[x] >= 0:
            row = 0.0
            for y in range(first, last):
                if slots_S[y] >= 0:
                    row += risk_EE[slots_S[x], slots_S[y]] / count_E[slots_S[y]]
            total += row / count_E[slots_S[x]]
    return total


@njit(cache=True, nogil=True, inline="always")
def changed_risk(move, seats, risk_EE, risk_R, new_risk_R):  # type: ignore[no-untyped-def]
    """Write the hedge of every rank after a move to `new_risk_R`; returns the change of the sum of squares."""
    slots_S, start_R, count_E, held_ER = seats.slots_S, seats.start_R, seats.holders.count_E, seats.holders.held_ER
    change = 0.0
    for r in range(len(risk_R)):
        new_risk_R[r] = risk_R[r]
        if reaches(move, r, held_ER):
            new_risk_R[r] = rank_risk(start_R[r], start_R[r + 1], slots_S, count_E, risk_EE)
            change += new_risk_R[r] ** 2 - risk_R[r] ** 2
    return change


@njit(cache=True, nogil=True)
def all_risks(seats, risk_EE, risk_R):  # type: ignore[no-untyped-def]
    """Write the hedge of every rank to `risk_R`; returns the sum of squares."""
    total = 0.0
    for r in range(len(risk_R)):
        first, last = seats.start_R[r], seats.start_R[r + 1]
        risk_R[r] = rank_risk(first, last, seats.slots_S, seats.holders.count_E, risk_EE)
        total += risk_R[r] ** 2
    return total


@njit(cache=True, nogil=True)
def count_moves(slots_S, rank_S, new_ER):  # type: ignore[no-untyped-def]
    """Slots whose expert is new on its rank; `new_ER` may be empty: then none is."""
    moves = np.int64(0)
    if len(new_ER):
        for s in range(len(slots_S)):
            if slots_S[s] >= 0:
                moves += np.int64(new_ER[slots_S[s], rank_S[s]])
    return moves


@njit(cache=True, nogil=True)
def further_moves(move, new_ER):  # type: ignore[no-untyped-def]
    """Change of `count_moves` by a move of seats."""
    more = -np.int64(new_ER[move.a, move.g])
    if move.y < 0:
        return more + np.int64(new_ER[move.b, move.g])
    more += np.int64(new_ER[move.a, move.h])
    if move.b >= 0:
        more += np.int64(new_ER[move.b, move.g]) - np.int64(new_ER[move.b, move.h])
    return more


@njit(cache=True, nogil=True)
def changed_bias(move, bias_ER):  # type: ignore[no-untyped-def]
    """Change of the sum of biases by a move of seats."""
    if move.y < 0:
        return bias_ER[move.b, move.g] - bias_ER[move.a, move.g]
    change = bias_ER[move.a, move.h] - bias_ER[move.a, move.g]
    if move.b >= 0:
        change += bias_ER[move.b, move.g] - bias_ER[move.b, move.h]
    return change
