"""A controller whose reviews run in this process, and two regimes of routing that it meets."""

from collections.abc import Callable
from functools import cache

import numpy as np

from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.replacement.review import ReviewSettings, ReviewTask, review
from moeplace.placement.replacement.rule import ReplacementRule
from moeplace.profiling.synthetic.traces import planted
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.replanning.controller import Change, Controller, ControllerSettings
from moeplace.runtime.replanning.event_log import EventLog
from moeplace.runtime.replanning.review_process import Outcome

RANKS, LAYERS, EXPERTS, WINDOW = 4, 3, 16, 2048
LINK = Link(latency=1e-6, bandwidth=1e9)  # slow, so that copies decide
CLUSTER = Cluster.uniform(RANKS, slots_per_rank=EXPERTS // RANKS, intra=LINK)
REVIEW = ReviewSettings(
    rule=ReplacementRule(least_gain=0.05, quiet_steps=300),
    shape=StepShape(batch=64, hidden_size=512),
    calibration=Calibration(intra=LINK),
    time_limit=0.3,
    steps_left=100_000,
)
SETTINGS = ControllerSettings(every_steps=100, least_tokens=512, review=REVIEW)


def regime(seed: int, *, epsilon: float = 0.1) -> RoutingTrace:
    """Many tokens whose experts lie in hidden blocks, other blocks for every seed."""
    shape = {"num_layers": LAYERS, "num_experts": EXPERTS, "top_k": 2, "num_ranks": RANKS}
    trace, _ = planted(num_tokens=16 * WINDOW, epsilon=epsilon, seed=seed, **shape)
    return trace.replace(expert_bytes=np.full((LAYERS, EXPERTS), 1 << 20))


def window(trace: RoutingTrace, number: int) -> RoutingTrace:
    """Consecutive sequences of a regime."""
    return trace.select(slice(number % 16 * WINDOW, (number % 16 + 1) * WINDOW))


FIRST, SECOND = regime(1), regime(2)


def unplanned() -> Placement:
    return index_order(np.full(LAYERS, EXPERTS), CLUSTER.slots_of_rank, CLUSTER.node_of_rank)


@cache
def planned() -> tuple[Placement, float]:
    """What a review of an unplanned placement finds for the first regime, and what it promises."""
    task = ReviewTask(unplanned(), window(FIRST, 15), 1, CLUSTER, REVIEW)
    review(task)  # the search is short, so compiling its kernels must not be part of it
    found = review(task)
    assert found.candidate is not None
    return found.candidate, found.promised_seconds


class ReviewInPlace:
    """Runs reviews in this process, when they are started."""

    def __init__(self) -> None:
        self.tasks: list[ReviewTask] = []
        self._outcome: Outcome | None = None

    def start(self, task: ReviewTask) -> None:
        """Do it now."""
        self.tasks.append(task)
        self._outcome = review(task)

    def poll(self) -> Outcome | None:
        """The result, once."""
        outcome, self._outcome = self._outcome, None
        return outcome

    def cancel(self) -> None:
        """Forget it."""
        self._outcome = None


def watch(settings: ControllerSettings = SETTINGS) -> tuple[Controller, ReviewInPlace]:
    runner = ReviewInPlace()
    placement, promise = planned()
    controller = Controller(
        placement,
        CLUSTER,
        runner=runner,
        log=EventLog(clock=lambda: 0.0),
        settings=settings,
        reference=window(FIRST, 15),
        promised_seconds=promise,
    )
    return controller, runner


def serve(
    controller: Controller, steps: range, routing_at: Callable[[int], RoutingTrace], *, commits: bool = True
) -> list[tuple[int, Change]]:
    """A service that carries out every change at once; the changes and when they came."""
    changes = []
    for step in steps:
        if controller.is_due(step):
            controller.look(step, routing_at(step))
        change = controller.poll(step)
        if change is not None:
            changes.append((step, change))
            if commits:
                controller.committed(step)
            else:
                controller.failed(step, "not today")
    return changes


def kinds(controller: Controller) -> list[str]:
    return [event.kind for event in controller.log.events]
