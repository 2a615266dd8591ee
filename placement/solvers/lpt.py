""" "lpt": balance alone, every layer packed by itself."""

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.search.packing import pack_slots


def solve_lpt(problem: Problem, budget: Budget) -> Draft:
    """Every layer by itself: replicate the heaviest experts into the redundant slots, pack, improve by swaps."""
    slots_LS = np.stack([pack_slots(problem, layer) for layer in range(problem.num_layers)])
    return Draft(slots_LS)
