"""TokenBits: a layer's routing as bits, 64 tokens to a word, and what a layout with replicas costs on them.

With U_r = the tokens that have a single-slot expert on rank r, and t_e = the tokens of a replicated expert e with
slots on the ranks H_e, the rule of `replica_choice` gives

    sum d  =  sum_r |U_r|  +  sum_e |open_e|  -  |merged|       open_e = t_e and no U_r of its ranks
    load_r =  singles of r  +  sum_e |t_e served by r|          by U_r, and by the rotation where that leaves a choice

merged = tokens with two open experts that share a rank, which then serves both. A token that could merge twice is
counted once. Loads are in `bit_loads`.

Shape letters: T tokens, E experts, R ranks, N nodes, P parts (ranks or nodes), S slots, J replicated experts, W words
of 64 tokens, Q words of rotation numbers.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moeplace.placement.cost.replica_choice import home_first_orders
from moeplace.placement.solvers.replicas.seats import Seats
from moeplace.placement.solvers.replicas.words import add_repeats, clear, copy, count_row, popcount, subtract, unite
from moeplace.profiling.kernel_cache import njit


class TokenBits(NamedTuple):
    """A layer's tokens as bits.

    Attributes:
        tokens_EW: (S, W) uint64, which tokens go to each expert; rows beyond the layer's experts are zero.
        prefer_RRQ: (R, R, Q) uint64, rotation numbers that prefer rank r to rank s; token word w has word w mod Q.
        size_E: (S,) int64 number of tokens of each expert.
        together_EE: (S, S) int64 tokens that two experts have in common.
    """

    tokens_EW: np.ndarray
    prefer_RRQ: np.ndarray
    size_E: np.ndarray
    together_EE: np.ndarray


class Rows(NamedTuple):
    """One row of bits per rank or node, with spare rows that a trial writes, so that nothing is copied back.

    Attributes:
        row_P: (P,) int64 index of the row in force of each part.
        bits_BW: (B, W) uint64 tokens.
        size_B: (B,) their numbers.
        spare: (4,) int64 indices of free rows.
    """

    row_P: np.ndarray
    bits_BW: np.ndarray
    size_B: np.ndarray
    spare: np.ndarray


class BitState(NamedTuple):
    """What a layout makes of the tokens.

    Attributes:
        ranks, nodes: tokens with a single-slot expert there, U_r.
        node_R: (R,) int64 node of each rank.
        node_start_N: (N + 1,) int64 first slot of each node.
        node_weight: price of a node beside a rank.
        place_E: (S,) int64 place in `open_JW` of each replicated expert, -1 = has a single slot.
        open_JW: tokens for which a replicated expert opens a rank.
        far_JW: tokens for which it opens a node.
        twice_RW: tokens with two open experts on a rank.
        free_CW: room for counting.
    """

    ranks: Rows
    nodes: Rows
    node_R: np.ndarray
    node_start_N: np.ndarray
    node_weight: float
    place_E: np.ndarray
    open_JW: np.ndarray
    far_JW: np.ndarray
    twice_RW: np.ndarray
    free_CW: np.ndarray


def token_bits(ids_TK: np.ndarray, num_slots: int, num_ranks: int) -> TokenBits:
    """The bits of a layer's (T, K) expert ids, -1 = none; token t has rotation t."""
    tokens = len(ids_TK)
    has_ET = np.zeros((num_slots, -(-tokens // 64) * 64), bool)
    token, slot = np.nonzero(ids_TK >= 0)
    has_ET[ids_TK[token, slot], token] = True
    dense_ET = has_ET.astype(np.float32)
    together_EE = np.rint(dense_ET @ dense_ET.T).astype(np.int64)
    return TokenBits(_words(has_ET), _preferred(num_ranks), has_ET.sum(axis=1, dtype=np.int64), together_EE)


@lru_cache(maxsize=4)
def _preferred(num_ranks: int) -> np.ndarray:
    """(R, R, Q) uint64, read-only, see `TokenBits`; shared by all layers (52 MB at 320 ranks)."""
    place_RP = np.ascontiguousarray(np.argsort(home_first_orders(num_ranks), axis=1).T.astype(np.int16))
    prefer_RRQ = np.stack([_words(place_R < place_RP) for place_R in place_RP])
    prefer_RRQ.flags.writeable = False
    return prefer_RRQ


def _words(bits: np.ndarray) -> np.ndarray:
    """Booleans packed along the last axis, 64 to a uint64, first in the lowest bit."""
    packed = np.packbits(bits, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u8").astype(np.uint64)


def bit_state(bits: TokenBits, seats: Seats, node_R: np.ndarray, node_weight: float) -> BitState:
    """Empty tables for the layout of `seats`."""
    num_ranks, num_nodes, words = len(node_R), int(node_R[-1]) + 1, bits.tokens_EW.shape[1]
    ends_N = [int(seats.start_R[1:][node_R == n].max()) for n in range(num_nodes)]
    most_replicated = len(seats.slots_S) // 2 + 1
    return BitState(
        _rows(num_ranks, words), _rows(num_nodes, words), np.asarray(node_R, np.int64), np.array([0, *ends_N]),
        float(node_weight), np.full(len(bits.size_E), -1, np.int64), np.zeros((most_replicated, words), np.uint64),
        np.zeros((most_replicated, words), np.uint64), np.zeros((num_ranks, words), np.uint64),
        np.zeros((num_ranks + 3, words), np.uint64),
    )  # fmt: skip


def _rows(parts: int, words: int) -> Rows:
    spare = np.arange(parts, parts + 4)
    return Rows(np.arange(parts), np.zeros((parts + 4, words), np.uint64), np.zeros(parts + 4), spare)


@njit(cache=True, nogil=True, inline="always")
def mark_rank(r, bits, seats, ranks):  # type: ignore[no-untyped-def]
    """Write U_r of the present seats to the row in force of rank r."""
    slots_S, count_E, tokens_EW = seats.slots_S, seats.holders.count_E, bits.tokens_EW
    row = ranks.row_P[r]
    row_W = ranks.bits_BW[row]
    clear(row_W)
    for s in range(seats.start_R[r], seats.start_R[r + 1]):
        e = slots_S[s]
        if e >= 0 and count_E[e] == 1:
            unite(row_W, tokens_EW[e])
    ranks.size_B[row] = count_row(row_W)


@njit(cache=True, nogil=True, inline="always")
def mark_node(n, state):  # type: ignore[no-untyped-def]
    """Write the union of U_r over a node's ranks to its row in force."""
    node_R, row_R, bits_BW = state.node_R, state.ranks.row_P, state.ranks.bits_BW
    row = state.nodes.row_P[n]
    row_W = state.nodes.bits_BW[row]
    clear(row_W)
    for r in range(len(node_R)):
        if node_R[r] == n:
            unite(row_W, bits_BW[row_R[r]])
    state.nodes.size_B[row] = count_row(row_W)


@njit(cache=True, nogil=True)
def _open(t_W, rank_H, row_R, bits_BW, open_W):  # type: ignore[no-untyped-def]
    """Write those of an expert's tokens that none of its ranks serves anyway to `open_W`; returns their number."""
    if len(rank_H) != 2:
        copy(open_W, t_W)
        for r in rank_H:
            subtract(open_W, bits_BW[row_R[r]])
        return count_row(open_W)
    u_W, v_W = bits_BW[row_R[rank_H[0]]], bits_BW[row_R[rank_H[1]]]
    total = np.uint64(0)
    for w in range(len(t_W)):  # most have two: one pass
        o = t_W[w] & ~(u_W[w] | v_W[w])
        open_W[w] = o
        total += popcount(o)
    return total


@njit(cache=True, nogil=True)
def _twice(slots_S, first, last, place_E, open_JW, once_W, twice_W):  # type: ignore[no-untyped-def]
    """Write the tokens with two open experts in the slots first..last-1 to `twice_W`; returns whether there may be any.

    An expert with several of these slots (of one node) counts once.
    """
    found = 0
    for s in range(first, last):
        if slots_S[s] < 0 or place_E[slots_S[s]] < 0:
            continue
        again = False
        for x in range(first, s):
            again |= slots_S[x] == slots_S[s]
        if again:
            continue
        open_W = open_JW[place_E[slots_S[s]]]
        if found == 0:
            copy(once_W, open_W)
        elif found == 1:
            for w in range(len(once_W)):
                twice_W[w] = once_W[w] & open_W[w]
                once_W[w] |= open_W[w]
        else:
            add_repeats(once_W, twice_W, open_W)
        found += 1
    if found < 2:
        clear(twice_W)
    return found >= 2


@njit(cache=True, nogil=True, inline="always")
def _node_traffic(seats, state, several):  # type: ignore[no-untyped-def]
    """sum dn of the present layout, whose `several` replicated experts have their open tokens set."""
    start_N, slots_S, place_E, far_JW = state.node_start_N, seats.slots_S, state.place_E, state.far_JW
    row_N, bits_BW, size_B = state.nodes.row_P, state.nodes.bits_BW, state.nodes.size_B
    once_W, merged_W, twice_W = state.free_CW[0], state.free_CW[1], state.free_CW[2]
    total = 0.0
    for n in range(len(row_N)):
        total += size_B[row_N[n]]
    far_JW[:several] = state.open_JW[:several]
    for s in range(len(slots_S)):
        if slots_S[s] >= 0 and place_E[slots_S[s]] >= 0:
            subtract(far_JW[place_E[slots_S[s]]], bits_BW[row_N[state.node_R[seats.rank_S[s]]]])
    for j in range(several):
        total += count_row(far_JW[j])
    clear(merged_W)
    for n in range(len(row_N)):
        if _twice(slots_S, start_N[n], start_N[n + 1], place_E, far_JW, once_W, twice_W):
            unite(merged_W, twice_W)
    return total - count_row(merged_W)


@njit(cache=True, nogil=True, inline="always")
def bits_traffic(bits, seats, state):  # type: ignore[no-untyped-def]
    """sum d + weight * sum dn of the present layout by the formula of the module; sets what `bits_loads` reads."""
    slots_S, start_R, count_E, rank_EH = seats.slots_S, seats.start_R, seats.holders.count_E, seats.holders.rank_EH
    row_R, bits_BW, size_B = state.ranks.row_P, state.ranks.bits_BW, state.ranks.size_B
    tokens_EW, place_E, open_JW, twice_RW = bits.tokens_EW, state.place_E, state.open_JW, state.twice_RW
    once_W, merged_W = state.free_CW[0], state.free_CW[1]
    total, several = 0.0, 0
    place_E[:] = -1
    for r in range(len(row_R)):
        total += size_B[row_R[r]]
        for s in range(start_R[r], start_R[r + 1]):
            e = slots_S[s]
            if e >= 0 and count_E[e] > 1 and place_E[e] < 0:
                place_E[e] = several
                total += _open(tokens_EW[e], rank_EH[e, : count_E[e]], row_R, bits_BW, open_JW[several])
                several += 1
    if state.node_weight > 0:
        total += state.node_weight * _node_traffic(seats, state, several)
    clear(merged_W)
    for r in range(len(row_R)):
        if _twice(slots_S, start_R[r], start_R[r + 1], place_E, open_JW, once_W, twice_RW[r]):
            unite(merged_W, twice_RW[r])
    return total - count_row(merged_W)


@njit(cache=True, nogil=True)
def count_alone(r, bits, seats, once_W, twice_W, alone_E):  # type: ignore[no-untyped-def]
    """Write, for the single-slot experts of rank r, the tokens that have no other such expert there."""
    slots_S, count_E, tokens_EW = seats.slots_S, seats.holders.count_E, bits.tokens_EW
    clear(once_W)
    clear(twice_W)
    for s in range(seats.start_R[r], seats.start_R[r + 1]):
        e = slots_S[s]
        if e >= 0 and count_E[e] == 1:
            add_repeats(once_W, twice_W, tokens_EW[e])
    for s in range(seats.start_R[r], seats.start_R[r + 1]):
        e = slots_S[s]
        if e >= 0 and count_E[e] == 1:
            t_W, total = tokens_EW[e], np.uint64(0)
            for w in range(len(t_W)):
                total += popcount(t_W[w] & ~twice_W[w])
            alone_E[e] = total


@njit(cache=True, nogil=True)
def count_open(state, alone_E):  # type: ignore[no-untyped-def]
    """Write, for the experts with several slots, the tokens for which they open a rank."""
    for e in range(len(state.place_E)):
        if state.place_E[e] >= 0:
            alone_E[e] = count_row(state.open_JW[state.place_E[e]])
