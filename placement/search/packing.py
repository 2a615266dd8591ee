"""Layers of a problem packed for balance alone, with the replicas that survival asks for on as many nodes.

Shape letters: E experts of a layer, R ranks, S slots per layer.
"""

from collections.abc import Callable

import numpy as np

from moeplace.placement.problem import Problem
from moeplace.placement.rebalancing.packing import pack_with_replicas
from moeplace.placement.search.spreading import fill_and_balance, held_on_nodes
from moeplace.profiling.errors import InfeasibleError


def pack_slots(problem: Problem, layer: int) -> np.ndarray:
    """(S,) int32 slot -> expert of one layer, all slots used as far as experts and ranks allow."""
    experts, cluster = int(problem.experts_per_layer[layer]), problem.cluster
    load_E = np.ascontiguousarray(problem.load_LE[layer, :experts])
    replicas = problem.survive + 1
    slots_S = pack_with_replicas(load_E, cluster.slots_of_rank, cluster.speed_of_rank, min_replicas=replicas)
    if replicas > 1:
        nodes = min(replicas, cluster.num_nodes)
        few = np.bincount(slots_S[slots_S >= 0], minlength=experts).min() < replicas
        if few or not spread_over_nodes(slots_S, cluster.rank_of_slot, cluster.node_of_rank, nodes):
            return _placed_by_flow(problem, layer, load_E)
    return slots_S


def _placed_by_flow(problem: Problem, layer: int, load_E: np.ndarray) -> np.ndarray:
    """(S,) slots that keep every expert on its nodes, where swaps from the packed layer find no way.

    Raises:
        InfeasibleError: there is none.
    """
    cluster, replicas = problem.cluster, problem.survive + 1
    held_ER = held_on_nodes(len(load_E), replicas, cluster.slots_of_rank, cluster.node_of_rank)
    if held_ER is None:
        nodes = min(replicas, cluster.num_nodes)
        raise InfeasibleError(
            f"MoE layer {layer}: the slots of {cluster.num_nodes} nodes have no room for {len(load_E)} experts on "
            f"{replicas} ranks of {nodes} nodes each"
        )
    return fill_and_balance(held_ER, load_E, cluster.slots_of_rank, cluster.node_of_rank)


def packed_imbalance(problem: Problem, layer: int) -> float:
    """Imbalance that packing reaches for a layer when loads are split evenly over replicas."""
    speed_R, rank_S = problem.cluster.speed_of_rank, problem.cluster.rank_of_slot
    row_S, load_E = pack_slots(problem, layer), problem.load_LE[layer]
    held = row_S >= 0
    replicas_E = np.maximum(np.bincount(row_S[held], minlength=len(load_E)), 1)
    load_R = np.bincount(rank_S[held], (load_E / replicas_E)[row_S[held]], minlength=len(speed_R))
    mean = load_R.sum() / speed_R.sum()
    return float((load_R / speed_R).max() / mean) if mean else 1.0


def spread_over_nodes(slots_S: np.ndarray, rank_S: np.ndarray, node_R: np.ndarray, nodes: int) -> bool:
    """Swap slots, in place, until every expert is on at least `nodes` nodes; never an expert twice on a rank.

    Returns False where no swap of two slots mends an expert that is on too few nodes.
    """
    node_S = node_R[rank_S]

    def held(expert: int) -> list[int]:
        return np.flatnonzero(slots_S == expert).tolist()

    def ok(expert: int) -> bool:
        return expert < 0 or len({int(node_S[s]) for s in held(expert)}) >= nodes

    for expert in np.unique(slots_S[slots_S >= 0]).tolist():
        while not ok(expert):
            own = held(expert)
            reached = {int(node_S[s]) for s in own}
            spare = [s for s in own if sum(node_S[t] == node_S[s] for t in own) > 1]
            swap = next(
                (
                    (x, y)
                    for y in range(len(slots_S))
                    for x in spare
                    if int(node_S[y]) not in reached and _may_swap(slots_S, rank_S, x, y, ok)
                ),
                None,
            )
            if swap is None:
                return False
            x, y = swap
            slots_S[x], slots_S[y] = slots_S[y], slots_S[x]
    return True


def _may_swap(slots_S: np.ndarray, rank_S: np.ndarray, x: int, y: int, ok: Callable[[int], bool]) -> bool:
    """Whether swapping slots x and y doubles no expert on a rank and does not break the spread of the other one."""
    a, b = int(slots_S[x]), int(slots_S[y])
    if a in slots_S[rank_S == rank_S[y]] or (b >= 0 and b in slots_S[rank_S == rank_S[x]]):
        return False
    was = ok(b)
    slots_S[x], slots_S[y] = b, a
    fine = ok(b) or not was
    slots_S[x], slots_S[y] = a, b
    return fine
