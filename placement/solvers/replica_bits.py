"""Replicas for the dispatch objective, many moves a second: tokens as bits, 64 to a word.

With U_r = the tokens that have a single-slot expert on rank r, and t_e = the tokens of a replicated expert e with
slots on the ranks H_e, the rule of `replica_choice` gives

    sum d  =  sum_r |U_r|  +  sum_e |open_e|  -  |merged|       open_e = t_e and no U_r of its ranks
    load_r =  singles of r  +  sum_e |t_e served by r|          by U_r, and by the rotation where that leaves a choice

merged = tokens with two open experts that share a rank, which then serves both. A token that could merge twice is
counted once, so that a search ends with `replicas.anneal_replicas`, which is
exact. A move (swap two slots, or re-point a slot whose expert has another one) costs a few passes over words.

Shape letters: T tokens, E experts, R ranks, N nodes, S slots, W words of 64 tokens, P words of rotation numbers.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from moeplace.placement.replica_choice import preference_orders
from moeplace.placement.solvers.annealing import next_random, random_below

FINAL_SHARE = 0.15
"""Share of the work that only improves."""
DISMISSED = 0.03
"""Work of a move that a bound dismisses, in evaluations."""
LEAST_SHARE = 0.15
"""Share of an expert's tokens that its first slot gets at least when its second one goes."""
SLACK = 0.05
"""Share of two experts' load that replicated ones may shift when the two change places."""


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


@njit(cache=True, nogil=True, inline="always")
def _ones(x):  # type: ignore[no-untyped-def]
    """Bits set in a word (LLVM makes one instruction of it)."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True)
def _union(r, slots_S, start_R, copies_E, tokens_EW, row_W):  # type: ignore[no-untyped-def]
    """Write U_r to `row_W`; returns the number of its tokens."""
    row_W[:] = np.uint64(0)
    for s in range(start_R[r], start_R[r + 1]):
        e = slots_S[s]
        if e >= 0 and copies_E[e] == 1:
            for w in range(len(row_W)):
                row_W[w] |= tokens_EW[e, w]
    total = np.uint64(0)
    for w in range(len(row_W)):
        total += _ones(row_W[w])
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
            total += _ones(o)
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
        total += _ones(open_W[w])
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
            served += _ones(t_W[w] & u & (~v | prefer_P[i]))
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
        served_C[i] = _count_row(first_W)


@njit(cache=True, nogil=True)
def _count_row(row_W):  # type: ignore[no-untyped-def]
    total = np.uint64(0)
    for w in range(len(row_W)):
        total += _ones(row_W[w])
    return total


@njit(cache=True, nogil=True)
def _traffic(  # type: ignore[no-untyped-def]
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
            total += weight * _count_row(far_JW[j])
        merged_W[:] = np.uint64(0)
        for n in range(len(node_start_N) - 1):
            if _twice(slots_S, node_start_N[n], node_start_N[n + 1], place_E, far_JW, once_W, free_CW[2]):
                for w in range(words):
                    merged_W[w] |= free_CW[2, w]
        total -= weight * _count_row(merged_W)
    merged_W[:] = np.uint64(0)
    for r in range(num_ranks):
        if _twice(slots_S, start_R[r], start_R[r + 1], place_E, open_JW, once_W, twice_RW[r]):
            for w in range(words):
                merged_W[w] |= twice_RW[r, w]
    total -= _count_row(merged_W)
    return total


@njit(cache=True, nogil=True)
def _loads(  # type: ignore[no-untyped-def]
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
def _count_alone(r, slots_S, start_R, copies_E, bits_EW, once_W, twice_W, alone_E):  # type: ignore[no-untyped-def]
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
                total += _ones(t_W[w] & ~twice_W[w])
            alone_E[e] = total


@njit(cache=True, nogil=True)
def _count_open(place_E, open_JW, alone_E):  # type: ignore[no-untyped-def]
    """Write, for the experts with several slots, the tokens for which they open a rank."""
    for e in range(len(place_E)):
        if place_E[e] >= 0:
            alone_E[e] = _count_row(open_JW[place_E[e]])


@njit(cache=True, nogil=True, inline="always")
def _lowest(mask):  # type: ignore[no-untyped-def]
    """Number of the lowest bit set."""
    return np.int64(_ones((mask & (~mask + np.uint64(1))) - np.uint64(1)))


@njit(cache=True, nogil=True)
def _newly(a, b, h, slots_S, start_R, together_EE):  # type: ignore[no-untyped-def]
    """At least so many tokens of expert a have no expert on rank h once b has left it (union bound)."""
    absent = together_EE[a, a]
    for s in range(start_R[h], start_R[h + 1]):
        f = slots_S[s]
        if f >= 0 and f != b and f != a:
            absent -= together_EE[a, f]
    return max(absent, 0)


@njit(cache=True, nogil=True)
def _rank_risk(first, last, slots_S, copies_E, risk_EE):  # type: ignore[no-untyped-def]
    """Quadratic form of the hedge over the slots first..last-1, each expert with its share 1/slots."""
    total = 0.0
    for x in range(first, last):
        if slots_S[x] >= 0:
            row = 0.0
            for y in range(first, last):
                if slots_S[y] >= 0:
                    row += risk_EE[slots_S[x], slots_S[y]] / copies_E[slots_S[y]]
            total += row / copies_E[slots_S[x]]
    return total


@njit(cache=True, nogil=True)
def anneal_bits(  # type: ignore[no-untyped-def]
    bits_EW, prefer_RRP, size_E, together_EE, num_real, slots_S, start_R, node_R, limit_R, risk_EE, weight, hot, end,
    evaluations, min_copies, stop, state,
):  # fmt: skip
    """Improve `slots_S` in place; returns (best cost with hedge, or with overload priced; loads).

    Args:
        bits_EW, prefer_RRP, size_E, together_EE: see `TokenBits`.
        num_real: experts of the layer.
        slots_S: (S,) int32 slot -> expert, -1 = empty.
        start_R: (R + 1,) first slot of each rank.
        node_R: (R,) node of each rank.
        limit_R: (R,) most load of each rank.
        risk_EE: hedge, see `robust`; a replicated expert counts with its share on each rank.
        weight: price of a node beside a rank.
        hot, end: first and last temperature in tokens; hot = 0 is descent only.
        evaluations: work to do: moves that are evaluated; one that a bound dismisses counts DISMISSED.
        min_copies: slots that every expert keeps.
        stop: (1,) uint8, set from outside when time is up.
        state: (1,) uint64.
    """
    slots, num_experts, words = len(slots_S), len(bits_EW), bits_EW.shape[1]
    num_ranks, num_nodes = len(node_R), node_R[-1] + 1
    one, zero = np.uint64(1), np.uint64(0)
    rank_S = np.empty(slots, np.int64)
    for r in range(num_ranks):
        rank_S[start_R[r] : start_R[r + 1]] = r
    node_start_N = np.zeros(num_nodes + 1, np.int64)
    for r in range(num_ranks):
        node_start_N[node_R[r] + 1] = start_R[r + 1]
    mask_E, copies_E = np.zeros(num_experts, np.uint64), np.zeros(num_experts, np.int64)
    for s in range(slots):
        if slots_S[s] >= 0:
            mask_E[slots_S[s]] |= one << np.uint64(rank_S[s])
            copies_E[slots_S[s]] += 1
    most_several = slots // 2 + 1
    open_JW, far_JW = np.zeros((most_several, words), np.uint64), np.zeros((most_several, words), np.uint64)
    free_CW = np.zeros((num_ranks + 3, words), np.uint64)
    twice_RW = np.zeros((num_ranks, words), np.uint64)
    place_E = np.full(num_experts, -1, np.int64)
    rows_BW, size_B = np.zeros((num_ranks + 4, words), np.uint64), np.zeros(num_ranks + 4)
    row_R, spare = np.arange(num_ranks), np.arange(num_ranks, num_ranks + 4)
    node_rows_BW, node_size_B = np.zeros((num_nodes + 4, words), np.uint64), np.zeros(num_nodes + 4)
    node_row_N, node_spare = np.arange(num_nodes), np.arange(num_nodes, num_nodes + 4)
    for r in range(num_ranks):
        size_B[r] = _union(r, slots_S, start_R, copies_E, bits_EW, rows_BW[r])
        if weight > 0:
            for w in range(words):
                node_rows_BW[node_R[r], w] |= rows_BW[r, w]
    for n in range(num_nodes):
        node_size_B[n] = _count_row(node_rows_BW[n])
    load_R, trial_R = np.zeros(num_ranks), np.zeros(num_ranks)
    cost = _traffic(
        slots_S, start_R, node_start_N, node_R, mask_E, copies_E, bits_EW, prefer_RRP, size_E, row_R, rows_BW, size_B,
        node_row_N, node_rows_BW, node_size_B, weight, open_JW, far_JW, twice_RW, free_CW, place_E,
    )  # fmt: skip
    _loads(
        slots_S, start_R, node_R, mask_E, bits_EW, prefer_RRP, size_E, row_R, rows_BW, node_row_N, node_rows_BW,
        weight, open_JW, twice_RW, free_CW, place_E, load_R,
    )  # fmt: skip
    alone_E, once_W, twice_W = np.zeros(num_experts, np.int64), np.zeros(words, np.uint64), np.zeros(words, np.uint64)
    for r in range(num_ranks):
        _count_alone(r, slots_S, start_R, copies_E, bits_EW, once_W, twice_W, alone_E)
    _count_open(place_E, open_JW, alone_E)
    hedged = risk_EE.any()
    risk_R, new_risk_R = np.zeros(num_ranks), np.zeros(num_ranks)
    risk = 0.0
    if hedged:
        for r in range(num_ranks):
            risk_R[r] = _rank_risk(start_R[r], start_R[r + 1], slots_S, copies_E, risk_EE)
            risk += risk_R[r] ** 2
    over = np.maximum(load_R - limit_R, 0.0).sum()
    best_S, best_cost, best_R = slots_S.copy(), np.inf, load_R.copy()
    if over <= 0.0:
        best_cost = cost + risk
    touched, touched_nodes = np.empty(4, np.int64), np.empty(4, np.int64)
    done = 0.0
    while done < evaluations and not stop[0]:
        share = done / evaluations
        last = hot <= 0 or share > 1.0 - FINAL_SHARE
        cooled = share / (1.0 - FINAL_SHARE)
        temperature = 0.0 if last else hot * (end / hot) ** cooled
        price = (1.0 + weight) * (50.0 if last else 2.0 * 3.0**cooled)
        done += DISMISSED
        x = random_below(state, slots)
        if over > 0.0 and random_below(state, 2):  # look for moves where load must go
            for _ in range(slots):
                if load_R[rank_S[x]] > limit_R[rank_S[x]]:
                    break
                x = (x + 1) % slots
        a = slots_S[x]
        if a < 0:
            continue
        g = rank_S[x]
        bit_g = one << np.uint64(g)
        y, b, repoint, risky = -1, -1, False, zero
        if copies_E[a] > min_copies and random_below(state, 5) < 3:
            b = random_below(state, num_real)  # slot x gets expert b instead of a
            repoint = True
            if b == a or mask_E[b] & bit_g != zero:
                continue
            risky = mask_E[a] | mask_E[b] | bit_g
        else:
            y = random_below(state, slots)
            h = rank_S[y]
            b = slots_S[y]
            bit_h = one << np.uint64(h)
            if g == h or mask_E[a] & bit_h != zero or (b >= 0 and mask_E[b] & bit_g != zero) or a == b:
                continue
            if (copies_E[a] > 1 or (b >= 0 and copies_E[b] > 1)) and random_below(state, 2):
                continue  # no bound dismisses most of these, and few are taken
            risky = bit_g | bit_h
        allowed = -1e-9
        if not last:
            draw = float(next_random(state) >> np.uint64(11)) * (1.0 / 9007199254740992.0)
            allowed = -temperature * np.log(max(draw, 1e-300))
        least = -(1.0 + weight) * alone_E[b] if b >= 0 else 0.0
        if repoint:
            if copies_E[a] == 2:
                other = _lowest(mask_E[a] & ~bit_g)
                least += max(_newly(a, -1, other, slots_S, start_R, together_EE) - alone_E[a], 0)
                least += price * (max(load_R[other] + LEAST_SHARE * size_E[a] - limit_R[other], 0.0) - over)
        else:
            least -= (1.0 + weight) * alone_E[a]
            shift, slack = -size_E[a] / copies_E[a], (SLACK if copies_E[a] == 1 else 0.5) * size_E[a] / copies_E[a]
            if copies_E[a] == 1:
                least += _newly(a, b, h, slots_S, start_R, together_EE)
            if b >= 0:
                shift += size_E[b] / copies_E[b]
                slack += (SLACK if copies_E[b] == 1 else 0.5) * size_E[b] / copies_E[b]
                if copies_E[b] == 1:
                    least += _newly(b, a, g, slots_S, start_R, together_EE)
            least += price * (max(load_R[g] + shift - slack - limit_R[g], 0.0) - max(load_R[g] - limit_R[g], 0.0))
            least += price * (max(load_R[h] - shift - slack - limit_R[h], 0.0) - max(load_R[h] - limit_R[h], 0.0))
        if least > allowed:
            continue
        done += 1.0 - DISMISSED
        old_a, old_b = mask_E[a], mask_E[b] if b >= 0 else zero
        slots_S[x] = b
        count = 0
        if repoint:
            mask_E[a] &= ~bit_g
            mask_E[b] |= bit_g
            copies_E[a] -= 1
            copies_E[b] += 1
            for r in range(num_ranks):
                if (copies_E[a] == 1 and mask_E[a] >> np.uint64(r) & one) or (
                    copies_E[b] == 2 and old_b >> np.uint64(r) & one
                ):
                    touched[count] = r
                    count += 1
        else:
            slots_S[y] = a
            mask_E[a] = (mask_E[a] & ~bit_g) | bit_h
            if b >= 0:
                mask_E[b] = (mask_E[b] & ~bit_h) | bit_g
            if copies_E[a] == 1 or (b >= 0 and copies_E[b] == 1):
                touched[0], touched[1] = g, h
                count = 2
        nodes = 0
        for i in range(count):
            r = touched[i]
            row_R[r], spare[i] = spare[i], row_R[r]
            size_B[row_R[r]] = _union(r, slots_S, start_R, copies_E, bits_EW, rows_BW[row_R[r]])
            if weight > 0 and (i == 0 or node_R[touched[0]] != node_R[r]):
                touched_nodes[nodes] = node_R[r]
                nodes += 1
        for i in range(nodes):
            n = touched_nodes[i]
            node_row_N[n], node_spare[i] = node_spare[i], node_row_N[n]
            node_W = node_rows_BW[node_row_N[n]]
            node_W[:] = zero
            for r in range(num_ranks):
                if node_R[r] == n:
                    for w in range(words):
                        node_W[w] |= rows_BW[row_R[r], w]
            node_size_B[node_row_N[n]] = _count_row(node_W)
        new_cost = _traffic(
            slots_S, start_R, node_start_N, node_R, mask_E, copies_E, bits_EW, prefer_RRP, size_E, row_R, rows_BW,
            size_B, node_row_N, node_rows_BW, node_size_B, weight, open_JW, far_JW, twice_RW, free_CW, place_E,
        )  # fmt: skip
        new_risk, new_over = risk, 0.0
        if hedged:
            for r in range(num_ranks):
                new_risk_R[r] = risk_R[r]
                if risky >> np.uint64(r) & one:
                    new_risk_R[r] = _rank_risk(start_R[r], start_R[r + 1], slots_S, copies_E, risk_EE)
                    new_risk += new_risk_R[r] ** 2 - risk_R[r] ** 2
        delta = new_cost - cost + new_risk - risk - price * over
        if delta <= allowed:  # even if it ended all overload it would not be taken otherwise
            _loads(
                slots_S, start_R, node_R, mask_E, bits_EW, prefer_RRP, size_E, row_R, rows_BW, node_row_N,
                node_rows_BW, weight, open_JW, twice_RW, free_CW, place_E, trial_R,
            )  # fmt: skip
            for r in range(num_ranks):
                new_over += max(trial_R[r] - limit_R[r], 0.0)
            delta += price * new_over
        if delta <= allowed:
            cost, risk, over = new_cost, new_risk, new_over
            load_R[:] = trial_R
            risk_R[:] = new_risk_R
            for i in range(count):
                _count_alone(touched[i], slots_S, start_R, copies_E, bits_EW, once_W, twice_W, alone_E)
            _count_open(place_E, open_JW, alone_E)
            if over <= 0.0 and cost + risk < best_cost:
                best_cost = cost + risk
                best_S[:] = slots_S
                best_R[:] = load_R
            continue
        mask_E[a] = old_a
        if b >= 0:
            mask_E[b] = old_b
        slots_S[x] = a
        if repoint:
            copies_E[a] += 1
            copies_E[b] -= 1
        else:
            slots_S[y] = b
        for i in range(count):
            row_R[touched[i]], spare[i] = spare[i], row_R[touched[i]]
        for i in range(nodes):
            n = touched_nodes[i]
            node_row_N[n], node_spare[i] = node_spare[i], node_row_N[n]
    if best_cost < np.inf:
        slots_S[:] = best_S
        return best_cost, best_R
    return cost + risk + 50.0 * (1.0 + weight) * over, load_R
