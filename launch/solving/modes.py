"""All modes solved side by side: which to run, and how much of the gain is the mode's, how much the placement's.

Times are predictions; where they are the same, fewer copies across ranks win: links are shared, and slower at times
than the cost model has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moeplace.launch.tables import format_table
from moeplace.placement.cost.evaluation import Evaluation
from moeplace.placement.problem import Problem
from moeplace.placement.result import SolveResult
from moeplace.placement.solvers.seconds import AS_FAST

WORTH_HAVING = 0.02
"""Predicted gain below which a placement is not worth its trouble for the time alone."""
_FEWER = 0.05
"""Share of copies saved that is worth telling."""


@dataclass(frozen=True, eq=False)
class ModeOutcome:
    """What was found for one mode.

    Attributes:
        problem, result: the search on the fitted side.
        solved, baseline: the placement and index order, judged on the other side in this mode.
    """

    problem: Problem
    result: SolveResult
    solved: Evaluation
    baseline: Evaluation


def choose(outcomes: Sequence[ModeOutcome]) -> ModeOutcome:
    """By what the fitted side says: the shortest predicted step; of those as short, the fewest copies."""
    seconds = [outcome.result.values["seconds"] for outcome in outcomes]
    short = [o for o, value in zip(outcomes, seconds, strict=True) if value <= min(seconds) * (1 + AS_FAST)]
    return min(
        short, key=lambda o: (o.problem.evaluate(o.result.placement).copies_per_token, o.result.values["seconds"])
    )


def mode_table(outcomes: Sequence[ModeOutcome]) -> str:
    """One row per mode on the judging side."""
    rows = [
        [
            o.problem.mode, o.baseline.predicted_seconds * 1e3, o.solved.predicted_seconds * 1e3,
            o.baseline.predicted_seconds / o.solved.predicted_seconds,
            o.baseline.copies_per_token, o.solved.copies_per_token,
        ]
        for o in outcomes
    ]  # fmt: skip
    header = ["mode", "index order, ms/step", "solved, ms/step", "speedup", "index order, copies/token", "solved"]
    return format_table(header, rows)


def verdict(outcomes: Sequence[ModeOutcome], chosen: ModeOutcome, *, links: str) -> str:
    """Which mode to run, whether a placement is worth having, and what gains how much.

    Args:
        outcomes: of all modes that were solved.
        chosen: one of them.
        links: where the cost model's links come from, "nominal" or "calibrated".
    """
    mode, best = chosen.problem.mode, min(o.baseline.predicted_seconds for o in outcomes)
    first = next((o for o in outcomes if o.problem.mode == "dispatch-combine"), outcomes[0])
    gain = best / chosen.solved.predicted_seconds - 1
    of_mode = first.baseline.predicted_seconds / chosen.baseline.predicted_seconds
    of_placement = chosen.baseline.predicted_seconds / chosen.solved.predicted_seconds
    before, after = chosen.baseline.copies_per_token, chosen.solved.copies_per_token
    fewer = 1 - after / before if before else 0.0
    saved = f"{fewer:.0%} fewer copies across ranks ({before:.3g} -> {after:.3g} per token and MoE layer)"
    if gain >= WORTH_HAVING:
        words = f"run {mode} with this placement: {gain:.1%} faster than the best mode in index order"
        words += f", {saved}" if fewer >= _FEWER else ""
    elif fewer >= _FEWER:
        words = (
            f"run {mode} with this placement: {saved}, which shows in time where links are slower or shared; by the "
            f"{links} ones the step takes as long ({gain:+.1%})"
        )
    else:
        words = f"a placement for {mode} gains {gain:.1%} over the best mode in index order: leave it alone"
    parts = f"of it the mode makes {of_mode:.3f} times, the placement {of_placement:.3f} times"
    return f"verdict: {words}\n  ({links} links; against {first.problem.mode} in index order, {parts})"
