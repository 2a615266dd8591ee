"""What `solve` and `evaluate` say where experts do not fit in fast memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moeplace.launch.tables import Cell, format_table
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.tiers.budgets import BudgetPoint
from moeplace.placement.tiers.evaluation import TierEvaluation, evaluate_tiers, mean_expert_bytes
from moeplace.placement.tiers.joint import TierPlan, plan_tiers
from moeplace.placement.tiers.policy import Policy
from moeplace.placement.tiers.residency import RESIDENCIES, with_residency
from moeplace.placement.tiers.terms import TierTerms
from moeplace.placement.tiers.walk import USES
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class TierOutcome:
    """A plan with tiers beside what it is compared with.

    Attributes:
        plan: fitted.
        held_out: of the plan, on the judging side.
        residencies: by name, residency by one figure on the placement that the plan began with, same policy and side.
    """

    plan: TierPlan
    held_out: TierEvaluation
    residencies: dict[str, TierEvaluation]

    def evidence(self) -> dict[str, Any]:
        """For a placement file."""
        others = {name: judged.summary() for name, judged in self.residencies.items()}
        return {**self.held_out.summary(), "found_by": self.plan.found_by, "residency_by": others}


def solve_tiers(
    problem: Problem,
    start: Placement,
    policy: Policy,
    test: RoutingTrace,
    *,
    seed: int,
    report: Callable[[float], None] = lambda share: None,
) -> TierOutcome:
    """Plan ranks and residency on the problem's trace, judge them on `test`."""
    trace = problem.trace
    assert trace is not None
    terms = TierTerms(
        problem.cluster, problem.shape, mode=problem.mode, calibration=problem.calibration, rule=problem.replica_rule
    )
    plan = plan_tiers(trace, start, policy, terms, seed=seed, report=report)
    size = mean_expert_bytes(trace)
    residencies = {}
    for by in RESIDENCIES:
        draft = with_residency(start, trace, terms.memory, by=by, batch=problem.shape.batch, expert_bytes=size)
        residencies[by] = evaluate_tiers(test, draft, policy, terms, with_bound=False)
    return TierOutcome(plan, evaluate_tiers(test, plan.placement, policy, terms), residencies)


def describe(outcome: TierOutcome, side: str) -> str:
    """The outcome as a table and a sentence on the bound."""
    judged = {f"residency by {name}": each for name, each in outcome.residencies.items()}
    table = tier_table({**judged, f"plan ({outcome.plan.found_by})": outcome.held_out}, f"{side} tokens")
    lines = [table, f"everything in fast memory: {outcome.held_out.resident_seconds * 1e3:.4g} ms/step"]
    bound, fitted = outcome.plan.lower_bound, outcome.plan.evaluation.seconds
    if bound is None:
        lines.append(
            "no bound: it is proven where residents are pinned, hosts compute nothing and nothing is predicted"
        )
    else:
        lines.append(
            f"on fitted tokens {fitted * 1e3:.4g} ms/step, proven >= {bound * 1e3:.4g} for any ranks and residency "
            f"(gap {1 - bound / fitted:.1%})"
        )
    return "\n".join(lines)


def tier_table(judged: Mapping[str, TierEvaluation], title: str) -> str:
    """One row for each evaluation."""
    rows: list[list[Cell]] = [
        [name, each.policy, each.seconds * 1e3, each.hit_rate, *(each.shares[share] for share in USES),
         each.link_bytes / 1e6, each.link_busy]
        for name, each in judged.items()
    ]  # fmt: skip
    return format_table([title, "policy", "ms/step", "hit rate", *USES, "MB/step", "link busy"], rows)


def budget_rows(points: Sequence[BudgetPoint]) -> str:
    """One row for each budget and policy."""
    rows: list[list[Cell]] = [
        [f"{p.budget:.1%}", p.fast_slots, p.times_active, p.policy, p.hit_rate,
         "-" if p.belady_hit_rate is None else f"{p.belady_hit_rate:.4f}", p.seconds * 1e3]
        for p in points
    ]  # fmt: skip
    header = ["budget", "rows a layer", "times active", "policy", "hit rate", "no cache above", "ms/step"]
    return format_table(header, rows)
