"""Seating: one layer's slots while they are rebalanced, what each rank does, and what has been fetched so far.

An expert's load is split evenly over its slots, as engines do. A running map may hold an expert twice on a rank or
leave a slot empty: both are counted as they are, and such slots can be given to another expert.

Shape letters: E experts of a layer, R ranks, N nodes, S slots per layer.
"""

from typing import NamedTuple

import numpy as np

from moeplace.profiling.kernel_cache import njit

_SHIFT = 20
ACROSS_CODE = 1 << _SHIFT
"""Codes of moves: 1 for a fetched expert, ACROSS_CODE more where it is new to the node, negative where it goes back."""


class Floor(NamedTuple):
    """Where slots are, the same in all layers.

    Attributes:
        rank_S: (S,) int64 rank of each slot.
        start_R: (R + 1,) int64 first slot of each rank.
        node_R: (R,) int64 node of each rank.
        slow_R: (R,) float64 time that a rank takes for one assignment: 1 / relative speed.
    """

    rank_S: np.ndarray
    start_R: np.ndarray
    node_R: np.ndarray
    slow_R: np.ndarray


class Seating(NamedTuple):
    """A layer's slots and the tables that follow from them.

    Attributes:
        slots_S: (S,) int64 slot -> expert, -1 = empty.
        load_E: (E,) float64 loads.
        home_E: (E,) int64 the only node that may fetch an expert, -1 = any.
        code_ER: (E, R) int32 code of the move that brings an expert to a rank, 0 where it was before.
        count_E: (E,) int64 slots of each expert.
        share_E: (E,) float64 load of one slot of each expert.
        on_ER: (E, R) int16 slots of each expert on each rank.
        holder_EH: (E, R) int16, the first `holders_E[e]` of row e are the ranks of expert e.
        holders_E: (E,) int64.
        time_R: (R,) float64 load of each rank over its speed.
        fetched_R: (R,) int64 experts that each rank has now and had not before.
        moves: (1,) int64 sum of the codes of all that is fetched.
    """

    slots_S: np.ndarray
    load_E: np.ndarray
    home_E: np.ndarray
    code_ER: np.ndarray
    count_E: np.ndarray
    share_E: np.ndarray
    on_ER: np.ndarray
    holder_EH: np.ndarray
    holders_E: np.ndarray
    time_R: np.ndarray
    fetched_R: np.ndarray
    moves: np.ndarray


def floor_of(slots_of_rank: np.ndarray, node_of_rank: np.ndarray, speed_of_rank: np.ndarray | None = None) -> Floor:
    """The floor of a cluster."""
    slots_R, node_R = np.asarray(slots_of_rank, np.int64), np.asarray(node_of_rank, np.int64)
    slow_R = np.ones(len(slots_R)) if speed_of_rank is None else 1.0 / np.asarray(speed_of_rank, np.float64)
    start_R = np.concatenate([[0], np.cumsum(slots_R)]).astype(np.int64)
    return Floor(np.repeat(np.arange(len(slots_R)), slots_R), start_R, node_R, slow_R)


@njit(cache=True, nogil=True)
def empty_seating(num_experts, floor):  # type: ignore[no-untyped-def]
    """Tables for `sit`."""
    slots, ranks = len(floor.rank_S), len(floor.node_R)
    return Seating(
        np.full(slots, -1), np.zeros(num_experts), np.full(num_experts, -1),
        np.zeros((num_experts, ranks), np.int32), np.zeros(num_experts, np.int64), np.zeros(num_experts),
        np.zeros((num_experts, ranks), np.int16), np.zeros((num_experts, ranks), np.int16),
        np.zeros(num_experts, np.int64), np.zeros(ranks), np.zeros(ranks, np.int64), np.zeros(1, np.int64),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def remember(before_S, load_E, home_E, floor, seating):  # type: ignore[no-untyped-def]
    """Begin a layer: moves are counted from the slots `before_S`."""
    experts, ranks, nodes = len(load_E), len(floor.node_R), floor.node_R[-1] + 1
    had_EN, code_ER = np.zeros((experts, nodes), np.bool_), seating.code_ER
    for s in range(len(before_S)):
        if before_S[s] >= 0:
            had_EN[before_S[s], floor.node_R[floor.rank_S[s]]] = True
    for e in range(experts):
        for r in range(ranks):
            code_ER[e, r] = 1 if had_EN[e, floor.node_R[r]] else 1 + ACROSS_CODE
    for s in range(len(before_S)):
        if before_S[s] >= 0:
            code_ER[before_S[s], floor.rank_S[s]] = 0
    seating.load_E[:] = load_E
    seating.home_E[:] = home_E


@njit(cache=True, nogil=True)
def sit(slots_S, floor, seating):  # type: ignore[no-untyped-def]
    """Set the slots, and all tables that follow from them."""
    rank_S, on_ER, count_E = floor.rank_S, seating.on_ER, seating.count_E
    seating.slots_S[:] = slots_S
    on_ER[:] = 0
    count_E[:] = 0
    seating.holders_E[:] = 0
    seating.fetched_R[:] = 0
    seating.moves[0] = 0
    for s in range(len(slots_S)):
        e, r = slots_S[s], rank_S[s]
        if e >= 0:
            count_E[e] += 1
            _come(e, r, seating)
    for e in range(len(count_E)):
        seating.share_E[e] = seating.load_E[e] / max(count_E[e], 1)
    set_times(floor, seating)


@njit(cache=True, nogil=True)
def set_times(floor, seating):  # type: ignore[no-untyped-def]
    """Times of all ranks, summed anew, so that rounding does not add up."""
    slots_S, share_E, time_R = seating.slots_S, seating.share_E, seating.time_R
    for r in range(len(time_R)):
        total = 0.0
        for s in range(floor.start_R[r], floor.start_R[r + 1]):
            if slots_S[s] >= 0:
                total += share_E[slots_S[s]]
        time_R[r] = total * floor.slow_R[r]


@njit(cache=True, nogil=True)
def _leave(e, r, seating):  # type: ignore[no-untyped-def]
    """A slot of rank r gives expert e up."""
    on_ER, holder_EH, holders_E = seating.on_ER, seating.holder_EH, seating.holders_E
    on_ER[e, r] -= 1
    if on_ER[e, r] > 0:
        return
    holders_E[e] -= 1
    for n in range(holders_E[e]):
        if holder_EH[e, n] == r:
            holder_EH[e, n] = holder_EH[e, holders_E[e]]
    seating.moves[0] -= seating.code_ER[e, r]
    seating.fetched_R[r] -= seating.code_ER[e, r] != 0


@njit(cache=True, nogil=True)
def _come(e, r, seating):  # type: ignore[no-untyped-def]
    """A slot of rank r gets expert e."""
    on_ER, holders_E = seating.on_ER, seating.holders_E
    on_ER[e, r] += 1
    if on_ER[e, r] > 1:
        return
    seating.holder_EH[e, holders_E[e]] = r
    holders_E[e] += 1
    seating.moves[0] += seating.code_ER[e, r]
    seating.fetched_R[r] += seating.code_ER[e, r] != 0


@njit(cache=True, nogil=True)
def swap(a, b, floor, seating):  # type: ignore[no-untyped-def]
    """Slots a and b of two ranks exchange what they hold (b may be empty); times are left to `set_times`."""
    g, h, i, j = floor.rank_S[a], floor.rank_S[b], seating.slots_S[a], seating.slots_S[b]
    _leave(i, g, seating)
    _come(i, h, seating)
    if j >= 0:
        _leave(j, h, seating)
        _come(j, g, seating)
    seating.slots_S[a], seating.slots_S[b] = j, i


@njit(cache=True, nogil=True)
def repoint(b, i, floor, seating):  # type: ignore[no-untyped-def]
    """Slot b holds expert i instead of what it held; times are left to `set_times`."""
    j, count_E = seating.slots_S[b], seating.count_E
    if j >= 0:
        _leave(j, floor.rank_S[b], seating)
        count_E[j] -= 1
        seating.share_E[j] = seating.load_E[j] / max(count_E[j], 1)
    _come(i, floor.rank_S[b], seating)
    count_E[i] += 1
    seating.share_E[i] = seating.load_E[i] / count_E[i]
    seating.slots_S[b] = i


@njit(cache=True, nogil=True, inline="always")
def across_of(code):  # type: ignore[no-untyped-def]
    """Moves between nodes in a sum of codes."""
    return (code + ACROSS_CODE // 2) >> _SHIFT


@njit(cache=True, nogil=True, inline="always")
def moves_of(code):  # type: ignore[no-untyped-def]
    """Moves in a sum of codes of one step."""
    return code - ACROSS_CODE * across_of(code)
