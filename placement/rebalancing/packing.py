"""Packing for balance alone: longest first (Graham 1969), replicas to the heaviest, then swaps.

The load of an expert is split evenly over its replicas. Loads of ranks are compared after division by the ranks'
relative speeds, so "balance" means equal time.

Shape letters: E experts of a layer, R ranks, C slots per rank, S slots per layer.
"""

import numpy as np

from moeplace.placement.rebalancing.balancing import rebalance_layer
from moeplace.profiling.kernel_cache import njit

_EMPTY = -1


def pack(load_E: np.ndarray, capacity_R: np.ndarray, speed_R: np.ndarray | None = None) -> np.ndarray:
    """Rank of each expert, (E,) int64, without replicas: longest first, then swaps until the maximum stays.

    Args:
        load_E: (E,) loads.
        capacity_R: (R,) most experts of each rank; their sum is at least E. Ranks fill up evenly.
        speed_R: (R,) relative speeds, 1 by default.
    """
    capacity_R = _even_capacity(len(load_E), np.asarray(capacity_R, np.int64))
    speed = np.ones(len(capacity_R)) if speed_R is None else speed_R
    slots_S = pack_with_replicas(np.asarray(load_E, np.float64), capacity_R, speed)
    rank_E = np.empty(len(load_E), np.int64)
    rank_E[slots_S] = np.repeat(np.arange(len(capacity_R)), capacity_R)
    return rank_E


def pack_with_replicas(
    load_E: np.ndarray, capacity_R: np.ndarray, speed_R: np.ndarray, *, min_replicas: int = 1
) -> np.ndarray:
    """(S,) int32 slot -> expert: all slots used (-1 where no expert can be added), no expert twice on a rank.

    Replicas go to the expert with the largest load per replica, which minimises the largest (DeepSeek EPLB), at most
    one per rank.
    """
    capacity_R = np.asarray(capacity_R, np.int64)
    load_E = np.asarray(load_E, np.float64)
    speed_R = np.asarray(speed_R, np.float64)
    replicas_E = replicate_heaviest(
        load_E, int(np.minimum(capacity_R, len(load_E)).sum()), len(capacity_R), min_replicas
    )
    slots_S = np.full(int(capacity_R.sum()), _EMPTY, np.int32)
    _pack_longest_first(load_E, replicas_E, capacity_R, speed_R, slots_S)
    _fill_holes(slots_S, load_E, capacity_R)
    rebalance_layer(slots_S, load_E, capacity_R, speed_R)
    return slots_S


@njit(cache=True, nogil=True)
def replicate_heaviest(load_E: np.ndarray, num_slots: int, num_ranks: int, min_replicas: int = 1) -> np.ndarray:
    """(E,) int64 replica counts that use `num_slots`: each further replica goes to the largest load per replica."""
    replicas_E = np.full(len(load_E), min_replicas, np.int64)
    for _ in range(num_slots - min_replicas * len(load_E)):
        best = -1
        for e in range(len(load_E)):
            if replicas_E[e] < num_ranks and (best < 0 or load_E[e] * replicas_E[best] > load_E[best] * replicas_E[e]):
                best = e
        if best < 0:
            break
        replicas_E[best] += 1
    return replicas_E


@njit(cache=True, nogil=True)
def _pack_longest_first(load_E, replicas_E, capacity_R, speed_R, slots_S):  # type: ignore[no-untyped-def]
    """Place replicas, heaviest first, on the rank that is done first afterwards, has room and lacks the expert."""
    num_ranks = len(capacity_R)
    starts_R = np.zeros(num_ranks, np.int64)
    for r in range(1, num_ranks):
        starts_R[r] = starts_R[r - 1] + capacity_R[r - 1]
    held_R, time_R = np.zeros(num_ranks, np.int64), np.zeros(num_ranks)
    on_RE = np.zeros((num_ranks, len(load_E)), np.bool_)
    order = np.argsort(-load_E / replicas_E, kind="mergesort")
    for e in order:
        part = load_E[e] / replicas_E[e]
        for _ in range(replicas_E[e]):
            best = -1
            for r in range(num_ranks):
                if held_R[r] == capacity_R[r] or on_RE[r, e]:
                    continue
                if best < 0 or time_R[r] + part / speed_R[r] < time_R[best] + part / speed_R[best]:
                    best = r
            if best < 0:
                _displace(e, on_RE, held_R, capacity_R, starts_R, slots_S)
                continue
            slots_S[starts_R[best] + held_R[best]] = e
            on_RE[best, e] = True
            held_R[best] += 1
            time_R[best] += part / speed_R[best]


@njit(cache=True, nogil=True)
def _displace(e, on_RE, held_R, capacity_R, starts_R, slots_S):  # type: ignore[no-untyped-def]
    """Every rank with room holds `e` already: move some other expert there from a rank without `e`."""
    num_ranks = len(capacity_R)
    for room in range(num_ranks):
        if held_R[room] == capacity_R[room]:
            continue
        for r in range(num_ranks):
            if on_RE[r, e]:
                continue
            for s in range(starts_R[r], starts_R[r] + held_R[r]):
                other = slots_S[s]
                if not on_RE[room, other]:
                    slots_S[starts_R[room] + held_R[room]] = other
                    held_R[room] += 1
                    on_RE[room, other], on_RE[r, other] = True, False
                    slots_S[s] = e
                    on_RE[r, e] = True
                    return


def _fill_holes(slots_S: np.ndarray, load_E: np.ndarray, capacity_R: np.ndarray) -> None:
    """Give slots that found no replica, in place, the largest load per replica among experts that their rank lacks.

    Ranks of unequal room need it: a replica may fit nowhere while others would.
    """
    rank_S = np.repeat(np.arange(len(capacity_R)), capacity_R)
    for slot in np.flatnonzero(slots_S == _EMPTY):
        lacking = np.setdiff1d(np.arange(len(load_E)), slots_S[rank_S == rank_S[slot]])
        if len(lacking):
            count_E = np.bincount(slots_S[slots_S != _EMPTY], minlength=len(load_E))
            slots_S[slot] = lacking[np.argmax(load_E[lacking] / np.maximum(count_E[lacking], 1))]


def _even_capacity(num_experts: int, capacity_R: np.ndarray) -> np.ndarray:
    """Capacities lowered until exactly `num_experts` fit, the largest ones first."""
    capacity = capacity_R.copy()
    while capacity.sum() > num_experts:
        capacity[len(capacity) - 1 - int(capacity[::-1].argmax())] -= 1
    return capacity
