"""`objective="seconds"`: how much balance a shorter way is worth is not known before, so several load caps compete."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moeplace.placement.bounds.problem import held_imbalance
from moeplace.placement.budget import Budget
from moeplace.placement.objective import traffic
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.search.sample import judging_trace
from moeplace.placement.search.ties import Ties
from moeplace.placement.solvers.index_order import solve_index_order
from moeplace.placement.solvers.judge import Judge
from moeplace.placement.solvers.lpt import solve_lpt
from moeplace.placement.solvers.schedule import searches_within
from moeplace.placement.solvers.spare import use_all_slots
from moeplace.profiling.traces.trace import RoutingTrace

Search = Callable[[Problem, Budget, float | None, float, Ties | None], tuple[Sequence[np.ndarray], bool]]
"""(problem, budget, load cap, share of the budget, ties) -> (drafts (L, S), whether the clock cut it short)."""
_CAPS = (1.01, 1.05, 1.15, None)
AS_FAST = 0.005
"""Predicted times that differ by less are the same: predictions err by several times as much."""


def fastest(problem: Problem, budget: Budget, search: Search, ties: Ties | None = None) -> Draft:
    """Solve for several load caps; keep the shortest predicted step, of those as short the one with least traffic.

    Index order and packing compete too.
    """
    hardest = problem.max_imbalance
    caps = [c for c in _CAPS if hardest is None or (c is not None and c <= hardest)] or [hardest]
    caps = caps[-searches_within(problem, 0.5 * budget.time_limit) :]
    drafts = [solve_lpt(problem, budget).slot_to_expert]
    if hardest is None:
        drafts.append(solve_index_order(problem, budget).slot_to_expert)
    cut, in_traffic = False, _priced_in_traffic(problem, ties, budget.time_limit)
    for cap in caps:
        if budget.expired:
            cut = True
            break
        found, shortened = search(problem, budget, cap, 1.0 / len(caps), in_traffic)
        cut |= shortened
        drafts += found
    judge = Judge(problem, ties, held_imbalance(problem), budget.time_limit)
    trace = judging_trace(problem, budget.time_limit)
    slots_LS, note = use_all_slots(problem, drafts, ties, judge, lambda some: _best(problem, trace, judge, some))
    return Draft(slots_LS, "time_limit" if cut else "feasible", notes=(note,) if note else ())


def _best(problem: Problem, trace: RoutingTrace, judge: Judge, drafts: Sequence[np.ndarray]) -> np.ndarray:
    """The draft of least traffic among those that keep the constraints best and whose step is as short as any."""
    keys = [judge.key(draft) for draft in drafts]
    least = min(broken for broken, _, _ in keys)
    shortest = min(seconds for broken, seconds, _ in keys if broken == least)
    as_short = [i for i, key in enumerate(keys) if key[0] == least and key[1] <= shortest * (1 + AS_FAST)]
    evaluations = {i: problem.evaluate(problem.placement(drafts[i]), trace) for i in as_short}
    return drafts[min(as_short, key=lambda i: (traffic(problem, evaluations[i]), keys[i][1]))]


def _priced_in_traffic(problem: Problem, ties: Ties | None, seconds: float) -> Ties | None:
    """The ties with prices for a search that sees traffic alone: a second is worth what the start has of both."""
    if ties is None or not ties.price_LE.any():
        return ties
    evaluation = problem.evaluate(problem.placement(ties.rows_LS), judging_trace(problem, seconds))
    scale = traffic(problem, evaluation) / max(evaluation.predicted_seconds, 1e-30)
    return replace(ties, price_LE=ties.price_LE * scale)
