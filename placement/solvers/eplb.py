""" "eplb": DeepSeek's expert-parallel load balancer, written anew from its description.

Source: DeepSeek EPLB (2025), its README. Shape letters: L MoE layers, E experts, R ranks, N nodes, C slots per rank,
S = R * C slots per layer.

    replicate   S - E times: one more replica for the expert of largest load / replicas
    pack        longest first: the heaviest item goes to the lightest bin with room, equal numbers of items per bin
    global      replicate all experts, pack the replicas onto ranks
    hierarchical  (expert groups divide by nodes) pack expert groups onto nodes; inside each node replicate its experts
                  over the node's slots and pack the replicas onto the node's ranks

The peer puts two replicas of an expert on one rank freely. A `Placement` cannot, because the second one is wasted:
such a slot is re-pointed to the expert of largest load per replica that the rank does not hold.
"""

import warnings

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.placement import EMPTY_SLOT
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.profiling.errors import InputError, MoeplaceWarning
from moeplace.profiling.kernel_cache import njit


def solve_eplb(problem: Problem, budget: Budget, *, num_groups: int | None = None) -> Draft:
    """Replicate the heaviest and pack, layer by layer; blind to traffic, previous placement, speeds and caps.

    Args:
        problem: ranks with unequal slots, and experts that do not divide, are handled by the global policy.
        budget: unused, it takes milliseconds.
        num_groups: expert groups of the router; by default one per node where they divide, which selects the
            hierarchical policy on several nodes.
    """
    cluster = problem.cluster
    slots = np.full((problem.num_layers, cluster.num_slots), EMPTY_SLOT, np.int32)
    even = np.ptp(cluster.slots_of_rank) == 0 and np.ptp(cluster.ranks_per_node) == 0
    repointed = 0
    for layer, count in enumerate(problem.experts_per_layer):
        load_E = np.ascontiguousarray(problem.load_LE[layer, :count])
        groups = num_groups or (cluster.num_nodes if count % cluster.num_nodes == 0 else 1)
        if even and count % groups == 0 and groups % cluster.num_nodes == 0 and cluster.num_nodes > 1:
            row_S = _hierarchical(load_E, cluster.num_slots, groups, cluster.num_nodes, cluster.num_ranks)
        else:
            row_S = _global(load_E, cluster.slots_of_rank)
        repointed += _repoint(row_S, load_E, cluster.slots_of_rank)
        slots[layer] = row_S
    notes: tuple[str, ...] = ()
    if repointed:
        notes = (f"{repointed} slots would have held an expert twice on a rank and were re-pointed to another",)
    return Draft(slots, notes=notes)


def rebalance_experts(
    load_LE: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int
) -> tuple[np.ndarray, np.ndarray]:
    """The peer's own function: slots of all layers, duplicates on a rank included.

    Args:
        load_LE: (L, E) load.
        num_slots: S, a multiple of `num_ranks`.
        num_groups: expert groups, a divisor of E. If they do not divide by `num_nodes` the global policy runs.
        num_nodes: N, a divisor of `num_ranks`.
        num_ranks: R.

    Returns:
        slot_to_expert (L, S) int64 and replica counts (L, E) int64.

    Raises:
        InputError: the numbers do not divide.
    """
    load_LE = np.atleast_2d(np.asarray(load_LE, dtype=np.float64))
    experts = load_LE.shape[1]
    for name, value, divisor_name, divisor in (
        ("experts", experts, "expert groups", num_groups),
        ("ranks", num_ranks, "nodes", num_nodes),
        ("slots per layer", num_slots, "ranks", num_ranks),
    ):
        if divisor < 1 or value % divisor:
            raise InputError(f"{name} ({value}) must be a multiple of {divisor_name} ({divisor})")
    if num_slots < experts:
        raise InputError(f"slots per layer ({num_slots}) must be at least the experts ({experts})")
    if num_groups % num_nodes:
        warnings.warn(
            f"expert groups ({num_groups}) do not divide by nodes ({num_nodes}): the global policy is used",
            MoeplaceWarning,
            stacklevel=2,
        )
        num_groups = num_nodes = 1
    rows = [_hierarchical(load_E, num_slots, num_groups, num_nodes, num_ranks) for load_E in load_LE]
    slots_LS = np.stack(rows)
    counts_LE = np.stack([np.bincount(row, minlength=experts) for row in rows])
    return slots_LS, counts_LE


@njit(cache=True, nogil=True)
def _replicate(load_E: np.ndarray, num_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Expert of each replica (num_slots,), every expert first, and replica counts (E,)."""
    num_experts = len(load_E)
    expert_S = np.empty(num_slots, np.int64)
    expert_S[:num_experts] = np.arange(num_experts)
    count_E = np.ones(num_experts, np.int64)
    share_E = load_E.copy()
    for slot in range(num_experts, num_slots):
        heaviest = np.argmax(share_E)
        expert_S[slot] = heaviest
        count_E[heaviest] += 1
        share_E[heaviest] = load_E[heaviest] / count_E[heaviest]
    return expert_S, count_E


@njit(cache=True, nogil=True)
def _pack(load_I: np.ndarray, capacity_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longest first: bin of each item and its position there; ties by item index, then by bin index."""
    bin_I, position_I = np.empty((2, len(load_I)), np.int64)
    load_B, held_B = np.zeros(len(capacity_B)), np.zeros(len(capacity_B), np.int64)
    one_each = (capacity_B == 1).all() and len(capacity_B) == len(load_I)
    order = np.arange(len(load_I)) if one_each else np.argsort(-load_I, kind="mergesort")
    for item in order:
        best = -1
        for b in range(len(capacity_B)):
            if held_B[b] < capacity_B[b] and (best < 0 or load_B[b] < load_B[best]):
                best = b
        if one_each:
            best = item
        bin_I[item] = best
        position_I[item] = held_B[best]
        load_B[best] += load_I[item]
        held_B[best] += 1
    return bin_I, position_I


@njit(cache=True, nogil=True)
def _global(load_E: np.ndarray, capacity_R: np.ndarray) -> np.ndarray:
    """Slots of one layer (S,) int64: replicate over all slots, pack onto ranks."""
    num_slots = capacity_R.sum()
    expert_S, count_E = _replicate(load_E, num_slots)
    rank_S, position_S = _pack((load_E / count_E)[expert_S], capacity_R)
    start_R = np.cumsum(capacity_R) - capacity_R
    row_S = np.empty(num_slots, np.int64)
    row_S[start_R[rank_S] + position_S] = expert_S
    return row_S


@njit(cache=True, nogil=True)
def _hierarchical(load_E: np.ndarray, num_slots: int, num_groups: int, num_nodes: int, num_ranks: int) -> np.ndarray:
    """Slots of one layer (S,) int64: groups to nodes, then the global policy inside each node."""
    size = len(load_E) // num_groups
    group_load = load_E.reshape(num_groups, size).sum(axis=1)
    node_G, position_G = _pack(group_load, np.full(num_nodes, num_groups // num_nodes))
    capacity_R = np.full(num_ranks // num_nodes, num_slots // num_ranks)
    per_node = num_slots // num_nodes
    row_S = np.empty(num_slots, np.int64)
    for node in range(num_nodes):
        held = np.empty(len(load_E) // num_nodes, np.int64)
        for group in range(num_groups):
            if node_G[group] == node:
                at = position_G[group] * size
                held[at : at + size] = group * size + np.arange(size)
        row_S[node * per_node : (node + 1) * per_node] = held[_global(load_E[held], capacity_R)]
    return row_S


@njit(cache=True, nogil=True)
def _repoint(row_S: np.ndarray, load_E: np.ndarray, capacity_R: np.ndarray) -> int:
    """Re-point every slot that repeats an expert of its rank, in place; returns how many there were.

    A slot stays empty (-1) on a rank that already holds every expert.
    """
    count_E = np.zeros(len(load_E), np.int64)
    for expert in row_S:
        count_E[expert] += 1
    repointed, start = 0, 0
    for slots in capacity_R:
        held_E = np.zeros(len(load_E), np.bool_)
        for slot in range(start, start + slots):
            if not held_E[row_S[slot]]:
                held_E[row_S[slot]] = True
                continue
            repointed += 1
            count_E[row_S[slot]] -= 1
            row_S[slot] = -1
        for slot in range(start, start + slots):
            if row_S[slot] >= 0:
                continue
            best = -1
            for expert in range(len(load_E)):
                if held_E[expert]:
                    continue
                if best < 0 or load_E[expert] / count_E[expert] > load_E[best] / count_E[best]:
                    best = expert
            if best < 0:
                break
            row_S[slot] = best
            held_E[best] = True
            count_E[best] += 1
        start += slots
    return repointed
