"""TokenBits: a layer's routing as bits, 64 tokens to a word, and what a layout with replicas costs on them.

With U_r = the tokens that have a single-slot expert on rank r, and t_e = the tokens of a replicated expert e with
slots on the ranks H_e, the rule of `replica_choice` gives

    sum d  =  sum_r |U_r|  +  sum_e |open_e|  -  |merged|       open_e = t_e and no U_r of its ranks
    load_r =  singles of r  +  sum_e |t_e served by r|          by U_r, and by the rotation where that leaves a choice

merged = tokens with two open experts that share a rank, which then serves both. A token that could merge twice is
counted once.

Shape letters: T tokens, E experts, R ranks, N nodes, S slots, W words of 64 tokens, P words of rotation numbers.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from moeplace.placement.cost.replica_choice import preference_orders
from moeplace.placement.solvers.replicas.words import popcount


class TokenBits(NamedTuple):
    """A layer's tokens as bits.

    Attributes:
        tokens_EW: (S, W) uint64, which tokens go to each expert; rows beyond the layer's experts are zero.
        prefer_RRP: (R, R, P) uint64, rotation numbers that prefer rank r to rank s; token word w has word w mod P.
        size_E: (S,) int64 number of tokens of each expert.
        together_EE: (S, S) int64 tokens that two experts have in common.
    """

    tokens_EW: np.ndarray
    prefer_RRP: np.ndarray
    size_E: np.ndarray
    together_EE: np.ndarray


def token_bits(ids_TK: np.ndarray, num_slots: int, num_ranks: int) -> TokenBits:
    """The bits of a layer's (T, K) expert ids, -1 = none; token t has rotation t."""
    tokens = len(ids_TK)
    has_ET = np.zeros((num_slots, -(-tokens // 64) * 64), bool)
    token, slot = np.nonzero(ids_TK >= 0)
    has_ET[ids_TK[token, slot], token] = True
    place_PR = np.argsort(preference_orders(num_ranks), axis=1)
    prefer_RRP = place_PR.T[:, None, :] < place_PR.T[None, :, :]
    dense_ET = has_ET.astype(np.float32)
    together_EE = np.rint(dense_ET @ dense_ET.T).astype(np.int64)
    return TokenBits(_words(has_ET), _words(prefer_RRP), has_ET.sum(axis=1, dtype=np.int64), together_EE)


def _words(bits: np.ndarray) -> np.ndarray:
    """Booleans packed along the last axis, 64 to a uint64, first in the lowest bit."""
    packed = np.packbits(bits, axis=-1, bitorder="little")
    return np.ascontiguousarray(packed).view("<u8").astype(np.uint64)


@njit(cache=True, nogil=True)
def mark_singles(r, slots_S, start_R, copies_E, tokens_EW, row_W):  # type: ignore[no-untyped-def]
    """Write U_r to `row_W`; returns the number of its tokens."""
    row_W[:] = np.uint64(0)
    for s in range(start_R[r], start_R[r + 1]):
        e = slots_S[s]
        if e >= 0 and copies_E[e] == 1:
            for w in range(len(row_W)):
                row_W[w] |= tokens_EW[e, w]
    total = np.uint64(0)
    for w in range(len(row_W)):
        total += popcount(row_W[w])
    return total


@njit(cache=True, nogil=True)
def _open(e, mask, row_R, rows_BW, bits_EW, open_W):  # type: ignore[no-untyped-def]
    """Write the tokens of expert e that no rank of `mask` serves anyway to `open_W`; returns their number."""
    first, second, count = -1, -1, 0
    rest, rank = mask, 0
    while rest != np.uint64(0):
        if rest & np.uint64(1) != np.uint64(0):
            first, second = second, rank
            count += 1
        rest >>= np.uint64(1)
        rank += 1
    t_W = bits_EW[e]
    total = np.uint64(0)
    if count == 2:
        u_W, v_W = rows_BW[row_R[first]], rows_BW[row_R[second]]
        for w in range(len(t_W)):
            o = t_W[w] & ~(u_W[w] | v_W[w])
            open_W[w] = o
            total += popcount(o)
        return total
    open_W[:] = t_W
    rest, rank = mask, 0
    while rest != np.uint64(0):
        if rest & np.uint64(1) != np.uint64(0):
            u_W = rows_BW[row_R[rank]]
            for w in range(len(t_W)):
                open_W[w] &= ~u_W[w]
        rest >>= np.uint64(1)
        rank += 1
    for w in range(len(t_W)):
        total += popcount(open_W[w])
    return total


@njit(cache=True, nogil=True)
def _twice(slots_S, first, last, place_E, open_JW, once_W, twice_W):  # type: ignore[no-untyped-def]
    """Write the tokens with two open experts in the slots first..last-1 to `twice_W`; returns whether there may be any.

    An expert with several of these slots (of one node) counts once.
    """
    words, found = len(once_W), 0
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
            for w in range(words):
                once_W[w] = open_W[w]
        elif found == 1:
            for w in range(words):
                twice_W[w] = once_W[w] & open_W[w]
                once_W[w] |= open_W[w]
        else:
            for w in range(words):
                twice_W[w] |= once_W[w] & open_W[w]
                once_W[w] |= open_W[w]
        found += 1
    if found < 2:
        twice_W[:] = np.uint64(0)
    return found >= 2


@njit(cache=True, nogil=True)
def _first_of_two(t_W, u_W, v_W, open_W, both_u_W, both_v_W, prefer_P):  # type: ignore[no-untyped-def]
    """Tokens that the first of two ranks serves: it is in use, or merges, or the rotation chooses between equals."""
    period, served = len(prefer_P), np.uint64(0)
    for start in range(0, len(t_W), period):
        for i in range(min(period, len(t_W) - start)):
            w = start + i
            u = u_W[w] | (open_W[w] & (both_u_W[w] | ~both_v_W[w]))
            v = v_W[w] | (open_W[w] & (both_v_W[w] | ~both_u_W[w]))
            served += popcount(t_W[w] & u & (~v | prefer_P[i]))
    return served


@njit(cache=True, nogil=True)
def _serve(t_W, holders, open_W, row_R, rows_BW, twice_RW, node_R, node_row_N, node_rows_BW, weight, prefer_RRP,  # type: ignore[no-untyped-def]
           free_CW, served_C):  # fmt: skip
    """Tokens of an expert that each of its ranks serves, for any number of ranks and nodes."""
    words, count, period = len(t_W), len(holders), prefer_RRP.shape[2]
    merge_W, near_W, first_W = free_CW[count], free_CW[count + 1], free_CW[count + 2]
    merge_W[:] = np.uint64(0)
    near_W[:] = np.uint64(0)
    for i in range(count):
        for w in range(words):
            merge_W[w] |= twice_RW[holders[i], w]
        if weight > 0:
            v_W = node_rows_BW[node_row_N[node_R[holders[i]]]]
            for w in range(words):
                near_W[w] |= v_W[w]
    for i in range(count):
        r = holders[i]
        u_W, v_W, free_W = rows_BW[row_R[r]], node_rows_BW[node_row_N[node_R[r]]], free_CW[i]
        for w in range(words):  # open tokens go where experts merge, then to a node in use
            free_W[w] = u_W[w] | (open_W[w] & (twice_RW[r, w] | ~merge_W[w]) & (v_W[w] | ~near_W[w] | twice_RW[r, w]))
    for i in range(count):
        for w in range(words):
            first_W[w] = t_W[w] & free_CW[i, w]
        for j in range(count):
            if j != i:
                other_W, prefer_P = free_CW[j], prefer_RRP[holders[i], holders[j]]
                for start in range(0, words, period):
                    for w in range(min(period, words - start)):
                        first_W[start + w] &= ~other_W[start + w] | prefer_P[w]
        served_C[i] = count_row(first_W)


@njit(cache=True, nogil=True)
def count_row(row_W):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for w in range(len(row_W)):
        total += popcount(row_W[w])
    return total


@njit(cache=True, nogil=True)
def bits_traffic(  # type: ignore[no-untyped-def]
    slots_S, start_R, node_start_N, node_R, mask_E, copies_E, bits_EW, prefer_RRP, size_E, row_R, rows_BW, size_B,
    node_row_N, node_rows_BW, node_size_B, weight, open_JW, far_JW, twice_RW, free_CW, place_E,
):  # fmt: skip
    """sum d + weight * sum dn of the present state by the formula of the module; sets its tables for `_loads`."""
    num_ranks, words = len(start_R) - 1, rows_BW.shape[1]
    one = np.uint64(1)
    total = 0.0
    several = 0
    for r in range(num_ranks):
        total += size_B[row_R[r]]
        for s in range(start_R[r], start_R[r + 1]):
            e = slots_S[s]
            if e < 0:
                continue
            if copies_E[e] == 1:
                place_E[e] = -1
            elif mask_E[e] & ((one << np.uint64(r)) - one) == np.uint64(0):  # its first slot
                place_E[e] = several
                total += _open(e, mask_E[e], row_R, rows_BW, bits_EW, open_JW[several])
                several += 1
    once_W, merged_W = free_CW[0], free_CW[1]
    if weight > 0:
        for n in range(len(node_start_N) - 1):
            total += weight * node_size_B[node_row_N[n]]
        far_JW[:several] = open_JW[:several]
        for r in range(num_ranks):
            v_W = node_rows_BW[node_row_N[node_R[r]]]
            for s in range(start_R[r], start_R[r + 1]):
                if slots_S[s] >= 0 and place_E[slots_S[s]] >= 0:
                    far_W = far_JW[place_E[slots_S[s]]]
                    for w in range(words):
                        far_W[w] &= ~v_W[w]
        for j in range(several):
            total += weight * count_row(far_JW[j])
        merged_W[:] = np.uint64(0)
        for n in range(len(node_start_N) - 1):
            if _twice(slots_S, node_start_N[n], node_start_N[n + 1], place_E, far_JW, once_W, free_CW[2]):
                for w in range(words):
                    merged_W[w] |= free_CW[2, w]
        total -= weight * count_row(merged_W)
    merged_W[:] = np.uint64(0)
    for r in range(num_ranks):
        if _twice(slots_S, start_R[r], start_R[r + 1], place_E, open_JW, once_W, twice_RW[r]):
            for w in range(words):
                merged_W[w] |= twice_RW[r, w]
    total -= count_row(merged_W)
    return total


@njit(cache=True, nogil=True)
def bits_loads(  # type: ignore[no-untyped-def]
    slots_S, start_R, node_R, mask_E, bits_EW, prefer_RRP, size_E, row_R, rows_BW, node_row_N, node_rows_BW, weight,
    open_JW, twice_RW, free_CW, place_E, load_R,
):  # fmt: skip
    """Write the load of every rank in the state that `_traffic` saw last."""
    num_ranks, one = len(start_R) - 1, np.uint64(1)
    load_R[:] = 0.0
    for r in range(num_ranks):
        for s in range(start_R[r], start_R[r + 1]):
            if slots_S[s] >= 0 and place_E[slots_S[s]] < 0:
                load_R[r] += size_E[slots_S[s]]
    holders, served_C = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
    for r in range(num_ranks):
        for s in range(start_R[r], start_R[r + 1]):
            e = slots_S[s]
            if e < 0 or place_E[e] < 0 or mask_E[e] & ((one << np.uint64(r)) - one) != np.uint64(0):
                continue
            count = 0
            for q in range(r, num_ranks):
                if mask_E[e] >> np.uint64(q) & one:
                    holders[count] = q
                    count += 1
            open_W = open_JW[place_E[e]]
            if count == 2 and weight == 0:
                h = holders[1]
                first = _first_of_two(
                    bits_EW[e], rows_BW[row_R[r]], rows_BW[row_R[h]], open_W, twice_RW[r], twice_RW[h], prefer_RRP[r, h]
                )
                load_R[r] += first
                load_R[h] += size_E[e] - first
            else:
                _serve(
                    bits_EW[e], holders[:count], open_W, row_R, rows_BW, twice_RW, node_R, node_row_N, node_rows_BW,
                    weight, prefer_RRP, free_CW, served_C,
                )  # fmt: skip
                for i in range(count):
                    load_R[holders[i]] += served_C[i]


@njit(cache=True, nogil=True)
def count_alone(r, slots_S, start_R, copies_E, bits_EW, once_W, twice_W, alone_E):  # type: ignore[no-untyped-def]
    """Write, for the single-slot experts of rank r, the tokens that have no other such expert there."""
    words = len(once_W)
    once_W[:] = np.uint64(0)
    twice_W[:] = np.uint64(0)
    for s in range(start_R[r], start_R[r + 1]):
        e = slots_S[s]
        if e >= 0 and copies_E[e] == 1:
            t_W = bits_EW[e]
            for w in range(words):
                twice_W[w] |= once_W[w] & t_W[w]
                once_W[w] |= t_W[w]
    for s in range(start_R[r], start_R[r + 1]):
        e = slots_S[s]
        if e >= 0 and copies_E[e] == 1:
            t_W, total = bits_EW[e], np.uint64(0)
            for w in range(words):
                total += popcount(t_W[w] & ~twice_W[w])
            alone_E[e] = total


@njit(cache=True, nogil=True)
def count_open(place_E, open_JW, alone_E):  # type: ignore[no-untyped-def]
    """Write, for the experts with several slots, the tokens for which they open a rank."""
    for e in range(len(place_E)):
        if place_E[e] >= 0:
            alone_E[e] = count_row(open_JW[place_E[e]])
