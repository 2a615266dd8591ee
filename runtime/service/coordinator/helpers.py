"""What takes time beside the coordinator: reminders, telling those who asked, and planning."""

import heapq
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from moeplace.placement.replacement.width import rebalance
from moeplace.placement.replacement.width_plan import WidthPlan, plan_width
from moeplace.runtime.service.api import TokenEvent
from moeplace.runtime.service.coordinator.actions import Document, MakePlan, Tell

logger = logging.getLogger(__name__)

OnEvent = Callable[[TokenEvent], None]

_LAST_REPORT = 10.0
"""Seconds that a reminder under way may take."""


class Threads:
    """Threads that are waited for in the end: one that is inside torch when the interpreter goes aborts the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, name: str, call: Callable[[], None]) -> None:
        """Call something in a thread of its own."""
        thread = threading.Thread(target=call, name=name, daemon=True)
        thread.start()
        with self._lock:
            self._threads = [*(other for other in self._threads if other.is_alive()), thread]

    def join(self, timeout: float) -> None:
        """Until all have ended, or so many seconds are over."""
        deadline = time.monotonic() + timeout
        with self._lock:
            threads = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))


class Reminders:
    """Reports that are made after some time, by one thread."""

    def __init__(self, report: Callable[[Document], None]) -> None:
        self._report = report
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Document]] = []
        self._order, self._is_over = count(), False
        self.thread = threading.Thread(target=self._work, name="reminders", daemon=True)
        self.thread.start()

    def add(self, seconds: float, report: Document) -> None:
        """Report something in some seconds."""
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), report))
            self._changed.notify()

    def close(self) -> None:
        """Report nothing more; a report under way is made."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if threading.current_thread() is not self.thread:
            self.thread.join(_LAST_REPORT)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._is_over and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._is_over:
                    return
                report = heapq.heappop(self._due)[2]
            self._report(report)


@dataclass(eq=False)
class Listener:
    """Who asked for a request, or asks again what came of it.

    Attributes:
        on_event: to be called.
        heard: tokens that were told.
    """

    on_event: OnEvent
    heard: int = 0


class Deliveries:
    """Tells those who asked, by one thread: so nobody is told twice at a time, and a slow one holds up no report."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Tell, Listener | None] | None] = queue.SimpleQueue()
        self._listeners: dict[str, list[Listener]] = {}
        self.thread = threading.Thread(target=self._work, name="deliveries", daemon=True)
        self.thread.start()

    def listen(self, ticket: str, on_event: OnEvent) -> None:
        """Somebody asked for a request: to be called before anything is told of it."""
        self._listeners.setdefault(ticket, []).append(Listener(on_event))

    def tell(self, action: Tell) -> None:
        """To all who listen."""
        self._queue.put((action, None))

    def repeat(self, known: Tell, on_event: OnEvent, *, first: int) -> None:
        """To somebody else, from token `first` on: what is known, and what is still to come."""
        self._queue.put((known, Listener(on_event, first)))  # it listens once what was told before has gone by

    def close(self) -> None:
        """Tell what is left, and end."""
        self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            action, only = item
            ended = action.event.finish_reason is not None
            if only is None:
                listeners = self._listeners.pop(action.ticket, []) if ended else self._listeners.get(action.ticket, [])
                for listener in [*listeners]:
                    _tell(listener, action)
                continue
            _tell(only, action)
            if not ended:
                self._listeners.setdefault(action.ticket, []).append(only)


def make_plan(action: MakePlan) -> WidthPlan:
    """The plan that an action asks for."""
    placement, goal = action.placement, action.goal
    if goal is None:
        goal = rebalance(placement, holders=action.holders, load=action.load)
    size = action.expert_bytes
    return plan_width(placement, goal, expert_bytes=size, staging_bytes=size)


def _tell(listener: Listener, action: Tell) -> None:
    event, first = action.event, action.first
    known = max(listener.heard - first, 0)
    new, logprobs = event.token_ids[known:], event.logprobs[known:]
    listener.heard = max(listener.heard, first + len(event.token_ids))
    if not new and event.finish_reason is None:
        return
    try:
        listener.on_event(TokenEvent(event.request_id, new, event.finish_reason, event.error, logprobs))
    except Exception:
        logger.exception("who asked for request %r could not take an event", event.request_id)
