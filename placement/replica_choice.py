"""Replica choice: which rank serves each expert of a token, when experts have several slots.

The rule, per token and layer, for its set of experts, a rank `near` where the token now is (-1 = unknown) and a
rotation number (any number that varies over tokens, so that ties spread evenly):

1. An expert with a single slot is served there. A = the ranks in use so far.
2. A replicated expert held by a rank of A is served by such a rank: `near` if it is one, else the first in rotated
   order (the least `(rank - rotation) mod R`). A token is sent to a rank once, so this costs no traffic.
3. While experts remain, the rank that holds most of them joins A and serves them. Ties go to `near`, then to a rank
   whose node is near's or already in use, then to the first in rotated order.

It is stateless, so that every rank can apply it to its own tokens without talking to others: the greedy cover of the
token's set by ranks (nearest first), spread evenly where cover leaves a choice.

Shape letters: T tokens, E experts, K top-k, R ranks.
"""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
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
            _cover(ids_TK[t], copies_ER, node_R, near_T[t], rotation_T[t], rank_TK[t], used_R, node_used_N, remaining)
        for k in range(top_k):
            r = rank_TK[t, k]
            if r >= 0:
                used_R[r] = False
                node_used_N[node_R[r]] = False
        if near_T[t] >= 0:
            node_used_N[node_R[near_T[t]]] = False


@njit(cache=True, nogil=True)
def _cover(ids_K, copies_ER, node_R, near, rotation, rank_K, used_R, node_used_N, remaining):  # type: ignore[no-untyped-def]
    num_ranks = len(used_R)
    top_k = len(ids_K)
    start = rotation % num_ranks
    for k in range(top_k):  # rule 2
        e = ids_K[k]
        if e < 0 or rank_K[k] >= 0:
            continue
        if near >= 0 and used_R[near] and copies_ER[e, near]:
            rank_K[k] = near
            remaining -= 1
            continue
        for i in range(num_ranks):
            r = (start + i) % num_ranks
            if used_R[r] and copies_ER[e, r]:
                rank_K[k] = r
                remaining -= 1
                break
    if near >= 0:
        node_used_N[node_R[near]] = True
    while remaining > 0:  # rule 3
        best, best_score = -1, -1
        for i in range(num_ranks):
            r = (start + i) % num_ranks
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
