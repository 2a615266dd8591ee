""" "lpt": balance alone, every layer packed by itself.

From a placement in force, within a cap on moves or at a price for them: repairs of it by more and more moves, the best
of each layer.

Shape letters: L MoE layers, E experts of a layer, S slots per layer.
"""

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.rebalancing.balancing import rebalance_layer
from moeplace.placement.rebalancing.plan import plan
from moeplace.placement.result import Draft
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.search.ties import Ties, ties_of
from moeplace.placement.solvers.judge import Judge


def solve_lpt(problem: Problem, budget: Budget) -> Draft:
    """Every layer by itself: replicate the heaviest experts into the redundant slots, pack, improve by swaps."""
    ties = ties_of(problem)
    if ties is not None and ties.bind and ties.rows_LS.shape[1] == problem.cluster.num_slots:
        return Draft(_repaired(problem, ties))
    slots_LS = np.stack([pack_slots(problem, layer) for layer in range(problem.num_layers)])
    return Draft(slots_LS)


def _repaired(problem: Problem, ties: Ties) -> np.ndarray:
    """(L, S) the start of the ties, each layer rebalanced by as many moves as pay, up to the cap."""
    most = int(min(ties.most_moves, problem.cluster.num_slots))
    limits = [most]
    if ties.price_LE.any():
        limits = sorted({most, *(2**power for power in range(most.bit_length()))})
    drafts = [ties.rows_LS, *(rebalanced(problem, ties, limit) for limit in limits), *_replanned(problem, ties)]
    balance = problem.replace(trace=None, objective="traffic")
    chosen = Judge(balance, ties, None).combine(drafts)
    assert chosen is not None  # rows of one length, and an objective by layer
    return chosen


def _replanned(problem: Problem, ties: Ties) -> list[np.ndarray]:
    """One draft (L, S): what an engine's policy would do from the start within the limit; none on unlike ranks.

    It also takes moves that do not lower the busiest rank at once, and of equal ends the one that moves least.
    """
    cluster = problem.cluster
    nodes = np.arange(cluster.num_ranks) * cluster.num_nodes // cluster.num_ranks
    alike = len(set(cluster.slots_of_rank)) == len(set(cluster.speed_of_rank)) == 1
    alike &= bool((cluster.node_of_rank == nodes).all() and cluster.num_ranks % cluster.num_nodes == 0)
    changed = ties.moves(ties.rows_LS, cluster.rank_of_slot).any()
    if not alike or changed or problem.survive or len(set(problem.experts_per_layer)) > 1:
        return []
    most = None if np.isinf(ties.most_moves) else int(ties.most_moves)
    found = plan(
        problem.load_LE, ranks=cluster.num_ranks, slots_per_rank=int(cluster.slots_of_rank[0]),
        nodes=cluster.num_nodes, previous=ties.rows_LS, max_moves=most,
    )  # fmt: skip
    return [found.slot_to_expert]


def rebalanced(problem: Problem, ties: Ties, max_moves: int | None) -> np.ndarray:
    """(L, S) the start of the ties, each layer balanced down to the load cap by at most so many moves (None = any)."""
    rows_LS, cluster = ties.rows_LS.copy(), problem.cluster
    made_L = ties.moves(rows_LS, cluster.rank_of_slot)
    for layer, count in enumerate(problem.experts_per_layer):
        left = None if max_moves is None else max(max_moves - int(made_L[layer]), 0)
        rebalance_layer(
            rows_LS[layer], np.ascontiguousarray(problem.load_LE[layer, :count]), cluster.slots_of_rank,
            cluster.speed_of_rank, max_moves=left, target=problem.max_imbalance or 1.0,
            min_replicas=problem.survive + 1,
        )  # fmt: skip
    return rows_LS
