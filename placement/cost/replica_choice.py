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
from typing import NamedTuple

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


@lru_cache(maxsize=16)
def preference_places(num_ranks: int) -> np.ndarray:
    """(P, R) int16, read-only: the place of each rank in each of `preference_orders`."""
    places_PR = np.argsort(preference_orders(num_ranks), axis=1).astype(np.int16)
    places_PR.flags.writeable = False
    return places_PR


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
    holders = find_holders(copies_ER)
    places_PR = preference_places(copies_ER.shape[1])
    _choose_ranks(ids_TK, copies_ER, holders, node_R, near_T, rotation_T, places_PR, rank_TK)


class Holders(NamedTuple):
    """The ranks that hold each expert.

    Attributes:
        rank_EH: (E, H) int16 ranks in ascending order, -1 after the last.
        count_E: (E,) int16 how many.
    """

    rank_EH: np.ndarray
    count_E: np.ndarray


def find_holders(copies_ER: np.ndarray) -> Holders:
    """From the table (E, R) 0/1 of which rank holds which expert."""
    count_E = (copies_ER > 0).sum(axis=1)
    rank_EH = np.argsort(copies_ER == 0, axis=1, kind="stable")[:, : max(int(count_E.max(initial=0)), 1)]
    beyond_EH = np.arange(rank_EH.shape[1]) >= count_E[:, None]
    return Holders(np.where(beyond_EH, -1, rank_EH).astype(np.int16), count_E.astype(np.int16))


@njit(cache=True, nogil=True)
def _choose_ranks(ids_TK, copies_ER, holders, node_R, near_T, rotation_T, places_PR, rank_TK):  # type: ignore[no-untyped-def]
    top_k = ids_TK.shape[1]
    used_R = np.zeros(copies_ER.shape[1], np.bool_)
    node_used_N = np.zeros(node_R[-1] + 1, np.bool_)
    for t in range(ids_TK.shape[0]):
        remaining = 0
        for k in range(top_k):
            e = ids_TK[t, k]
            rank_TK[t, k] = -1
            if e >= 0:
                if holders.count_E[e] == 1:
                    r = holders.rank_EH[e, 0]
                    rank_TK[t, k] = r
                    used_R[r] = True
                    node_used_N[node_R[r]] = True
                else:
                    remaining += 1
        if remaining:
            place_R = places_PR[rotation_T[t] % len(places_PR)]
            _cover(
                ids_TK[t], copies_ER, holders, node_R, near_T[t], place_R, rank_TK[t], used_R, node_used_N, remaining
            )
        for k in range(top_k):
            r = rank_TK[t, k]
            if r >= 0:
                used_R[r] = False
                node_used_N[node_R[r]] = False
        if near_T[t] >= 0:
            node_used_N[node_R[near_T[t]]] = False


@njit(cache=True, nogil=True)
def _cover(ids_K, copies_ER, holders, node_R, near, place_R, rank_K, used_R, node_used_N, remaining):  # type: ignore[no-untyped-def]
    """Rules 2 and 3. Only ranks that hold one of the experts are looked at, however many ranks there are."""
    top_k = len(ids_K)
    for k in range(top_k):  # rule 2
        e = ids_K[k]
        if e < 0 or rank_K[k] >= 0:
            continue
        if near >= 0 and used_R[near] and copies_ER[e, near]:
            rank_K[k] = near
            remaining -= 1
            continue
        best = -1
        for i in range(holders.count_E[e]):
            r = holders.rank_EH[e, i]
            if used_R[r] and (best < 0 or place_R[r] < place_R[best]):
                best = r
        if best >= 0:
            rank_K[k] = best
            remaining -= 1
    if near >= 0:
        node_used_N[node_R[near]] = True
    while remaining > 0:  # rule 3
        best, best_score = -1, -1
        for own in range(top_k):
            if ids_K[own] < 0 or rank_K[own] >= 0:
                continue
            for i in range(holders.count_E[ids_K[own]]):
                r = holders.rank_EH[ids_K[own], i]
                held = 0
                for k in range(top_k):
                    if ids_K[k] >= 0 and rank_K[k] < 0 and copies_ER[ids_K[k], r]:
                        held += 1
                score = 4 * held + (2 if r == near else 0) + (1 if node_used_N[node_R[r]] else 0)
                if score > best_score or (score == best_score and place_R[r] < place_R[best]):
                    best, best_score = r, score
        used_R[best] = True
        node_used_N[node_R[best]] = True
        for k in range(top_k):
            if ids_K[k] >= 0 and rank_K[k] < 0 and copies_ER[ids_K[k], best]:
                rank_K[k] = best
                remaining -= 1
