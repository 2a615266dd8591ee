"""`objective="seconds"`: how much balance a shorter way is worth is not known before, so several load caps compete."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from moeplace.placement.bounds.problem import held_imbalance
from moeplace.placement.budget import Budget
from moeplace.placement.objective import traffic
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.search.sample import judging_trace
from moeplace.placement.search.ties import Ties
from moeplace.placement.solvers.index_order import solve_index_order
from moeplace.placement.solvers.judge import Judge
from moeplace.placement.solvers.lpt import solve_lpt
from moeplace.placement.solvers.schedule import searches_within
from moeplace.placement.solvers.spare import FILLING, use_all_slots
from moeplace.profiling.traces.trace import RoutingTrace

Search = Callable[[Problem, Budget, float | None, float, Ties | None], tuple[Sequence[np.ndarray], bool]]
"""(problem, budget, load cap, share of the budget, ties) -> (drafts (L, S), whether the clock cut it short)."""
_CAPS = (1.01, 1.05, 1.15, None)
AS_FAST = 0.005
"""Predicted times that differ by less are the same: predictions err by several times as much."""
AS_FAST_ON_ASSUMED_LINKS = 0.02
"""The same where nobody said how fast links are. The nominal ones are fast, so that half the traffic shortens a step by
a percent or two, less than an even load does; on slower ones it halves the step."""

SLOWNESS = (1.0, 10.0, 100.0)
"""Times that links may be as slow as the nominal ones: those of one machine, of a good and of a plain network."""

_SLOWEST = SLOWNESS[-1]
_MIXED_FOR = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Slownesses of links for which layers of different plans are put together."""


def as_fast(problem: Problem) -> float:
    """Share by which predicted steps may differ and count as equally short.

    With slots to spare it is the lesser one on all links: a plan for more slots may not be worse than one for fewer.
    """
    spare = bool((problem.redundant_slots > 0).any())
    return AS_FAST_ON_ASSUMED_LINKS if problem.links_assumed and not spare else AS_FAST


def fastest(problem: Problem, budget: Budget, search: Search, ties: Ties | None = None) -> Draft:
    """Solve for several load caps; keep the shortest predicted step, of those as short the one with least traffic.

    Index order and packing compete too.
    """
    hardest = problem.max_imbalance
    caps = [*_CAPS] if hardest is None else [*(c for c in _CAPS if c is not None and c < hardest), hardest]
    caps = caps[-searches_within(problem, 0.5 * budget.time_limit) :]
    drafts, by_index = [solve_lpt(problem, budget).slot_to_expert], solve_index_order(problem, budget).slot_to_expert
    if hardest is None:
        drafts.append(by_index)
    cut, in_traffic = False, _priced_in_traffic(problem, ties, budget.time_limit)
    for cap in caps:
        if budget.expired:
            cut = True
            break
        found, shortened = search(problem, budget, cap, 1.0 / len(caps), in_traffic)
        cut |= shortened
        drafts += found
    judge = Judge(problem, ties, held_imbalance(problem), budget.time_limit)
    if problem.mode == "dispatch-combine" and problem.replica_budget == "per-layer":  # else layers share something
        slow = Judge(_on_slower_links(problem, _SLOWEST), ties, None, budget.time_limit)
        drafts += _mixtures(judge, slow, drafts)
    trace = judging_trace(problem, budget.time_limit)
    # Who asks for a plan wants none that is slower than having none, nor than the one in force.
    known = [by_index] * (hardest is None) + ([] if ties is None else [ties.rows_LS])
    longest = min((judge.key(each)[1] for each in known), default=np.inf)
    choose = partial(_best, problem, trace, judge, longest)
    slots_LS, note = use_all_slots(problem, drafts, ties, judge, choose, budget.rng(FILLING))
    return Draft(slots_LS, "time_limit" if cut else "feasible", notes=(note,) if note else ())


def _mixtures(judge: Judge, slow: Judge, drafts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each layer's row of the draft that suits it, on links of several speeds; layers must be independent.

    A tight cap costs some layers little traffic and others much. What a layer takes is a time that does not depend on
    how fast links are, and one that is as much longer as they are slower.
    """
    seconds_D2L = np.array([[each.by_layer(draft) for each in (judge, slow)] for draft in drafts], dtype=float)
    mixed: dict[bytes, np.ndarray] = {}
    for slowness in _MIXED_FOR:
        share = (slowness - 1.0) / (_SLOWEST - 1.0)
        seconds = [(1.0 - share) * swift_L + share * slow_L for swift_L, slow_L in seconds_D2L]
        found = judge.combine(drafts, seconds)
        if found is not None:
            mixed.setdefault(found.tobytes(), found)
    return list(mixed.values())


def _on_slower_links(problem: Problem, times: float) -> Problem:
    return problem.replace(calibration=problem.calibration.slower(times))


def _best(
    problem: Problem, trace: RoutingTrace, judge: Judge, longest: float, drafts: Sequence[np.ndarray]
) -> np.ndarray:
    """One of those that keep the constraints best and whose step is as short as any: that of least traffic.

    Where links are not known: that of least regret, be they as fast as the nominal ones or slower; none is `longest` or
    longer then, but for what always counts as equal.
    """
    keys = [judge.key(draft) for draft in drafts]
    least = min(broken for broken, _, _ in keys)
    shortest = min(seconds for broken, seconds, _ in keys if broken == least)
    limit = max(min(shortest * (1 + as_fast(problem)), longest), shortest * (1 + AS_FAST))
    as_short = [i for i, key in enumerate(keys) if key[0] == least and key[1] <= limit]
    if len(as_short) == 1:
        return drafts[as_short[0]]
    placements = [problem.placement(drafts[i]) for i in as_short]
    if problem.links_assumed:
        regret_C = _regrets(problem, trace, placements)
        return drafts[as_short[int(regret_C.argmin())]]
    sent = [traffic(problem, problem.evaluate(placement, trace)) for placement in placements]
    return drafts[min(zip(sent, (keys[i][1] for i in as_short), as_short, strict=True))[2]]


def _regrets(problem: Problem, trace: RoutingTrace, placements: Sequence[Placement]) -> np.ndarray:
    """(C,) most times that the step of each of C placements is longer than the shortest, over links of all speeds."""
    worst_C = np.ones(len(placements))
    for times in SLOWNESS:
        slower = _on_slower_links(problem, times)
        step_C = np.array([slower.evaluate(placement, trace).predicted_seconds for placement in placements])
        worst_C = np.maximum(worst_C, step_C / step_C.min())
    return worst_C


def _priced_in_traffic(problem: Problem, ties: Ties | None, seconds: float) -> Ties | None:
    """The ties with prices for a search that sees traffic alone: a second is worth what the start has of both."""
    if ties is None or not ties.price_LE.any():
        return ties
    evaluation = problem.evaluate(problem.placement(ties.rows_LS), judging_trace(problem, seconds))
    scale = traffic(problem, evaluation) / max(evaluation.predicted_seconds, 1e-30)
    return replace(ties, price_LE=ties.price_LE * scale)
