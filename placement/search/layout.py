"""From ranks of experts to slots and back, and the limits that a search keeps to.

Searches without replicas work on `rank_S`: the rank of each of S entries, the first E of which are experts and the
rest empty slots, so that a swap of two entries keeps every rank's number of slots.

Shape letters: L MoE layers, E experts of a layer, R ranks, S slots per layer.
"""

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, slot_starts
from moeplace.placement.problem import Problem
from moeplace.placement.rebalancing.packing import pack

UNLIMITED = np.inf


def packed_start(problem: Problem, layer: int) -> np.ndarray:
    """(S,) int64 start of a search: experts packed by load, empty slots wherever room is left."""
    experts, cluster = int(problem.experts_per_layer[layer]), problem.cluster
    rank_E = pack(problem.load_LE[layer, :experts], cluster.slots_of_rank, cluster.speed_of_rank)
    room_R = cluster.slots_of_rank - np.bincount(rank_E, minlength=cluster.num_ranks)
    return np.concatenate([rank_E, np.repeat(np.arange(cluster.num_ranks), room_R)])


def unreplicated(problem: Problem, layer: int) -> np.ndarray:
    """(S,) int32 slots of a layer packed by load, every expert once."""
    return to_slots(packed_start(problem, layer), int(problem.experts_per_layer[layer]))


def load_limits(problem: Problem, layer: int, start_S: np.ndarray, cap: float | None) -> np.ndarray:
    """(R,) most load of each rank: `cap` times its fair share, or what packing reached if that is more.

    Args:
        start_S: ranks of the packed layer.
        cap: imbalance allowed, None = any.
    """
    cluster = problem.cluster
    if cap is None:
        return np.full(cluster.num_ranks, UNLIMITED)
    load_S = padded_load(problem, layer)
    time_R = np.bincount(start_S, load_S, minlength=cluster.num_ranks) / cluster.speed_of_rank
    fair = load_S.sum() / cluster.speed_of_rank.sum()
    return max(cap * fair, float(time_R.max())) * cluster.speed_of_rank + 1e-9


def padded_load(problem: Problem, layer: int) -> np.ndarray:
    """(S,) load of each entry: experts, then zeros for empty slots."""
    load_S = np.zeros(problem.cluster.num_slots)
    experts = int(problem.experts_per_layer[layer])
    load_S[:experts] = problem.load_LE[layer, :experts]
    return load_S


def to_slots(rank_S: np.ndarray, num_experts: int) -> np.ndarray:
    """(S,) int32 slot -> expert, experts in rising order on every rank, empty slots last."""
    order = np.argsort(rank_S, kind="stable").astype(np.int32)
    return np.where(order < num_experts, order, EMPTY_SLOT).astype(np.int32)


def seat_held(held_ER: np.ndarray, slots_R: np.ndarray) -> np.ndarray:
    """(S,) int32 slot -> expert from a table (E, R) of who holds what: experts in rising order, empty slots last."""
    row_S = np.full(int(slots_R.sum()), EMPTY_SLOT, np.int32)
    for rank, start in enumerate(slot_starts(slots_R)):
        experts = np.flatnonzero(held_ER[:, rank])
        row_S[start : start + len(experts)] = experts
    return row_S


def padded_transitions(problem: Problem) -> np.ndarray:
    """(L-1, S, S) float64 transitions, empty slots without tokens."""
    flow_LEE = problem.transitions_LEE
    slots, experts = problem.cluster.num_slots, flow_LEE.shape[-1]
    padded = np.zeros((len(flow_LEE), slots, slots))
    padded[:, :experts, :experts] = flow_LEE
    return padded
