"""`objective="seconds"`: how much balance a shorter way is worth is not known before, so several load caps compete."""

from collections.abc import Callable, Sequence

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.objective import traffic
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.solvers.index_order import solve_index_order
from moeplace.placement.solvers.lpt import solve_lpt

Search = Callable[[Problem, Budget, float | None, float], tuple[np.ndarray, bool]]
"""(problem, budget, load cap, share of the budget) -> (slots (L, S), whether the clock cut it short)."""
_CAPS = (1.01, 1.05, 1.15, None)
AS_FAST = 0.005
"""Predicted times that differ by less are the same: predictions err by several times as much."""


def fastest(problem: Problem, budget: Budget, search: Search) -> Draft:
    """Solve for several load caps; keep the shortest predicted step, of those as short the one with least traffic.

    Index order and packing compete too.
    """
    hardest = problem.max_imbalance
    caps = [c for c in _CAPS if hardest is None or (c is not None and c <= hardest)] or [hardest]
    drafts = [solve_lpt(problem, budget).slot_to_expert]
    if hardest is None:
        drafts.append(solve_index_order(problem, budget).slot_to_expert)
    cut = False
    for cap in caps:
        if budget.expired:
            cut = True
            break
        slots_LS, shortened = search(problem, budget, cap, 1.0 / len(caps))
        cut |= shortened
        drafts.append(slots_LS)
    return Draft(_best(problem, drafts), "time_limit" if cut else "feasible")


def _best(problem: Problem, drafts: Sequence[np.ndarray]) -> np.ndarray:
    """The draft of least traffic among those whose predicted step is as short as any."""
    evaluations = [problem.evaluate(problem.placement(draft)) for draft in drafts]
    shortest = min(evaluation.predicted_seconds for evaluation in evaluations)
    as_short = [i for i, e in enumerate(evaluations) if e.predicted_seconds <= shortest * (1 + AS_FAST)]
    return drafts[min(as_short, key=lambda i: (traffic(problem, evaluations[i]), evaluations[i].predicted_seconds))]
