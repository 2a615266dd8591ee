"""Balanced replica choice: as few ranks as the default rule takes, and what that leaves open split by the load so far.

The rank that sends a token (its home or owner) keeps, for each layer, the load that it has sent to every rank so far,
in units of 1 / UNIT assignments, and fades it over HORIZON tokens. Its tokens of one pass are a batch, and are decided
together, from what is known before any of them is:

1. An expert with a single slot is served there. A = the ranks in use so far.
2. While a token has experts that no rank of A holds, the rank that holds most of those joins A. Ties go to `near`, then
   to a rank whose node is near's or already in use; what is still tied is shared out.
3. A replicated expert is served by a rank of A that holds it; among several it is shared out.
4. The load so far becomes (load so far + UNIT * what the batch sends) * HORIZON // (HORIZON + tokens of the batch).

Sharing out among a set C of ranks takes rank r with a chance in proportion to its room

    room(r) = max(0, |C| s + sum of b over C - |C| b(r))

where b(r) is the load so far and UNIT for each assignment that rule 1 gives r in this batch, and s = UNIT times the
assignments of replicated experts in the batch, by rank, rounded up. If two ranks hold the same experts, their loads are
then level after the batch, as far as its tokens can. The chance is drawn without a generator: token number n (its index
in the step) has fraction

    u(n, i) = ((n * 2K + i) * 2654435769 mod 2^32) >> 16,    i = k in rule 3 for its k-th expert, K + j for the j-th
                                                             rank (0, 1, ...) that joins in rule 2

and the first rank in rising order is taken at which the sum of rooms so far times 2^16 exceeds u times all room. All of
it is integers, so that every machine decides alike.

Without its load so far a batch of eight tokens could balance nothing: one is served here, the next time another there.

Shape letters: T tokens, E experts, K top-k, R ranks, G batches, A ranks that send.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.cost.replica_choice import Holders, find_holders
from moeplace.profiling.kernel_cache import njit

UNIT = 256
"""Of an assignment in the load so far: fading rounds less."""
HORIZON = 4096
"""Tokens of a rank over which the load so far fades to half."""
MULTIPLIER = 2654435769
"""floor(2^32 / golden ratio): its multiples are spread evenly."""
FRACTION_BITS = 16


class Sent(NamedTuple):
    """Which tokens are decided together.

    Attributes:
        sender_T: (T,) rank that sends each token.
        step_T: (T,) rising number of its step.
        number_T: (T,) its index in the step.
    """

    sender_T: np.ndarray
    step_T: np.ndarray
    number_T: np.ndarray


class _Batches(NamedTuple):
    order_T: np.ndarray
    """(T,) tokens by batch."""
    first_G: np.ndarray
    """(G + 1,) where each batch starts among them."""
    sender_G: np.ndarray
    """(G,) rank that sends it."""


class _Layer(NamedTuple):
    copies_ER: np.ndarray
    holders: Holders
    node_R: np.ndarray


def choose_balanced(
    ids_TK: np.ndarray, copies_ER: np.ndarray, node_R: np.ndarray, near_T: np.ndarray, sent: Sent, rank_TK: np.ndarray
) -> None:
    """Write the serving rank of every (token, slot of top-k) to `rank_TK`; -1 where `ids_TK` is -1.

    Args:
        ids_TK: (T, K) integer expert ids, -1 = none.
        copies_ER: (E, R) 0/1, which rank holds which expert.
        node_R: (R,) node of each rank.
        near_T: (T,) rank where each token now is, -1 = unknown.
        sent: batches; nothing has been sent before the first.
        rank_TK: (T, K) integer output.
    """
    tokens, ranks = len(ids_TK), len(node_R)
    layer = _Layer(np.ascontiguousarray(copies_ER, np.bool_), find_holders(copies_ER), np.array(node_R, np.int64))
    key_T = sent.step_T.astype(np.int64) * ranks + sent.sender_T
    order_T = np.argsort(key_T, kind="stable")
    first_G = np.flatnonzero(np.diff(key_T[order_T], prepend=-1))
    batches = _Batches(order_T, np.append(first_G, tokens), key_T[order_T][first_G] % ranks)
    # One type each, so that whoever asks, the kernel is compiled once.
    served_TK = np.empty(ids_TK.shape, np.int32)
    _choose_balanced(
        np.ascontiguousarray(ids_TK, np.int32), layer, batches, near_T.astype(np.int64), sent.number_T.astype(np.int64),
        served_TK,
    )  # fmt: skip
    rank_TK[:] = served_TK


class _Scratch(NamedTuple):
    used_R: np.ndarray
    """(R,) bool, ranks in A; false everywhere between tokens."""
    rank_A: np.ndarray
    """(K,) those ranks."""
    tied_R: np.ndarray
    """(R,) ranks that are tied, in rising order."""
    open_K: np.ndarray
    """(K,) bool, experts that no rank of A holds."""


@njit(cache=True, nogil=True)
def _choose_balanced(ids_TK, layer, batches, near_T, number_T, rank_TK):  # type: ignore[no-untyped-def]
    ranks, top_k = len(layer.node_R), ids_TK.shape[1]
    carried_AR = np.zeros((ranks, ranks), np.int64)
    scratch = _Scratch(
        np.zeros(ranks, np.bool_), np.zeros(top_k, np.int64), np.zeros(ranks, np.int64), np.zeros(top_k, np.bool_)
    )
    for g in range(len(batches.sender_G)):
        carried_R = carried_AR[batches.sender_G[g]]
        batch = batches.order_T[batches.first_G[g] : batches.first_G[g + 1]]
        base_R, share, tokens = carried_R.copy(), 0, 0
        for t in batch:
            alone = True
            for k in range(top_k):
                e = ids_TK[t, k]
                rank_TK[t, k] = -1
                if e >= 0:
                    alone = False
                    if layer.holders.count_E[e] == 1:
                        rank_TK[t, k] = layer.holders.rank_EH[e, 0]
                        base_R[rank_TK[t, k]] += UNIT
                    else:
                        share += UNIT
            tokens += not alone
        share = -(-share // ranks)
        for t in batch:
            _serve(ids_TK[t], layer, near_T[t], number_T[t] * 2 * top_k, base_R, share, rank_TK[t], scratch)
            for k in range(top_k):
                if rank_TK[t, k] >= 0:
                    carried_R[rank_TK[t, k]] += UNIT
        for r in range(ranks):
            carried_R[r] = carried_R[r] * HORIZON // (HORIZON + tokens)


@njit(cache=True, nogil=True)
def _serve(ids_K, layer, near, draw, base_R, share, rank_K, scratch):  # type: ignore[no-untyped-def]
    """Rules 2 and 3 for one token."""
    used_R, rank_A, tied_R, _ = scratch
    holders, top_k, used, joined = layer.holders, len(ids_K), 0, 0
    for k in range(top_k):
        if rank_K[k] >= 0 and not used_R[rank_K[k]]:
            used_R[rank_K[k]] = True
            rank_A[used] = rank_K[k]
            used += 1
    while True:
        tied = _find_tied(ids_K, layer, near, used, scratch)
        if tied == 0:
            break
        rank_A[used] = _share_out(tied_R[:tied], base_R, share, draw + top_k + joined)
        used_R[rank_A[used]] = True
        used += 1
        joined += 1
    for k in range(top_k):
        e = ids_K[k]
        if e >= 0 and holders.count_E[e] > 1:
            tied = 0
            for i in range(holders.count_E[e]):
                if used_R[holders.rank_EH[e, i]]:
                    tied_R[tied] = holders.rank_EH[e, i]
                    tied += 1
            rank_K[k] = _share_out(tied_R[:tied], base_R, share, draw + k)
    for a in range(used):
        used_R[rank_A[a]] = False


@njit(cache=True, nogil=True)
def _find_tied(ids_K, layer, near, used, scratch):  # type: ignore[no-untyped-def]
    """Write the ranks that are tied for joining A to `tied_R`; returns their number, 0 if A holds every expert."""
    used_R, rank_A, tied_R, open_K = scratch
    copies_ER, holders, node_R, best, tied = layer.copies_ER, layer.holders, layer.node_R, -1, 0
    for k in range(len(ids_K)):
        open_K[k] = ids_K[k] >= 0
        for i in range(holders.count_E[ids_K[k]] if open_K[k] else 0):
            if used_R[holders.rank_EH[ids_K[k], i]]:
                open_K[k] = False
                break
    for own in range(len(ids_K)):
        for i in range(holders.count_E[ids_K[own]] if open_K[own] else 0):
            r = holders.rank_EH[ids_K[own], i]
            held = 0
            for k in range(len(ids_K)):
                if open_K[k] and copies_ER[ids_K[k], r]:
                    held += 1
            node_in_use = near >= 0 and node_R[near] == node_R[r]
            for a in range(used):
                node_in_use = node_in_use or node_R[rank_A[a]] == node_R[r]
            score = 4 * held + (2 if r == near else 0) + (1 if node_in_use else 0)
            if score > best:
                best, tied = score, 0
            if score == best:
                tied = _insert(r, tied_R, tied)
    return tied


@njit(cache=True, nogil=True)
def _insert(rank, tied_R, tied):  # type: ignore[no-untyped-def]
    """Put a rank among those that are tied, unless it is there; returns their number."""
    place = tied
    while place > 0 and tied_R[place - 1] > rank:
        place -= 1
    if place > 0 and tied_R[place - 1] == rank:
        return tied
    for i in range(tied, place, -1):
        tied_R[i] = tied_R[i - 1]
    tied_R[place] = rank
    return tied + 1


@njit(cache=True, nogil=True)
def _share_out(tied_C, base_R, share, draw):  # type: ignore[no-untyped-def]
    """The rank that the draw takes of those tied."""
    level, room = len(tied_C) * share, 0
    for r in tied_C:
        level += base_R[r]
    for r in tied_C:
        room += max(0, level - len(tied_C) * base_R[r])
    aim, passed = (draw * MULTIPLIER & 0xFFFFFFFF) >> FRACTION_BITS, 0
    for r in tied_C:
        passed += max(0, level - len(tied_C) * base_R[r])
        if passed << FRACTION_BITS > aim * room:
            return r
    return tied_C[-1]
