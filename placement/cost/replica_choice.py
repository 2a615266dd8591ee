"""Replica choice: which rank serves each expert of a token, when experts have several slots.

The rule, per token and layer, for its set of experts, a rank `near` where the token now is (-1 = unknown) and a
rotation number (any number that varies over tokens, so that ties spread evenly). The rotation number picks an order of
the ranks from the table of `preference_orders`, in which every rank comes before every other equally often:

1. An expert with a single slot is served there. A = the ranks in use so far.
2. A replicated expert held by a rank of A is served by such a rank: `near` if it is one, else the first in that order.
   A token is sent to a rank once, so this costs no traffic.
3. While experts remain, the rank that holds most of them joins A and serves them. Ties go to `near`, then to a rank
   whose node is near's or already in use, then to the first in the order.

It is stateless, so that every rank can apply it to its own tokens without talking to others: the greedy cover of the
token's set by ranks (nearest first), spread evenly where cover leaves a choice.

Shape letters: T tokens, E experts, K top-k, R ranks, P orders of ranks.
"""

from functools import lru_cache
from math import lcm

import numpy as np

from moeplace.profiling.kernel_cache import njit

NUM_ORDERS = 4096
"""P: rotation numbers count modulo P."""


@lru_cache(maxsize=16)
def preference_orders(num_ranks: int) -> np.ndarray:
    """(P, R) int16, read-only: the ranks in the order that each rotation number prefers them in.

    Even rows are shuffles by a fixed hash (the finaliser of MurmurHash3, so that every machine has the same table);
    each odd row is the reverse of the row before: of two ranks each is preferred exactly half of the time.
    """
    key_PR = np.arange(NUM_ORDERS // 2 * num_ranks, dtype=np.uint64).reshape(-1, num_ranks) + np.uint64(1)
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        key_PR = (key_PR ^ (key_PR >> np.uint64(33))) * np.uint64(multiplier)
    key_PR ^= key_PR >> np.uint64(33)
    shuffled_PR = np.argsort(key_PR, axis=1, kind="stable")
    orders_PR = np.stack([shuffled_PR, shuffled_PR[:, ::-1]], axis=1).reshape(-1, num_ranks).astype(np.int16)
    orders_PR.flags.writeable = False
    return orders_PR


def home_first_orders(num_ranks: int) -> np.ndarray:
    """(P', R) int16: `preference_orders` with the home of token t, rank t mod R, before all others.

    P' is the least multiple of R and 64 from P on, so that row t mod P' is that of token t: exactly while t < P or R
    divides P; beyond that the home is right and the others come in the order of another token.
    """
    period = lcm(num_ranks, 64)
    rows = np.arange(-(-NUM_ORDERS // period) * period)
    orders_PR = preference_orders(num_ranks)[rows % NUM_ORDERS]
    is_other_PR = orders_PR != (rows % num_ranks)[:, None]
    return np.take_along_axis(orders_PR, np.argsort(is_other_PR, axis=1, kind="stable"), axis=1)


def choose_ranks(
    ids_TK: np.ndarray,
    copies_ER: np.ndarray,
    node_R: np.ndarray,
    near_T: np.ndarray,
    rotation_T: np.ndarray,
    rank_TK: np.ndarray,
) -> None:
    """Write the serving rank of every (token, slot of top-k) to `rank_TK`; -1 where `ids_TK` is -1.

    Args:
        ids_TK: (T, K) integer expert ids, -1 = none.
        copies_ER: (E, R) 0/1, which rank holds which expert.
        node_R: (R,) node of each rank.
        near_T: (T,) rank where each token now is, -1 = unknown.
        rotation_T: (T,) non-negative numbers.
        rank_TK: (T, K) integer output.
    """
    orders_PR = preference_orders(copies_ER.shape[1])
    _choose_ranks(ids_TK, copies_ER, node_R, near_T, rotation_T, orders_PR, rank_TK)


@njit(cache=True, nogil=True)
def _choose_ranks(ids_TK, copies_ER, node_R, near_T, rotation_T, orders_PR, rank_TK):  # type: ignore[no-untyped-def]
    num_experts, num_ranks = copies_ER.shape
    top_k = ids_TK.shape[1]
    replicas_E = np.zeros(num_experts, np.int64)
    first_E = np.zeros(num_experts, np.int64)
    for e in range(num_experts):
        for r in range(num_ranks - 1, -1, -1):
            if copies_ER[e, r]:
                replicas_E[e] += 1
                first_E[e] = r
    used_R = np.zeros(num_ranks, np.bool_)
    node_used_N = np.zeros(node_R[-1] + 1, np.bool_)
    for t in range(ids_TK.shape[0]):
        remaining = 0
        for k in range(top_k):
            e = ids_TK[t, k]
            rank_TK[t, k] = -1
            if e >= 0:
                if replicas_E[e] == 1:
                    r = first_E[e]
                    rank_TK[t, k] = r
                    used_R[r] = True
                    node_used_N[node_R[r]] = True
                else:
                    remaining += 1
        if remaining:
            order_R = orders_PR[rotation_T[t] % len(orders_PR)]
            _cover(ids_TK[t], copies_ER, node_R, near_T[t], order_R, rank_TK[t], used_R, node_used_N, remaining)
        for k in range(top_k):
            r = rank_TK[t, k]
            if r >= 0:
                used_R[r] = False
                node_used_N[node_R[r]] = False
        if near_T[t] >= 0:
            node_used_N[node_R[near_T[t]]] = False


@njit(cache=True, nogil=True)
def _cover(ids_K, copies_ER, node_R, near, order_R, rank_K, used_R, node_used_N, remaining):  # type: ignore[no-untyped-def]
    top_k = len(ids_K)
    for k in range(top_k):  # rule 2
        e = ids_K[k]
        if e < 0 or rank_K[k] >= 0:
            continue
        if near >= 0 and used_R[near] and copies_ER[e, near]:
            rank_K[k] = near
            remaining -= 1
            continue
        for r in order_R:
            if used_R[r] and copies_ER[e, r]:
                rank_K[k] = r
                remaining -= 1
                break
    if near >= 0:
        node_used_N[node_R[near]] = True
    while remaining > 0:  # rule 3
        best, best_score = -1, -1
        for r in order_R:
            held = 0
            for k in range(top_k):
                if ids_K[k] >= 0 and rank_K[k] < 0 and copies_ER[ids_K[k], r]:
                    held += 1
            if held == 0:
                continue
            score = 4 * held + (2 if r == near else 0) + (1 if node_used_N[node_R[r]] else 0)
            if score > best_score:
                best, best_score = r, score
        used_R[best] = True
        node_used_N[node_R[best]] = True
        for k in range(top_k):
            if ids_K[k] >= 0 and rank_K[k] < 0 and copies_ER[ids_K[k], best]:
                rank_K[k] = best
                remaining -= 1
