"""The replica choice of `cost.replica_choice` on the lists of ranks that a search keeps: what each token costs.

Token t is near rank t mod R, its home, as in the evaluation, unless `near_T` says where it is.

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
        asked_TX: (T, K + 1) int16 expert ids, -1 = none, then the rank where the token is, -1 = unknown; token t has
            rotation number t.
        node_R: (R,) int64 node of each rank, plus R: its place in `mark_X`.
        place_PR: (P, R) int16 place of each rank in each of `preference_orders`.
        node_weight: price of a node beside a rank.
        mark_X: (R + N + 1,) int64, the last mark of each rank and node, and the present one.
    """

    asked_TX: np.ndarray
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


def rule_on(ids_TK: np.ndarray, node_R: np.ndarray, node_weight: float, near_T: np.ndarray | None = None) -> Rule:
    """The rule for these tokens where they are: at home, t mod R, unless said (-1 = unknown). Not for two threads."""
    ranks, near_T = len(node_R), np.arange(len(ids_TK)) % len(node_R) if near_T is None else near_T
    asked_TX = np.concatenate([ids_TK, near_T[:, None]], axis=1).astype(np.int16)
    marks = np.zeros(ranks + int(node_R[-1]) + 2, np.int64)
    return Rule(asked_TX, ranks + np.asarray(node_R, np.int64), preference_places(ranks), float(node_weight), marks)


def unserved(rule: Rule) -> Served:
    """Tables for `replay`, empty."""
    tokens, ranks = len(rule.asked_TX), len(rule.node_R)
    return Served(np.zeros(tokens), np.full((tokens, rule.asked_TX.shape[1] - 1), -1, np.int16), np.zeros(ranks))


@njit(cache=True, nogil=True, inline="always")
def serve(t, asked_TX, node_R, place_PR, weight, mark_X, count_E, rank_EH, held_ER, rank_K):  # type: ignore[no-untyped-def]
    """d + weight * dn of token t; writes the rank of every expert to `rank_K`.

    Plain arrays, and inlined: taking them from a tuple for every token would cost as much as the rule (counted
    references).
    """
    stamp, top_k = mark_X[-1] + 1, len(rank_K)
    mark_X[-1] = stamp
    ranks, nodes, remaining = 0, 0, 0
    for k in range(top_k):
        e = asked_TX[t, k]
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
        remaining -= _serve_where_in_use(t, asked_TX, mark_X, count_E, rank_EH, place_R, rank_K)
        while remaining > 0:
            best, held = _best_rank(t, asked_TX, node_R, mark_X, count_E, rank_EH, held_ER, place_R, rank_K)
            remaining -= held
            mark_X[best] = stamp
            ranks += 1
            if mark_X[node_R[best]] != stamp:
                mark_X[node_R[best]] = stamp
                nodes += 1
            for k in range(top_k):
                if asked_TX[t, k] >= 0 and rank_K[k] < 0 and held_ER[asked_TX[t, k], best]:
                    rank_K[k] = best
    return ranks + weight * nodes


@njit(cache=True, nogil=True)
def _serve_where_in_use(t, asked_TX, mark_X, count_E, rank_EH, place_R, rank_K):  # type: ignore[no-untyped-def]
    """Replicated experts that a rank in use holds are served there; returns their number."""
    served, stamp, near = 0, mark_X[-1], asked_TX[t, len(rank_K)]
    for k in range(len(rank_K)):
        e = asked_TX[t, k]
        if e >= 0 and rank_K[k] < 0:
            best = -1
            for i in range(count_E[e]):
                r = rank_EH[e, i]
                if mark_X[r] == stamp and (best < 0 or r == near or (best != near and place_R[r] < place_R[best])):
                    best = r
            if best >= 0:
                served += 1
                rank_K[k] = best
    return served


@njit(cache=True, nogil=True)
def _best_rank(t, asked_TX, node_R, mark_X, count_E, rank_EH, held_ER, place_R, rank_K):  # type: ignore[no-untyped-def]
    """The rank that holds most experts not served yet, on a node in use before others; and how many it holds."""
    best, best_score, stamp, near = -1, -1, mark_X[-1], asked_TX[t, len(rank_K)]
    near_node = node_R[near] if near >= 0 else -1
    for j in range(len(rank_K)):
        if asked_TX[t, j] < 0 or rank_K[j] >= 0:
            continue
        for i in range(count_E[asked_TX[t, j]]):
            r = rank_EH[asked_TX[t, j], i]
            held = 0
            for k in range(len(rank_K)):
                if asked_TX[t, k] >= 0 and rank_K[k] < 0 and held_ER[asked_TX[t, k], r]:
                    held += 1
            score = 4 * held + 2 * (r == near) + (mark_X[node_R[r]] == stamp or node_R[r] == near_node)
            if score > best_score or (score == best_score and place_R[r] < place_R[best]):
                best, best_score = r, score
    return best, best_score // 4


@njit(cache=True, nogil=True)
def replay(rule, holders, served):  # type: ignore[no-untyped-def]
    """Serve every token; returns the sum of costs."""
    asked_TX, node_R, place_PR, weight, mark_X = rule
    rank_EH, count_E, held_ER = holders
    cost_T, rank_TK, load_R = served
    rank_K = np.empty(asked_TX.shape[1] - 1, np.int64)
    total = 0.0
    load_R[:] = 0.0
    for t in range(len(asked_TX)):
        cost_T[t] = serve(t, asked_TX, node_R, place_PR, weight, mark_X, count_E, rank_EH, held_ER, rank_K)
        total += cost_T[t]
        for k in range(len(rank_K)):
            rank_TK[t, k] = rank_K[k]
            if rank_K[k] >= 0:
                load_R[rank_K[k]] += 1.0
    return total


@njit(cache=True, nogil=True)
def gain_of_replicas(rule, holders, gain_ER):  # type: ignore[no-untyped-def]
    """Add to `gain_ER` what a further replica of expert e on rank r saves, exactly for one replica at a time."""
    asked_TX, node_R, place_PR, weight, mark_X = rule
    rank_EH, count_E, held_ER = holders
    rank_K = np.empty(asked_TX.shape[1] - 1, np.int64)
    for t in range(len(asked_TX)):
        serve(t, asked_TX, node_R, place_PR, weight, mark_X, count_E, rank_EH, held_ER, rank_K)
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
                if r != own and mark_X[r] == mark_X[-1] and not held_ER[asked_TX[t, k], r]:
                    gain_ER[asked_TX[t, k], r] += saved


@njit(cache=True, nogil=True)
def follow_owners(rank_TK, near_T, num_ranks):  # type: ignore[no-untyped-def]
    """(T,) int16 rank of each token after a layer: the one that serves most of its experts; ties as in the runtime."""
    count_R, owner_T = np.zeros(num_ranks, np.int64), near_T.copy()
    for t in range(len(rank_TK)):
        most = 0
        for r in rank_TK[t]:
            if r >= 0:
                count_R[r] += 1
                most = max(most, count_R[r])
        if most > 0 and (near_T[t] < 0 or count_R[near_T[t]] < most):
            owner_T[t] = num_ranks
            for r in rank_TK[t]:
                if r >= 0 and count_R[r] == most and r < owner_T[t]:
                    owner_T[t] = r
        for r in rank_TK[t]:
            if r >= 0:
                count_R[r] = 0
    return owner_T
