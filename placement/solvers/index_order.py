""" "index-order" and "round-robin": what engines do without a plan."""

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.placement import EMPTY_SLOT, index_order
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft


def solve_index_order(problem: Problem, budget: Budget) -> Draft:
    """Experts in the order of their index, in consecutive blocks; redundant slots stay empty."""
    cluster = problem.cluster
    placement = index_order(problem.experts_per_layer, cluster.slots_of_rank, cluster.node_of_rank)
    return Draft(placement.slot_to_expert)


def solve_round_robin(problem: Problem, budget: Budget) -> Draft:
    """Expert e on rank e mod R (the next rank with room where slots are unequal)."""
    capacity_R = problem.cluster.slots_of_rank
    starts_R = np.concatenate([[0], np.cumsum(capacity_R)[:-1]])
    slots = np.full((problem.num_layers, problem.cluster.num_slots), EMPTY_SLOT, np.int32)
    for layer, count in enumerate(problem.experts_per_layer):
        held_R = np.zeros_like(capacity_R)
        rank = 0
        for expert in range(count):
            while held_R[rank] == capacity_R[rank]:
                rank = (rank + 1) % problem.num_ranks
            slots[layer, starts_R[rank] + held_R[rank]] = expert
            held_R[rank] += 1
            rank = (rank + 1) % problem.num_ranks
    return Draft(slots)
