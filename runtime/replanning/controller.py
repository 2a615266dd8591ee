"""Controller: watches the routing of a service, and decides when its placement is to change.

    if controller.is_due(step):
        controller.look(step, routing)       # the recent routing of all ranks: see `routed_rows`
    if (change := controller.poll(step)) is not None:
        service.replace(change.placement)    # and later: controller.committed(step), or controller.failed(step, why)

A look starts a review (see `moeplace.placement.replacement.review`) elsewhere and returns at once; `poll` takes what
came of it. The controller moves nothing itself, has no thread and reads no clock: it knows the steps that it is told.
Every decision is in its log with the figures that it rests on. Calls must not overlap.
"""

from dataclasses import dataclass, field
from typing import Literal

from moeplace.placement.cluster import Cluster
from moeplace.placement.migration.plan import MigrationPlan
from moeplace.placement.placement import Placement
from moeplace.placement.replacement.review import Review, ReviewSettings, ReviewTask
from moeplace.placement.replacement.rule import ServiceHistory
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.replanning.event_log import EventLog
from moeplace.runtime.replanning.review_process import ReviewFailure, ReviewRunner

State = Literal["watching", "reviewing", "moving"]
_MOST_DOUBLINGS = 5


@dataclass(frozen=True)
class ControllerSettings:
    """When to look, and how to judge.

    Attributes:
        every_steps: from one look to the next; doubled after every failure in a row, at most 32 times as long.
        least_tokens: a window with fewer says nothing.
        review: thresholds and the search; its rule's quiet steps also keep the controller from looking.
    """

    every_steps: int = 500
    least_tokens: int = 2048
    review: ReviewSettings = field(default_factory=ReviewSettings)

    def __post_init__(self) -> None:
        for name in ("every_steps", "least_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} ({getattr(self, name)}) must be at least 1")


@dataclass(frozen=True, eq=False)
class Change:
    """A move that was decided.

    Attributes:
        placement: to move to.
        plan: how, from the placement in force; the executor may plan again.
        promised_seconds: predicted seconds per step once it is in force.
        routing: that the promise was made on.
        reason: one sentence with the figures that decided.
    """

    placement: Placement
    plan: MigrationPlan
    promised_seconds: float
    routing: RoutingTrace
    reason: str


class Controller:
    """See the module.

    Attributes:
        placement: in force, as far as the controller was told.
        state: watching; reviewing (a review runs); moving (a change was handed out and not yet reported on).
        log: what was decided, and why.
    """

    def __init__(
        self,
        placement: Placement,
        cluster: Cluster,
        *,
        runner: ReviewRunner,
        log: EventLog,
        settings: ControllerSettings | None = None,
        reference: RoutingTrace | None = None,
        promised_seconds: float | None = None,
        step: int = 0,
    ) -> None:
        """Begin to watch.

        Args:
            placement: in force.
            cluster: where it is in force.
            runner: runs the reviews.
            log: for the decisions.
            settings: None = the defaults.
            reference: routing that the placement was planned on; None = unknown, then the first look challenges it.
            promised_seconds: predicted per step on `reference`; both or none.
            step: of the service now.

        Raises:
            InputError: only one of reference and promise is given.
        """
        if (reference is None) != (promised_seconds is None):
            raise InputError("a reference needs the seconds promised on it, and the other way round")
        self.placement, self.log = placement, log
        self.state: State = "watching"
        self._cluster, self._runner = cluster, runner
        self._settings = ControllerSettings() if settings is None else settings
        self._history = None if promised_seconds is None else ServiceHistory(promised_seconds)
        self._reference = reference
        self._candidate: Placement | None = None
        self._change: Change | None = None
        self._looked_at = self._placed_at = step
        self._routing: RoutingTrace | None = None
        self._failures = 0
        planned = "unknown routing" if reference is None else f"{reference.num_tokens} tokens"
        log.add("watching", f"watching {placement.digest[:19]}, planned on {planned}", step=step)

    def is_due(self, step: int) -> bool:
        """Whether it is time to gather the recent routing for a `look`."""
        wait = self._settings.every_steps << min(self._failures, _MOST_DOUBLINGS)
        quiet = self._settings.review.rule.quiet_steps
        return self.state == "watching" and step - self._looked_at >= wait and step - self._placed_at >= quiet

    def look(self, step: int, routing: RoutingTrace) -> None:
        """Start a review of the placement in force under the recent routing."""
        assert self.state == "watching", f"the controller is {self.state}"
        steps, self._looked_at = step - self._looked_at, step
        least = self._settings.least_tokens
        if routing.num_tokens < least:
            sentence = f"the window has {routing.num_tokens} tokens, fewer than {least}: nothing is decided on them"
            self.log.add("window-too-small", sentence, step=step, tokens=routing.num_tokens)
            return
        task = ReviewTask(
            self.placement,
            routing,
            steps,
            self._cluster,
            self._settings.review,
            self._history,
            self._reference,
            self._candidate,
        )
        try:
            self._runner.start(task)
        except OSError as error:  # no process, no memory, no disk: the service has what it needs
            self._note_failure(step, f"the review could not be started: {error}")
            return
        self._routing, self.state = routing, "reviewing"
        self.log.add("review-started", f"reviewing {routing.num_tokens} tokens", step=step, tokens=routing.num_tokens)

    def poll(self, step: int) -> Change | None:
        """What a review decided: a change to carry out, or None. Cheap; call it as often as you like."""
        if self.state != "reviewing":
            return None
        outcome = self._runner.poll()
        if outcome is None:
            return None
        self.state = "watching"
        if isinstance(outcome, ReviewFailure):
            self._note_failure(step, outcome.sentence)
            return None
        return self._take(step, outcome)

    def committed(self, step: int) -> None:
        """The change that was handed out is in force on all ranks."""
        change = self._end_move()
        self.placement = change.placement
        self._history, self._reference = ServiceHistory(change.promised_seconds), change.routing
        self._placed_at, self._failures = step, 0
        quiet = self._settings.review.rule.quiet_steps
        sentence = f"{change.placement.digest[:19]} is in force; nothing is decided for {quiet} steps"
        self.log.add("committed", sentence, step=step, promised_seconds=change.promised_seconds)

    def failed(self, step: int, reason: str) -> None:
        """The change that was handed out was not carried out; the placement before it is in force."""
        self._end_move()
        self._failures += 1
        self.log.add("move-failed", reason, step=step, failures=self._failures)

    def installed(self, step: int, placement: Placement, cluster: Cluster) -> None:
        """The service changed the placement by itself: it was scaled, lost a rank, or was told to."""
        self._runner.cancel()
        self.placement, self._cluster, self.state = placement, cluster, "watching"
        self._history = self._reference = self._candidate = self._change = None
        self._placed_at = self._looked_at = step
        sentence = f"{placement.digest[:19]} was put in force on {placement.num_ranks} ranks: what was known is void"
        self.log.add("placement-changed", sentence, step=step, ranks=placement.num_ranks)

    def close(self) -> None:
        """End a review under way."""
        self._runner.cancel()

    def _note_failure(self, step: int, sentence: str) -> None:
        self._failures += 1
        self.log.add("review-failed", sentence, step=step, failures=self._failures)

    def _take(self, step: int, review: Review) -> Change | None:
        self._history, self._reference, self._candidate = review.history, review.reference, review.candidate
        if review.decision.action != "move":
            self._failures = 0
            kind = "candidate-kept" if review.candidate is not None else "kept"
            self.log.add(kind, review.decision.reason, step=step, **review.figures)
            return None
        assert review.plan is not None
        assert review.candidate is not None
        assert self._routing is not None
        self._change = Change(
            review.candidate, review.plan, review.promised_seconds, self._routing, review.decision.reason
        )
        self.state = "moving"
        self.log.add("move", review.decision.reason, step=step, **review.figures)
        return self._change

    def _end_move(self) -> Change:
        change = self._change
        assert change is not None, "no change was handed out"
        self._change = self._candidate = None
        self.state = "watching"
        return change
