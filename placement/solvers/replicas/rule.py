"""The replica choice of `cost.replica_choice` on the lists of ranks that a search keeps: what each token costs.

Token t is near rank t mod R, its home, as in the evaluation.

A search changes two experts at a time and asks again for their tokens only, so the rule is written for one token, in
terms of the ranks of its few experts: nothing here grows with the number of ranks.

Shape letters: T tokens, E experts, K top-k, R ranks, N nodes, P orders of ranks, S slots.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moeplace.placement.cost.replica_choice import preference_orders
from moeplace.profiling.kernel_cache import njit


class Rule(NamedTuple):
    """Tokens, the ranks' nodes and preferences, and room to mark what is in use.

    Attributes:
        ids_TK: (T, K) int16 expert ids, -1 = none; token t has rotation number t.
        node_R: (R,) int64 node of each rank, plus R: its place in `mark_X`.
        place_PR: (P, R) int16 place of each rank in each of `preference_orders`.
        node_weight: price of a node beside a rank.
        mark_X: (R + N + 1,) int64, the last mark of each rank and node, and the present one.
    """

    ids_TK: np.ndarray
    node_R: np.ndarray
    place_PR: np.ndarray
    node_weight: float
    mark_X: np.ndarray


class Served(NamedTuple):
    """What became of every token.

    Attributes:
        cost_T: (T,) d + node_weight * dn.
        rank_TK: (T, K) int16 serving ranks, -1 = none.
        load_R: (R,) assignments that each rank serves.
    """

    cost_T: np.ndarray
    rank_TK: np.ndarray
    load_R: np.ndarray


@lru_cache(maxsize=16)
def preference_places(num_ranks: int) -> np.ndarray:
    """(P, R) int16, read-only: the place of every rank in each order."""
    place_PR = np.argsort(preference_orders(num_ranks), axis=1).astype(np.int16)
    place_PR.flags.writeable = False
    return place_PR


def rule_on(ids_TK: np.ndarray, node_R: np.ndarray, node_weight: float) -> Rule:
    """The rule for these tokens; a `Rule` is not to be shared by threads."""
    ranks = len(node_R)
    marks = np.zeros(ranks + int(node_R[-1]) + 2, np.int64)
    return Rule(ids_TK, ranks + np.asarray(node_R, np.int64), preference_places(ranks), float(node_weight), marks)


def unserved(rule: Rule) -> Served:
    """Tables for `replay`, empty."""
    tokens, ranks = len(rule.ids_TK), len(rule.node_R)
    return Served(np.zeros(tokens), np.full(rule.ids_TK.shape, -1, np.int16), np.zeros(ranks))


@njit(cache=True, nogil=True, inline="always")
def serve(t, ids_TK, node_R, place_PR, weight, mark_X, count_E, rank_EH, held_ER, rank_K):  # type: ignore[no-untyped-def]
    """d + weight * dn of token t; writes the rank of every expert to `rank_K`.

    Plain arrays, and inlined: taking them from a tuple for every token would cost as much as the rule (counted
    references).
    """
    stamp, top_k = mark_X[-1] + 1, len(rank_K)
    mark_X[-1] = stamp
    ranks, nodes, remaining = 0, 0, 0
    for k in range(top_k):
        e = ids_TK[t, k]
        rank_K[k] = -1
        if e >= 0:
            if count_E[e] == 1:
                r = rank_EH[e, 0]
                rank_K[k] = r
                if mark_X[r] != stamp:
                    mark_X[r] = stamp
                    ranks += 1
                    if mark_X[node_R[r]] != stamp:
                        mark_X[node_R[r]] = stamp
                        nodes += 1
            else:
                remaining += 1
    if remaining > 0:
        place_R = place_PR[t % len(place_PR)]
        home = t % len(node_R)
        remaining -= _serve_where_in_use(t, home, ids_TK, mark_X, count_E, rank_EH, place_R, rank_K)
        while remaining > 0:
            best, held = _best_rank(t, home, ids_TK, node_R, mark_X, count_E, rank_EH, held_ER, place_R, rank_K)
            remaining -= held
            mark_X[best] = stamp
            ranks += 1
            if mark_X[node_R[best]] != stamp:
                mark_X[node_R[best]] = stamp
                nodes += 1
            for k in range(top_k):
                if ids_TK[t, k] >= 0 and rank_K[k] < 0 and held_ER[ids_TK[t, k], best]:
                    rank_K[k] = best
    return ranks + weight * nodes


@njit(cache=True, nogil=True)
def _serve_where_in_use(t, home, ids_TK, mark_X, count_E, rank_EH, place_R, rank_K):  # type: ignore[no-untyped-def]
    """Replicated experts that a rank in use holds are served there; returns their number."""
    served, stamp = 0, mark_X[-1]
    for k in range(len(rank_K)):
        e = ids_TK[t, k]
        if e >= 0 and rank_K[k] < 0:
            best = -1
            for i in range(count_E[e]):
                r = rank_EH[e, i]
                if mark_X[r] == stamp and best != home and (best < 0 or r == home or place_R[r] < place_R[best]):
                    best = r
            if best >= 0:
                served += 1
                rank_K[k] = best
    return served


@njit(cache=True, nogil=True)
def _best_rank(t, home, ids_TK, node_R, mark_X, count_E, rank_EH, held_ER, place_R, rank_K):  # type: ignore[no-untyped-def]
    """The rank that holds most experts not served yet, home and nodes in use before others; and how many it holds."""
    best, best_score, stamp = -1, -1, mark_X[-1]
    for j in range(len(rank_K)):
        if ids_TK[t, j] < 0 or rank_K[j] >= 0:
            continue
        for i in range(count_E[ids_TK[t, j]]):
            r = rank_EH[ids_TK[t, j], i]
            held = 0
            for k in range(len(rank_K)):
                if ids_TK[t, k] >= 0 and rank_K[k] < 0 and held_ER[ids_TK[t, k], r]:
                    held += 1
            beside = mark_X[node_R[r]] == stamp or node_R[r] == node_R[home]
            score = 4 * held + 2 * (r == home) + beside
            if score > best_score or (score == best_score and place_R[r] < place_R[best]):
                best, best_score = r, score
    return best, best_score // 4


@njit(cache=True, nogil=True)
def replay(rule, holders, served):  # type: ignore[no-untyped-def]
    """Serve every token; returns the sum of costs."""
    ids_TK, node_R, place_PR, weight, mark_X = rule
    rank_EH, count_E, held_ER = holders
    cost_T, rank_TK, load_R = served
    rank_K = np.empty(ids_TK.shape[1], np.int64)
    total = 0.0
    load_R[:] = 0.0
    for t in range(len(ids_TK)):
        cost_T[t] = serve(t, ids_TK, node_R, place_PR, weight, mark_X, count_E, rank_EH, held_ER, rank_K)
        total += cost_T[t]
        for k in range(len(rank_K)):
            rank_TK[t, k] = rank_K[k]
            if rank_K[k] >= 0:
                load_R[rank_K[k]] += 1.0
    return total


@njit(cache=True, nogil=True)
def gain_of_replicas(rule, holders, gain_ER):  # type: ignore[no-untyped-def]
    """Add to `gain_ER` what a further replica of expert e on rank r saves, exactly for one replica at a time."""
    ids_TK, node_R, place_PR, weight, mark_X = rule
    rank_EH, count_E, held_ER = holders
    rank_K = np.empty(ids_TK.shape[1], np.int64)
    for t in range(len(ids_TK)):
        serve(t, ids_TK, node_R, place_PR, weight, mark_X, count_E, rank_EH, held_ER, rank_K)
        for k in range(len(rank_K)):
            own = rank_K[k]
            if own < 0:
                continue
            alone, node_alone = True, True
            for j in range(len(rank_K)):
                if j != k and rank_K[j] >= 0:
                    alone &= rank_K[j] != own
                    node_alone &= node_R[rank_K[j]] != node_R[own]
            if not alone:
                continue
            saved = 1.0 + (weight if node_alone else 0.0)
            for r in range(len(node_R)):
                if r != own and mark_X[r] == mark_X[-1] and not held_ER[ids_TK[t, k], r]:
                    gain_ER[ids_TK[t, k], r] += saved
