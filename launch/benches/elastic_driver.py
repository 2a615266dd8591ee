"""ElasticDriver: keeps a service busy, lets things happen to it, and writes down what came of both."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from moeplace.launch.benches.elastic_load import Change, ElasticJob, exchange_slots
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import MoeplaceError
from moeplace.runtime.service.api import ServiceStatus, TokenEvent
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.store import Document

Condition = Callable[[ServiceStatus], bool]

WARM_UP = 20
"""Steps that are not counted: the first ones allocate."""


@dataclass
class Record:
    """What came of it.

    Attributes:
        step_seconds: of decode steps on rank 0, from the end of the step before.
        step_tokens: that each added.
        step_ranks: that took part.
        moving: whether a re-placement was under way.
        tokens: token ids per request number.
        failed: request number -> why it ended without all its tokens.
        killed_at: seconds since the epoch.
        wiped: how often all ranks were killed at once; those moments are in `killed_at` too.
        switch_seconds: from the last step of a generation to the first of the next, where no rank was killed.
    """

    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    step_ranks: list[int] = field(default_factory=list)
    moving: list[bool] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    killed_at: list[float] = field(default_factory=list)
    switch_seconds: list[float] = field(default_factory=list)
    wiped: int = 0


class ElasticDriver:
    """Serves until all steps and changes are done and no request is in flight.

    Attributes:
        record: see `Record`.
        requests: asked so far.
        replaced: re-placements that were asked for and have come to pass.
        vocabulary: of the model.
    """

    def __init__(self, job: ElasticJob, *, vocabulary: int, deadline: float) -> None:
        """`deadline` by the monotonic clock, for everything."""
        self._job, self.vocabulary, self._deadline = job, vocabulary, deadline
        self._rng = np.random.default_rng([job.seed, 3])
        self._service: Coordinator | None = None
        self._changed = threading.Condition()
        self._steps = -WARM_UP
        self._in_flight = 0
        self._last_step = (0, 0, 0.0)  # generation, kills before it, time
        self._is_over = False
        self._goal: Placement | None = None
        self.requests = self.replaced = 0
        self.record = Record()

    @property
    def share_done(self) -> float:
        """Of the steps."""
        return min(max(self._steps, 0) / self._job.steps, 1.0)

    def run(self, service: Coordinator) -> None:
        """Do the job.

        Raises:
            MoeplaceError: the service ended, or the deadline has passed.
        """
        self._service = service
        try:
            self._run()
        finally:
            with self._changed:
                self._is_over = True  # also where it failed: nothing more is asked for

    def _run(self) -> None:
        self._refill()
        for change in self._job.changes():
            self._await_steps(change.step)
            self._do(change)
        self._await_quiet()
        self._repeat_replacement()
        self._require_width()
        self._await_steps(self._job.steps)
        with self._changed:
            self._is_over = True
            if not self._changed.wait_for(lambda: not self._in_flight, self._time_left()):
                raise MoeplaceError(f"{self._in_flight} requests did not end in time")

    def on_step(self, report: Document) -> None:
        """What rank 0 says of a step."""
        with self._changed:
            self._note_switch(report["generation"])
            if report["phase"] == "decode" and report["tokens"]:
                self._steps += 1
                if self._steps > 0 and not self._is_over:
                    self.record.step_seconds.append(report["seconds"])
                    self.record.step_tokens.append(len(report["tokens"]))
                    self.record.step_ranks.append(report["ranks"])
                    self.record.moving.append(report["moving"])
            self._changed.notify_all()

    def _note_switch(self, generation: int) -> None:
        now, (before, kills, then) = time.monotonic(), self._last_step
        self._last_step = (generation, len(self.record.killed_at), now)
        if 0 < before < generation and kills == len(self.record.killed_at):
            self.record.switch_seconds.append(now - then)

    def _on_event(self, event: TokenEvent) -> None:
        number = int(event.request_id)
        self.record.tokens.setdefault(number, []).extend(event.token_ids)
        if event.finish_reason is None:
            return
        if event.finish_reason not in ("stop", "length"):
            self.record.failed[number] = event.error or event.finish_reason
        with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()
        self._refill()

    def _refill(self) -> None:
        """Add requests when a quarter of the batch is free."""
        batch = self._job.batch
        with self._changed:
            if self._is_over or self._in_flight > batch - batch // 4:
                return
            numbers = range(self.requests, self.requests + batch - self._in_flight)
            self.requests, self._in_flight = numbers.stop, batch
        assert self._service is not None
        for number in numbers:
            self._service.submit(self._job.request(number, vocabulary=self.vocabulary), self._on_event)

    def _do(self, change: Change) -> None:
        if change.kind == "kill":
            self._kill(change)
            return
        if change.kind == "kill-all":
            self._kill_all()
            return
        self._await_quiet()
        self._repeat_replacement()
        assert self._service is not None
        status = self._service.status()
        if change.kind == "replacement":
            self._goal = exchange_slots(self._service.placement, share=self._job.share, rng=self._rng)
            self._replace()
        elif change.kind == "join":
            self._service.scale(status.desired + 1)
        else:
            self._service.scale(status.desired - 1, leaving=[_pick(status.active, change.chance)])

    def _kill(self, change: Change) -> None:
        """Kill a rank; every other time during a re-placement, which is begun for it where none is under way."""
        service = self._service
        assert service is not None
        if len(self.record.killed_at) % 2 and not service.status().changing:
            service.replace(exchange_slots(service.placement, share=self._job.share, rng=self._rng))
            self._await(lambda status: status.migration is not None or not status.changing)
        self._await(lambda status: len(status.active) > 1)
        victim = _pick(service.status().active, change.chance)
        self.record.killed_at.append(time.time())
        service.member(victim).kill()
        generation = service.status().generation
        self._await(lambda status: victim not in status.allocated and status.generation > generation)

    def _kill_all(self) -> None:
        """Kill whoever there is, at once."""
        service = self._service
        assert service is not None
        status = service.status()
        self.record.killed_at.append(time.time())
        self.record.wiped += 1
        for victim in status.allocated:
            with suppress(KeyError):  # it has gone by itself
                service.member(victim).kill()
        self._await(lambda now: now.generation > status.generation and now.serving)

    def _repeat_replacement(self) -> None:
        while self._is_replacement_due():
            self._replace()
            self._await_quiet()

    def _is_replacement_due(self) -> bool:
        """Whether a re-placement that was begun has been lost with a rank; call it when nothing is under way."""
        assert self._service is not None
        if self._goal is None:
            return False
        if not self._service.placement.equals(self._goal):
            return True
        self._goal, self.replaced = None, self.replaced + 1
        return False

    def _replace(self) -> None:
        """Go to the goal; where the ranks have changed since it was set, to another one."""
        service = self._service
        assert service is not None
        assert self._goal is not None
        if not np.array_equal(self._goal.slots_of_rank, service.placement.slots_of_rank):
            self._goal = exchange_slots(service.placement, share=self._job.share, rng=self._rng)
        service.replace(self._goal)

    def _await_quiet(self) -> None:
        self._await(lambda status: not status.changing)

    def _await(self, condition: Condition) -> None:
        service = self._service
        assert service is not None
        if not service.wait_for(lambda status: condition(status) or status.ended, timeout=self._time_left()):
            raise MoeplaceError(f"the service did not finish a change in time: {service.status()}")
        self._require_serving()

    def _await_steps(self, steps: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._steps >= steps, self._time_left()):
                raise MoeplaceError(f"the service made {self._steps} of {steps} steps in time")
        self._require_serving()

    def _require_width(self) -> None:
        """Whether everybody has come and gone; a rank may have been killed when it was about to leave."""
        job, service = self._job, self._service
        assert service is not None
        ranks = job.ranks + job.joins - job.leaves
        if len(service.status().active) != ranks:
            raise MoeplaceError(f"there should be {ranks} ranks at the end, but there are {service.status().active}")

    def _require_serving(self) -> None:
        assert self._service is not None
        status = self._service.status()
        if status.ended:
            raise MoeplaceError(f"the service has ended: {status.reason}")

    def _time_left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.0)


def _pick(members: tuple[int, ...], chance: float) -> int:
    return members[int(chance * len(members))]
