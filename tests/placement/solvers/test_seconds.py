"""`objective="seconds"`: the shortest predicted step, and of those as short the one with least traffic."""

from typing import Any

import numpy as np
import pytest

from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.objective import traffic
from moeplace.placement.problem import Problem
from moeplace.placement.solvers.index_order import solve_index_order
from moeplace.placement.solvers.lpt import solve_lpt
from moeplace.placement.solvers.seconds import AS_FAST, fastest
from moeplace.profiling.synthetic.traces import planted


@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent"])
@pytest.mark.parametrize("seed", range(4))
def test_equal_time_leaves_the_choice_to_traffic(mode: Any, seed: int) -> None:
    """Whatever the searches return: nothing much slower than the fastest, and nothing as fast has less traffic."""
    trace, _ = planted(
        num_tokens=512,
        num_layers=4,
        num_experts=16,
        top_k=1 if mode == "coherent" else 2,
        num_ranks=4,
        epsilon=0.2,
        seed=seed,
    )
    problem = Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=4), mode=mode)
    rng = np.random.default_rng(seed)
    given = [np.stack([rng.permutation(16) for _ in range(4)]) for _ in range(4)]
    searched = iter(given)
    budget = Budget(1e9)
    chosen = problem.evaluate(
        problem.placement(fastest(problem, budget, lambda *_: ([next(searched)], False)).slot_to_expert)
    )
    drafts = [*given, solve_lpt(problem, budget).slot_to_expert, solve_index_order(problem, budget).slot_to_expert]
    others = [problem.evaluate(problem.placement(draft)) for draft in drafts]
    least = min(other.predicted_seconds for other in others)
    assert chosen.predicted_seconds <= least * (1 + AS_FAST)
    as_fast = [traffic(problem, other) for other in others if other.predicted_seconds <= least * (1 + AS_FAST)]
    assert traffic(problem, chosen) == pytest.approx(min(as_fast))
