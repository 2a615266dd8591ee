"""What every rank serves in a layout with replicas, counted on the bits of `token_bits`.

Shape letters: E experts, R ranks, H ranks of an expert, W words of 64 tokens, Q words of rotation numbers.
"""

import numpy as np

from moeplace.placement.solvers.replicas.words import clear, count_row, popcount, unite
from moeplace.profiling.kernel_cache import njit


@njit(cache=True, nogil=True)
def bits_loads(bits, seats, state, load_R):  # type: ignore[no-untyped-def]
    """Write the load of every rank in the layout that `bits_traffic` saw last."""
    load_R[:] = 0.0
    served_R = np.empty(len(load_R), np.int64)
    for e in range(seats.num_real):
        rank_H = seats.holders.rank_EH[e, : seats.holders.count_E[e]]
        if len(rank_H) == 1:
            load_R[rank_H[0]] += bits.size_E[e]
        elif len(rank_H) == 2 and state.node_weight == 0:
            first = _first_of_two(e, rank_H[0], rank_H[1], bits, state)
            load_R[rank_H[0]] += first
            load_R[rank_H[1]] += bits.size_E[e] - first
        elif len(rank_H) > 1:
            _serve(e, rank_H, bits, state, served_R)
            for i in range(len(rank_H)):
                load_R[rank_H[i]] += served_R[i]


@njit(cache=True, nogil=True)
def _first_of_two(e, r, h, bits, state):  # type: ignore[no-untyped-def]
    """Tokens that the first of two ranks serves: it is in use, or merges, or the rotation chooses between equals."""
    t_W, open_W = bits.tokens_EW[e], state.open_JW[state.place_E[e]]
    u_W, v_W = state.ranks.bits_BW[state.ranks.row_P[r]], state.ranks.bits_BW[state.ranks.row_P[h]]
    both_u_W, both_v_W, prefer_Q = state.twice_RW[r], state.twice_RW[h], bits.prefer_RRQ[r, h]
    period, served = len(prefer_Q), np.uint64(0)
    for start in range(0, len(t_W), period):
        for i in range(min(period, len(t_W) - start)):
            w = start + i
            u = u_W[w] | (open_W[w] & (both_u_W[w] | ~both_v_W[w]))
            v = v_W[w] | (open_W[w] & (both_v_W[w] | ~both_u_W[w]))
            served += popcount(t_W[w] & u & (~v | prefer_Q[i]))
    return served


@njit(cache=True, nogil=True)
def _serve(e, rank_H, bits, state, served_H):  # type: ignore[no-untyped-def]
    """Write the tokens of an expert that each of its ranks serves to `served_H`, for any number of ranks and nodes."""
    t_W, open_W, count = bits.tokens_EW[e], state.open_JW[state.place_E[e]], len(rank_H)
    words, period = len(t_W), bits.prefer_RRQ.shape[2]
    free_CW, twice_RW, nodes = state.free_CW, state.twice_RW, state.nodes
    merge_W, near_W, first_W = free_CW[count], free_CW[count + 1], free_CW[count + 2]
    clear(merge_W)
    clear(near_W)
    for r in rank_H:
        unite(merge_W, twice_RW[r])
        if state.node_weight > 0:
            unite(near_W, nodes.bits_BW[nodes.row_P[state.node_R[r]]])
    for i in range(count):
        r = rank_H[i]
        u_W, v_W = state.ranks.bits_BW[state.ranks.row_P[r]], nodes.bits_BW[nodes.row_P[state.node_R[r]]]
        free_W = free_CW[i]
        for w in range(words):  # open tokens go where experts merge, then to a node in use
            free_W[w] = u_W[w] | (open_W[w] & (twice_RW[r, w] | ~merge_W[w]) & (v_W[w] | ~near_W[w] | twice_RW[r, w]))
    for i in range(count):
        for w in range(words):
            first_W[w] = t_W[w] & free_CW[i, w]
        for j in range(count):
            if j != i:
                other_W, prefer_Q = free_CW[j], bits.prefer_RRQ[rank_H[i], rank_H[j]]
                for start in range(0, words, period):
                    for w in range(min(period, words - start)):
                        first_W[start + w] &= ~other_W[start + w] | prefer_Q[w]
        served_H[i] = count_row(first_W)
