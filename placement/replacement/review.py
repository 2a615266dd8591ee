"""Review: whether the routing just seen calls for another placement, and which.

    drift and loss?  -> solve on half of the sequences -> judge on the other half -> plan -> does it pay?

A pure function of its task: the caller keeps what it returns (history, reference, candidate) and hands it in again, and
may run it in another process. The thresholds are those of `ReplacementRule`; what a review adds is what they are
compared with, and three rules of its own:

* A placement that nobody planned on known routing has no promise: it is challenged at the first review.
* A candidate that would pay but has not yet lost the price of the move is kept, and weighed again on newer routing
  without another search. When the routing comes back, it no longer gains and is dropped.
* Where a search finds nothing better, what is in force becomes the promise: the routing has become harder, the
  placement has not become worse, and asking again would find the same.
"""

from dataclasses import dataclass, field, replace

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.migration.plan import MigrationPlan, plan_migration
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.replacement.rule import Decision, ReplacementRule, ServiceHistory
from moeplace.placement.solve import solve
from moeplace.profiling.errors import InputError
from moeplace.profiling.scores.drift import DECIDING, measure_drift
from moeplace.profiling.traces.trace import RoutingTrace

DRIFT_SPLITS = 100
DRIFT_TOKENS = 16_384


@dataclass(frozen=True)
class ReviewSettings:
    """How to search and what to demand; the same in every review.

    Attributes:
        rule: thresholds.
        shape, calibration: sizes and times of the cost model; the links of `calibration` are those of the cluster.
        time_limit: seconds of the search.
        seed: of the test for drift and of the search.
        steps_left: steps for which routing stays as it is; None = unknown.
        max_moves: most experts fetched per layer, None = any number.
        survive: ranks that may be lost at once without losing an expert.
    """

    rule: ReplacementRule = field(default_factory=ReplacementRule)
    shape: StepShape = field(default_factory=StepShape)
    calibration: Calibration = field(default_factory=Calibration)
    time_limit: float = 10.0
    seed: int = 0
    steps_left: int | None = None
    max_moves: int | None = None
    survive: int = 0

    def __post_init__(self) -> None:
        if not self.time_limit > 0:
            raise InputError(f"time limit of a review's search ({self.time_limit} s) must be positive")
        for name in ("steps_left", "max_moves"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{name} ({value}) must not be negative")


@dataclass(frozen=True, eq=False)
class ReviewTask:
    """What a review looks at.

    Attributes:
        placement: in force.
        routing: seen lately.
        steps: since the review before, for which `routing` stands.
        cluster: of the placement.
        settings: how to judge.
        history: of the placement in force; None = nobody promised anything.
        reference: routing that the promise was made on; None with `history`.
        candidate: found earlier, not yet worth its price.
    """

    placement: Placement
    routing: RoutingTrace
    steps: int
    cluster: Cluster
    settings: ReviewSettings
    history: ServiceHistory | None = None
    reference: RoutingTrace | None = None
    candidate: Placement | None = None


@dataclass(frozen=True, eq=False)
class Review:
    """What came of it.

    Attributes:
        decision: "keep", or "move" to `candidate` by `plan`.
        figures: what decided: `tokens`, `seconds_per_step`, and where they were computed `promised_seconds`, `regret`,
            `drift` and `drift_threshold` (total variation of load or transitions, whichever is nearer to its
            threshold or farther beyond), `candidate_seconds`, `gain`, `solve_seconds`, `gap`, `migration_seconds`,
            `bytes`, `transfers`.
        history, reference, candidate: for the next review.
        promised_seconds: what the candidate promises, if it is to be moved to.
        plan: of the move.
    """

    decision: Decision
    figures: dict[str, float]
    history: ServiceHistory | None
    reference: RoutingTrace | None
    candidate: Placement | None = None
    promised_seconds: float = 0.0
    plan: MigrationPlan | None = None


def review(task: ReviewTask) -> Review:
    """Look at the routing, and decide.

    Raises:
        InputError: the routing is of another model, or has no token.
        InfeasibleError: the constraints leave no placement.
    """
    now = _seconds(task, task.placement, task.routing)
    figures = {"tokens": float(task.routing.num_tokens), "seconds_per_step": now}
    history = task.history and task.history.observe(seconds_per_step=now, steps=task.steps)
    kept = Review(Decision("keep", ""), figures, history, task.reference)
    if task.candidate is not None:
        candidate_seconds = _seconds(task, task.candidate, task.routing)
        if 1 - candidate_seconds / now >= task.settings.rule.least_gain:
            return _weigh(task, kept, task.candidate, now, candidate_seconds)
    if history is not None and task.reference is not None:
        decision = _consider(task, history, now, figures)
        if decision.action == "keep":
            return replace(kept, decision=decision)
    return _challenge(task, kept)


def _consider(task: ReviewTask, history: ServiceHistory, now: float, figures: dict[str, float]) -> Decision:
    assert task.reference is not None
    settings = task.settings
    drift = measure_drift(
        task.reference, task.routing, seed=settings.seed, splits=DRIFT_SPLITS, most_tokens=DRIFT_TOKENS
    )
    worst = max(DECIDING, key=lambda name: drift.distance[name] / max(drift.threshold[name], 1e-12))
    figures |= {"drift": drift.distance[worst], "drift_threshold": drift.threshold[worst]}
    figures |= {"promised_seconds": history.promised_seconds, "regret": history.regret}
    return settings.rule.consider(history, seconds_per_step=now, has_drifted=drift.is_significant)


def _challenge(task: ReviewTask, kept: Review) -> Review:
    """Search for a candidate on one half of the sequences, and judge it on the other."""
    settings = task.settings
    train, test = _halves(task.routing)
    problem = Problem.from_trace(
        train,
        task.cluster,
        mode=task.placement.mode,
        previous=task.placement,
        max_moves=settings.max_moves,
        survive=settings.survive,
        shape=settings.shape,
        calibration=settings.calibration,
    )
    result = solve(problem, time_limit=settings.time_limit, seed=settings.seed)
    kept.figures.update(solve_seconds=result.seconds, gap=result.gap)
    now, found = (_seconds(task, placement, test) for placement in (task.placement, result.placement))
    gain = 1 - found / now
    if gain < settings.rule.least_gain:
        reason = f"a search found {max(gain, 0):.1%} to gain, less than {settings.rule.least_gain:.1%}"
        kept.figures.update(candidate_seconds=found, gain=gain)
        promise = ServiceHistory(kept.figures["seconds_per_step"])
        return replace(kept, decision=Decision("keep", reason), history=promise, reference=task.routing)
    if kept.history is None:  # nobody promised anything: what could be had is the measure of what is lost
        kept = replace(kept, history=ServiceHistory(found).observe(seconds_per_step=now, steps=task.steps))
    return _weigh(task, kept, result.placement, now, found)


def _weigh(task: ReviewTask, kept: Review, candidate: Placement, now: float, found: float) -> Review:
    """Gain against price; what is not paid yet is kept as a candidate."""
    assert kept.history is not None
    settings = task.settings
    plan = plan_migration(task.placement, candidate, cluster=task.cluster, expert_bytes=task.routing.expert_bytes)
    decision = settings.rule.weigh(
        kept.history,
        seconds_per_step=now,
        candidate_seconds=found,
        migration_seconds=plan.seconds,
        steps_left=settings.steps_left,
    )
    figures = {
        **kept.figures,
        "seconds_per_step": now,
        "candidate_seconds": found,
        "gain": 1 - found / now,
        "regret": kept.history.regret,
        "migration_seconds": plan.seconds,
        "bytes": float(plan.bytes),
        "transfers": float(len(plan.transfers)),
    }
    return replace(
        kept, decision=decision, figures=figures, candidate=candidate, promised_seconds=found,
        plan=plan if decision.action == "move" else None,
    )  # fmt: skip


def _halves(routing: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """Two halves by sequence; the whole twice where it cannot be split."""
    try:
        return routing.split("train"), routing.split("test")
    except InputError:
        return routing, routing


def _seconds(task: ReviewTask, placement: Placement, routing: RoutingTrace) -> float:
    settings = task.settings
    return evaluate(
        routing, placement, cluster=task.cluster, shape=settings.shape, calibration=settings.calibration
    ).predicted_seconds
