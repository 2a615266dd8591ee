"""One layer of the coherent objective for several experts per token, its neighbours fixed; swaps priced exactly.

With A = the ranks that serve a token in this layer, p = its owner before, o = its owner after (the rank of A with most
of its experts; ties: p, then the lowest), A' = the ranks that serve it in the next layer, and c the price of a copy:

    sum over r in A of (c[p, r] + c[r, o])  +  sum over r in A' of c[o, r]

For c = 1 that is connectivity of the k-set, connectivity of the k-set with p as a fixed vertex, and whether the owner
that the layer chooses is wanted next. Both neighbours hold still, so that layers of one parity can be searched at once.

Shape letters: T tokens, E experts, K top-k, R ranks, S slots.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.search.annealing import accepts, overload_change, random_below
from moeplace.profiling.kernel_cache import njit


class OwnedLayer(NamedTuple):
    """Tokens of a layer, and what surrounds them.

    Attributes:
        ids_TK: (T, K) int16 or int32 expert ids, -1 = none.
        first_E: (S + 1,) int64, where each expert's tokens start in `token_of`.
        token_of: (assignments,) int32 tokens, grouped by expert.
        before_T: (T,) int32 owner before the layer, -1 = none yet.
        next_TR: (T, R) float32 price of bringing the token to its next ranks from each rank.
        pair_RR: (R, R) float64 price of a copy.
        load_E: (S,) float64 assignments of each expert.
        limit_R: (R,) most load of each rank.
    """

    ids_TK: np.ndarray
    first_E: np.ndarray
    token_of: np.ndarray
    before_T: np.ndarray
    next_TR: np.ndarray
    pair_RR: np.ndarray
    load_E: np.ndarray
    limit_R: np.ndarray


@njit(cache=True, nogil=True)
def swap_owned(rank_E, layer, proposals, temperature, stop, state):  # type: ignore[no-untyped-def]
    """Try swaps of two experts in place, never for more load above the limits; returns the price saved.

    Args:
        rank_E: (S,) int64 rank of every expert and empty slot.
        layer: an `OwnedLayer`.
        proposals: random swaps to try; below 0: every pair in turn, once.
        temperature: of the Metropolis rule, in units of the objective.
        stop: (1,) uint8, set from outside when time is up.
        state: (1,) uint64 random state.
    """
    slots, ranks, tokens = len(rank_E), len(layer.limit_R), len(layer.before_T)
    count_R, used_K = np.zeros(ranks, np.int64), np.zeros(layer.ids_TK.shape[1], np.int64)
    load_R, cost_T = np.zeros(ranks), np.zeros(tokens)
    for e in range(slots):
        load_R[rank_E[e]] += layer.load_E[e]
    for t in range(tokens):
        cost_T[t] = _token_cost(t, rank_E, layer, count_R, used_K)
    saved = 0.0
    total = slots * slots if proposals < 0 else proposals
    for number in range(total):
        if stop[0]:
            break
        if proposals < 0:
            a, b = number // slots, number % slots
            if a >= b:
                continue
        else:
            a, b = random_below(state, slots), random_below(state, slots)
        g, h = rank_E[a], rank_E[b]
        amount = layer.load_E[a] - layer.load_E[b]
        if g == h or overload_change(load_R, layer.limit_R, g, h, amount) > 1e-9:
            continue
        rank_E[a], rank_E[b] = h, g
        delta = 0.0
        for e in (a, b):
            for index in range(layer.first_E[e], layer.first_E[e + 1]):
                t = layer.token_of[index]
                if e == b and _has(layer.ids_TK[t], a):
                    continue
                delta += _token_cost(t, rank_E, layer, count_R, used_K) - cost_T[t]
        if delta < -1e-9 or (temperature > 0.0 and accepts(delta, temperature, state)):
            saved -= delta
            load_R[g] -= amount
            load_R[h] += amount
            for e in (a, b):
                for index in range(layer.first_E[e], layer.first_E[e + 1]):
                    t = layer.token_of[index]
                    cost_T[t] = _token_cost(t, rank_E, layer, count_R, used_K)
        else:
            rank_E[a], rank_E[b] = g, h
    return saved


@njit(cache=True, nogil=True)
def follow_owners(ids_TK, rank_E, before_T, ranks):  # type: ignore[no-untyped-def]
    """(T,) int32 owner after a layer."""
    count_R, used_K = np.zeros(ranks, np.int64), np.zeros(ids_TK.shape[1], np.int64)
    after_T = np.empty(len(before_T), np.int32)
    for t in range(len(before_T)):
        d = _spread(ids_TK[t], rank_E, count_R, used_K)
        after_T[t] = _owner(before_T[t], d, count_R, used_K)
    return after_T


@njit(cache=True, nogil=True)
def price_of_reaching(ids_TK, rank_E, pair_RR):  # type: ignore[no-untyped-def]
    """(T, R) float32: from each rank, the price of bringing each token to all ranks that serve it in a layer."""
    ranks = len(pair_RR)
    count_R, used_K = np.zeros(ranks, np.int64), np.zeros(ids_TK.shape[1], np.int64)
    price_TR = np.zeros((len(ids_TK), ranks), np.float32)
    for t in range(len(ids_TK)):
        d = _spread(ids_TK[t], rank_E, count_R, used_K)
        for index in range(d):
            count_R[used_K[index]] = 0
            for r in range(ranks):
                price_TR[t, r] += pair_RR[r, used_K[index]]
    return price_TR


@njit(cache=True, nogil=True)
def _token_cost(t, rank_E, layer, count_R, used_K):  # type: ignore[no-untyped-def]
    before = layer.before_T[t]
    d = _spread(layer.ids_TK[t], rank_E, count_R, used_K)
    owner = _owner(before, d, count_R, used_K)
    if owner < 0:
        return 0.0
    cost = float(layer.next_TR[t, owner])
    for index in range(d):
        r = used_K[index]
        cost += layer.pair_RR[r, owner]
        if before >= 0:
            cost += layer.pair_RR[before, r]
    return cost


@njit(cache=True, nogil=True, inline="always")
def _spread(ids_K, rank_E, count_R, used_K):  # type: ignore[no-untyped-def]
    """Fill `used_K` with the ranks of a token and `count_R` with its experts on each; returns d."""
    d = 0
    for k in range(len(ids_K)):
        e = ids_K[k]
        if e >= 0:
            r = rank_E[e]
            if count_R[r] == 0:
                used_K[d] = r
                d += 1
            count_R[r] += 1
    return d


@njit(cache=True, nogil=True, inline="always")
def _owner(before, d, count_R, used_K):  # type: ignore[no-untyped-def]
    """Owner after the layer; clears `count_R`."""
    owner, most = before, 0
    for index in range(d):
        r = used_K[index]
        held = count_R[r]
        if held > most or (held == most and owner != before and (r == before or r < owner)):
            owner, most = r, held
        count_R[r] = 0
    return owner


@njit(cache=True, nogil=True, inline="always")
def _has(ids_K, expert):  # type: ignore[no-untyped-def]
    for k in range(len(ids_K)):  # noqa: SIM110  # numba is quicker with the loop
        if ids_K[k] == expert:
            return True
    return False
