""" "lpt": balance alone, every layer packed by itself.

From a placement in force, within a cap on moves or at a price for them: repairs of it by more and more moves, the best
of each layer.

Shape letters: L MoE layers, E experts of a layer, S slots per layer.
"""

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.rebalancing.balancing import rebalance_layer
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
    drafts = [ties.rows_LS, *(rebalanced(problem, ties, limit) for limit in limits)]
    balance = problem.replace(trace=None, objective="traffic")
    chosen = Judge(balance, ties, None).combine(drafts)
    assert chosen is not None  # rows of one length, and an objective by layer
    return chosen


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
