"""EventLogger: what happens to the members of a service, in the log of the process that serves."""

import logging
import threading
from types import TracebackType
from typing import Self

from moeplace.runtime.service.api import Event, Service

logger = logging.getLogger("moeplace.service")

_TROUBLE = ("loss", "fail", "refused")
_EVERY = 0.5
"""Seconds between two looks at the events."""


class EventLogger:
    """While it is open, every event of a service gets a line: a warning where something went wrong."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._last: Event | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moeplace-events", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            ending = self._stop.wait(_EVERY)
            self.log_new()
            if ending:
                return

    def log_new(self) -> None:
        """Log what has come since the last call."""
        events = self._service.events()
        known = next((index for index in range(len(events), 0, -1) if events[index - 1] is self._last), 0)
        for event in events[known:]:
            level = logging.WARNING if any(word in event.kind for word in _TROUBLE) else logging.INFO
            logger.log(level, "%s: %s", event.kind, event.sentence)
        self._last = events[-1] if events else None
