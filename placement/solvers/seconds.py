"""`objective="seconds"`: how much balance a shorter way is worth is not known before, so several load caps compete."""

from collections.abc import Callable

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.solvers.index_order import solve_index_order
from moeplace.placement.solvers.lpt import solve_lpt

Search = Callable[[Problem, Budget, float | None, float], tuple[np.ndarray, bool]]
"""(problem, budget, load cap, share of the budget) -> (slots (L, S), whether the clock cut it short)."""
_CAPS = (1.01, 1.05, 1.15, None)


def fastest(problem: Problem, budget: Budget, search: Search) -> Draft:
    """Solve for several load caps; keep the shortest predicted step. Index order and packing compete too."""
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
    seconds = [problem.evaluate(problem.placement(d)).predicted_seconds for d in drafts]
    return Draft(drafts[int(np.argmin(seconds))], "time_limit" if cut else "feasible")
