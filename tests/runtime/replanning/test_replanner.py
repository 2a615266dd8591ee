"""The replanner: what a service does to a change is told to the controller, whatever it is."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.placement import Placement, index_order
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.replanning.controller import Change
from moeplace.runtime.replanning.replanner import Replanner
from tests.runtime.replanning.controlled import EXPERTS, FIRST, LAYERS, SECOND, kinds, planned, watch, window

pytestmark = pytest.mark.clock(0.1)  # reviews search for fractions of a second, on whatever machine


@dataclass
class Status:
    steps: int
    placement_digest: str
    changing: bool
    reason: str = ""


@dataclass
class SimulatedService:
    """A service of one step per turn that takes ten steps for a change, and ends it as told."""

    in_force: Placement
    routing_at: Callable[[int], RoutingTrace]
    ends_with: str = "commit"
    steps: int = 0
    wanted: Placement | None = None
    begun: int = 0
    asked: list[int] = field(default_factory=list)

    def status(self) -> Status:
        """One more step."""
        self.steps += 1
        reason = ""
        if self.wanted is not None and self.steps >= self.begun + 10:
            if self.ends_with == "commit":
                self.in_force = self.wanted
            elif self.ends_with == "scale":
                self.in_force = on_two_ranks()
            else:
                reason = self.ends_with
            self.wanted = None
        return Status(self.steps, self.in_force.digest, self.wanted is not None, reason)

    @property
    def placement(self) -> Placement:
        """In force."""
        return self.in_force

    def recent_routing(self) -> RoutingTrace | None:
        """There when asked for the second time."""
        self.asked.append(self.steps)
        return self.routing_at(self.steps) if len(self.asked) % 2 == 0 else None

    def replace(self, placement: Placement) -> None:
        """Begin, or refuse."""
        if self.ends_with == "refuse":
            raise InputError("the placement is for another model")
        if self.ends_with != "break before":
            self.wanted, self.begun = placement, self.steps
        if self.ends_with.startswith("break"):
            self.ends_with = "commit"
            raise RuntimeError("a defect")


def on_two_ranks() -> Placement:
    cluster = Cluster.uniform(2, slots_per_rank=EXPERTS // 2)
    return index_order(np.full(LAYERS, EXPERTS), cluster.slots_of_rank, cluster.node_of_rank)


def run(steps: int, ends_with: str, routing_at: Callable[[int], RoutingTrace]) -> tuple[Replanner, SimulatedService]:
    controller, _ = watch()
    service = SimulatedService(planned()[0], routing_at, ends_with)
    replanner = Replanner(controller, service)
    while service.steps < steps:
        replanner.turn()
    replanner.close()
    return replanner, service


def test_a_committed_change_is_in_force_and_quiet_follows() -> None:
    """Drift at step 400: one change, committed ten steps later; then looks at what is in force find nothing to do."""
    replanner, service = run(1200, "commit", lambda step: window(FIRST if step < 400 else SECOND, step // 100))
    told = kinds(replanner.controller)
    assert (told.count("move"), told.count("committed")) == (1, 1)
    events = {
        event.kind: event.step for event in replanner.controller.log.events if event.kind in ("move", "committed")
    }
    assert events["committed"] == events["move"] + 10
    assert replanner.controller.placement is service.in_force
    assert told[-1] == "kept"
    assert len(service.asked) == 2 * told.count("review-started")


@pytest.mark.parametrize(
    ("ends_with", "kind", "words"),
    [
        ("expert 3 of MoE layer 1 did not arrive whole", "move-failed", "did not arrive whole"),
        ("refuse", "move-failed", "is for another model"),
        ("scale", "placement-changed", "on 2 ranks"),
    ],
)
def test_every_other_end_is_noted(ends_with: str, kind: str, words: str) -> None:
    """A migration that fails, a service that refuses, a change of ranks in the middle: the controller watches on."""
    replanner, service = run(340, ends_with, lambda step: window(SECOND, step // 100))
    [event] = [event for event in replanner.controller.log.events if event.kind == kind]
    assert words in event.sentence
    assert replanner.controller.state == "watching"
    assert replanner.controller.placement.digest == service.in_force.digest


def test_a_change_of_ranks_from_outside_is_taken_over() -> None:
    """The service was scaled while nothing was under way; what is in force there is watched."""
    controller, _ = watch()
    service = SimulatedService(planned()[0], lambda step: window(FIRST, 0))
    replanner = Replanner(controller, service)
    replanner.turn()
    service.in_force = on_two_ranks()
    replanner.turn()
    assert controller.placement is service.in_force
    assert kinds(controller) == ["watching", "placement-changed"]


class OneChange:
    """A controller that wants one change, and notes what it is told of it."""

    def __init__(self, placement: Placement, goal: Placement) -> None:
        self.placement, self.told = placement, list[str]()
        self._goal = goal
        self._change: Change | None = Change(goal, None, 1.0, window(FIRST, 0), "better")  # type: ignore[arg-type]

    def is_due(self, step: int) -> bool:
        return False

    def poll(self, step: int) -> Change | None:
        change, self._change = self._change, None
        return change

    def committed(self, step: int) -> None:
        self.told.append("committed")
        self.placement = self._goal

    def failed(self, step: int, reason: str) -> None:
        self.told.append(reason)


@pytest.mark.parametrize(
    ("ends_with", "told"),
    [
        ("break before", "the service kept the placement that was in force"),
        ("break behind", "committed"),
        ("refuse", "the placement is for another model"),
    ],
)
def test_a_service_that_breaks_is_asked_what_is_in_force(ends_with: str, told: str) -> None:
    """An error of no known kind as a change is handed over, before it was taken or behind: one turn fails, and then
    what became of it is told, once; a controller that nobody tells would wait for ever."""
    old = index_order(np.full(LAYERS, EXPERTS), np.full(4, EXPERTS // 4), np.zeros(4, np.int64))
    controller = OneChange(old, old.replace(slot_to_expert=old.slot_to_expert[:, ::-1]))
    service = SimulatedService(old, lambda step: window(FIRST, 0), ends_with)
    replanner, failed = Replanner(controller, service), 0  # type: ignore[arg-type]
    while service.steps < 30:
        try:
            replanner.turn()
        except RuntimeError:
            failed += 1
    assert failed == ends_with.startswith("break")
    assert controller.told == [told]
