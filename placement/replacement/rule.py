"""ReplacementRule: when to look for a new placement, and when to move to one that was found.

    observe ...  consider -> "solve"?  --(a candidate)-->  weigh -> "move"?  --(committed)-->  committed

Three thresholds keep a service from moving for nothing. Drift must be more than chance explains. The score to beat is
the one that the placement promised when it was committed, not an ideal. And staying must have lost the seconds that a
move costs (ski rental: never more than twice what the best single move would have cost), unless the caller knows how
many steps the routing will stay as it is. After a move nothing moves for a while.

The rule is a pure function of its history, so that ranks which saw the same decide the same.
"""

from dataclasses import dataclass, replace
from typing import Literal

from moeplace.profiling.errors import InputError

Action = Literal["keep", "solve", "move"]


@dataclass(frozen=True)
class Decision:
    """What to do, and why.

    Attributes:
        action: keep the placement; solve for a candidate; move to the candidate.
        reason: one sentence with the figures that decided.
    """

    action: Action
    reason: str


@dataclass(frozen=True)
class ServiceHistory:
    """What the rule remembers of the placement in force.

    Attributes:
        promised_seconds: predicted seconds per step when it was committed.
        steps: since then.
        regret: seconds lost since then against the promise.
    """

    promised_seconds: float
    steps: int = 0
    regret: float = 0.0

    def observe(self, *, seconds_per_step: float, steps: int) -> "ServiceHistory":
        """After `steps` more steps, for which `seconds_per_step` is predicted with the routing that was seen."""
        lost = max(seconds_per_step - self.promised_seconds, 0.0) * steps
        return replace(self, steps=self.steps + steps, regret=self.regret + lost)


@dataclass(frozen=True)
class ReplacementRule:
    """Thresholds.

    Attributes:
        least_gain: share of a step's predicted time that must be to gain.
        quiet_steps: steps after a commit in which nothing is decided.
        stall_seconds: that a migration costs the service, beside slowing nothing else down.

    Raises:
        InputError: a value is out of range.
    """

    least_gain: float = 0.05
    quiet_steps: int = 500
    stall_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.least_gain < 1:
            raise InputError(f"least_gain ({self.least_gain}) must lie in 0..1")
        for name in ("quiet_steps", "stall_seconds"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} ({getattr(self, name)}) must not be negative")

    def consider(self, history: ServiceHistory, *, seconds_per_step: float, has_drifted: bool) -> Decision:
        """Whether to look for a candidate.

        Args:
            history: of the placement in force.
            seconds_per_step: predicted for it with the routing of the window.
            has_drifted: whether the routing differs from that of the plan by more than chance, see `Drift`.
        """
        if history.steps < self.quiet_steps:
            return Decision("keep", f"{history.steps} of {self.quiet_steps} quiet steps have passed")
        if not has_drifted:
            return Decision("keep", "the routing differs from that of the plan by no more than chance")
        loss = 1 - history.promised_seconds / seconds_per_step
        if loss < self.least_gain:
            return Decision("keep", f"a step loses {loss:.1%} against the promise, less than {self.least_gain:.1%}")
        return Decision("solve", f"the routing has drifted and a step loses {loss:.1%} against the promise")

    def weigh(
        self,
        history: ServiceHistory,
        *,
        seconds_per_step: float,
        candidate_seconds: float,
        migration_seconds: float,
        steps_left: int | None = None,
    ) -> Decision:
        """Whether to move to a candidate.

        Args:
            history: of the placement in force.
            seconds_per_step: predicted for it with the routing of the window.
            candidate_seconds: predicted for the candidate with the same routing.
            migration_seconds: predicted for the plan.
            steps_left: steps for which the routing will stay so; None = unknown: what staying has cost so far decides.
        """
        gain = 1 - candidate_seconds / seconds_per_step
        if gain < self.least_gain:
            return Decision("keep", f"the candidate saves {gain:.1%} of a step, less than {self.least_gain:.1%}")
        price = migration_seconds + self.stall_seconds
        if steps_left is None:
            saved = (seconds_per_step - candidate_seconds) * history.steps  # more the candidate could not have saved
            amount, what = min(history.regret, saved), "lost so far"
        else:
            amount, what = (seconds_per_step - candidate_seconds) * steps_left, f"to gain in {steps_left} steps"
        figures = f"{amount:.3g} s {what}, {price:.3g} s to move, {gain:.1%} less per step"
        return Decision("move" if amount >= price else "keep", figures)
