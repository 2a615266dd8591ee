"""Replanner: a controller at work on a service. Call `turn` now and then, from one thread.

    replanner = Replanner(controller, service, calibration=calibration)
    while service_runs:
        replanner.turn()

It asks for routing when a look is due, hands changes to the service, and tells the controller what became of them: by
the digest of the placement that is in force once the service has come to rest.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.evaluation import cluster_of
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import MoeplaceError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.replanning.controller import Change, Controller

logger = logging.getLogger(__name__)


class ReplaceableStatus(Protocol):
    """What must be known of a service; `ServiceStatus` has it."""

    @property
    def steps(self) -> int:
        """Forward passes so far."""

    @property
    def placement_digest(self) -> str:
        """Of the placement in force."""

    @property
    def changing(self) -> bool:
        """Whether a change of ranks or of the placement is wanted or under way."""

    @property
    def reason(self) -> str:
        """Why the last change failed; "" = it did not."""


class ReplaceableService(Protocol):
    """What a replanner needs of a service."""

    @property
    def placement(self) -> Placement:
        """In force."""

    def status(self) -> ReplaceableStatus:
        """How things are; cheap."""

    def recent_routing(self) -> RoutingTrace | None:
        """Recent tokens of all ranks (see `routed_rows.join_rows`); None = asked for, not there yet."""

    def replace(self, placement: Placement) -> None:
        """Migrate; returns at once, and `status` shows what comes of it."""


TURN_SECONDS = 0.25
"""Between two turns in the background: a status is cheap, and a finished review can wait that long."""


class Replanner:
    """See the module.

    Attributes:
        controller: what decides.
    """

    def __init__(
        self,
        controller: Controller,
        service: ReplaceableService,
        *,
        calibration: Calibration | None = None,
        is_allowed: Callable[[], bool] = lambda: True,
    ) -> None:
        """`calibration`: measured links of the cluster; None = nominal ones. Where `is_allowed` says no, nothing is
        looked at and nothing is changed; what is under way is concluded."""
        self.controller, self._service, self._calibration = controller, service, calibration
        self._is_allowed = is_allowed
        self._change: Change | None = None

    def turn(self) -> None:
        """Do what is due; never waits."""
        status = self._service.status()
        if status.changing:
            return
        if self._change is not None:
            self._conclude(self._change, status)
        elif status.placement_digest != self.controller.placement.digest:
            self._take_over(status.steps)
        elif self._is_allowed() and self.controller.is_due(status.steps):
            routing = self._service.recent_routing()
            if routing is not None:
                self.controller.look(status.steps, routing)
        change = self.controller.poll(status.steps) if self._is_allowed() else None
        if change is not None:
            self._hand_over(change, status.steps)

    @contextmanager
    def in_background(self, *, every: float = TURN_SECONDS) -> Iterator[None]:
        """Turns in a thread of its own while the block runs; then `close`.

        A turn that fails is logged: a service does not stop for what watches it.
        """
        stopping = threading.Event()

        def work() -> None:
            while not stopping.wait(every):
                try:
                    self.turn()
                except Exception:
                    logger.exception("a turn of the replanner failed")

        thread = threading.Thread(target=work, name="replanner", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join()
            self.close()

    def close(self) -> None:
        """End a review under way, and the log."""
        self.controller.close()
        self.controller.log.close()

    def _hand_over(self, change: Change, step: int) -> None:
        self._change = change  # whatever becomes of the call: the placement in force tells later
        try:
            self._service.replace(change.placement)
        except MoeplaceError as error:
            self._change = None
            self.controller.failed(step, str(error))

    def _conclude(self, change: Change, status: ReplaceableStatus) -> None:
        """The service has come to rest: with the new placement, the old one, or another."""
        self._change = None
        if status.placement_digest == change.placement.digest:
            self.controller.committed(status.steps)
        elif status.placement_digest == self.controller.placement.digest:
            self.controller.failed(status.steps, status.reason or "the service kept the placement that was in force")
        else:
            self._take_over(status.steps)

    def _take_over(self, step: int) -> None:
        placement = self._service.placement
        cluster = cluster_of(placement)
        if self._calibration is not None:
            cluster = self._calibration.apply(cluster)
        self.controller.installed(step, placement, cluster)
