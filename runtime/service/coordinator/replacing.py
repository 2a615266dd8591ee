"""Replacing: re-placements, of which one at a time is planned and under way.

wanted -> planned in the background -> command "replace" -> carried out or taken back by the ranks
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeplace.placement.migration.file import plan_to_json
from moeplace.placement.placement import Placement
from moeplace.placement.replacement.width_plan import WidthPlan
from moeplace.runtime.service.coordinator.actions import CommandLog, Document, MakePlan, Outbox
from moeplace.runtime.service.coordinator.membership import Membership

What = Literal["width", "placement"]


@dataclass(eq=False)
class Replacement:
    """What is planned or under way.

    Attributes:
        number: of its plan.
        what: whether the ranks that hold experts change, or a caller wants other experts on them.
        least_bytes: proven least to be moved, once it is planned.
    """

    number: int
    what: What
    least_bytes: int = 0


class Replacing:
    """Re-placements.

    Attributes:
        wanted: placements that callers want, in their order.
        migration: of the one under way, as the ranks say.
        version: switches to another placement so far.
    """

    def __init__(self, members: Membership, log: CommandLog, out: Outbox) -> None:
        self._members, self._log, self._out = members, log, out
        self.wanted: deque[Placement] = deque()
        self.migration: Mapping[str, Any] | None = None
        self.version = 0
        self._plans = 0
        self._current: Replacement | None = None
        self._tried: tuple[tuple[int, ...], str] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether one is planned or under way."""
        return self._current is not None

    def begin_width(self, holders: tuple[int, ...], *, load: np.ndarray | None, expert_bytes: int) -> bool:
        """Let these members hold all experts; whether there is hope: not where that has just been done in vain."""
        attempt = (holders, self._members.placement.digest)
        if attempt == self._tried:
            return False
        self._tried = attempt
        ranks = tuple(self._members.active.index(member) for member in holders)
        self._plan("width", None, ranks, load, expert_bytes)
        return True

    def begin_next(self, *, expert_bytes: int) -> None:
        """The next one that is wanted."""
        goal, placement = self.wanted.popleft(), self._members.placement
        if goal.num_ranks != placement.num_ranks:
            told = f"the placement is for {goal.num_ranks} ranks, but {placement.num_ranks} are active"
            self._out.note("replace-failed", told)
            return
        goal = placement.replace(slot_to_expert=goal.slot_to_expert, slots_of_rank=goal.slots_of_rank)
        self._plan("placement", goal, (), None, expert_bytes)

    def take_plan(self, number: int, plan: WidthPlan | str) -> str:
        """A plan is made, or could not be; why not, "" = it was. Plans for ranks that are no more are ignored."""
        current = self._current
        if current is None or current.number != number:
            return ""
        if isinstance(plan, str):
            return self.finish({"number": number, "error": plan})
        current.least_bytes = plan.least_bytes
        slots = plan.goal.slots_of_rank.tolist()
        generation = self._members.current
        assert generation is not None
        document = {"kind": "replace", "generation": generation.number, "number": number}
        self._log.append({**document, "plan": plan_to_json(plan.plan), "slots_of_rank": slots})
        return ""

    def is_current(self, number: int) -> bool:
        """Whether it is this one that is under way."""
        return self._current is not None and self._current.number == number

    def finish(self, report: Document) -> str:
        """The one under way has ended; why it was taken back, "" = it serves."""
        current, self._current, self.migration = self._current, None, None
        assert current is not None
        figures = {name: report.get(name, 0) for name in ("bytes_moved", "commits", "seconds")}
        figures |= {"what": current.what, "bytes_lower_bound": current.least_bytes}
        if not report["error"]:
            sentence = f"placement version {self.version} serves; {figures['bytes_moved']} bytes moved"
            self._out.note("replaced", sentence, version=self.version, **figures)
            return ""
        reason = f"the re-placement was taken back: {report['error']}"
        self._out.note("replace-failed", reason, **figures)
        if current.what == "width":
            self._members.stay_as_it_is()
        return reason

    def drop(self) -> None:
        """The ranks change, and what was on its way is lost."""
        self._current = self.migration = self._tried = None

    def _plan(
        self,
        what: What,
        goal: Placement | None,
        holders: tuple[int, ...],
        load: np.ndarray | None,
        expert_bytes: int,
    ) -> None:
        self._plans += 1
        self._current = Replacement(self._plans, what)
        self._out.add(MakePlan(self._plans, self._members.placement, goal, holders, load, expert_bytes))
