"""FairQueue: completions under way within a limit, and those that wait for them, shared fairly among clients.

When there is room, the client with the fewest completions under way comes first; of each client, its oldest request.
A request of several completions waits until all of them have room, and lets nobody pass meanwhile.
"""

import asyncio
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from moeplace.launch.http_front.wire.errors import overloaded, unavailable

_LONGEST_RETRY = 60
_KEPT = 0.9
"""Share that what was known counts beside what is new, of the time between two ends."""


@dataclass(eq=False)
class _Waiting:
    client: str
    choices: int
    number: int
    turn: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FairQueue:
    """See the module. For one event loop.

    Args:
        most: completions under way.
        most_waiting: completions that may wait; 0 = none.

    Attributes:
        running, waiting: completions.
    """

    def __init__(self, most: int, most_waiting: int) -> None:
        self._most, self._most_waiting = most, most_waiting
        self.running = self.waiting = self._asked = 0
        self._queues: dict[str, deque[_Waiting]] = {}
        self._under_way: Counter[str] = Counter()
        self._last_end: float | None = None
        self._between_ends = 0.0

    def require_room(self, choices: int) -> None:
        """Whether a request would be taken now, to wait or to run.

        Raises:
            ApiError: 429.
        """
        if not self._has_room(choices) and self.waiting + choices > self._most_waiting:
            waiting = f" and {self.waiting} wait" if self._most_waiting else ""
            rule = f"{self.running} completions are under way{waiting}, {choices} more are too many"
            raise overloaded(rule, seconds=self._seconds_until_room(choices))

    def enter_now(self, client: str, choices: int) -> bool:
        """Begin, where there is room and nobody waits for it; `leave` must follow."""
        if not self._has_room(choices):
            return False
        self._begin(client, choices)
        return True

    async def enter(self, client: str, choices: int, *, timeout: float | None) -> None:
        """Wait for room; `leave` must follow.

        Raises:
            ApiError: 429, too many wait already; 503, it took longer than `timeout`, or the queue was closed.
        """
        self.require_room(choices)
        if self.enter_now(client, choices):
            return
        self._asked += 1
        entry = _Waiting(client, choices, self._asked)
        self._queues.setdefault(client, deque()).append(entry)
        self.waiting += choices
        try:
            async with asyncio.timeout(timeout):
                await entry.turn
        except BaseException as error:
            if entry.turn.done() and not entry.turn.cancelled() and entry.turn.exception() is None:
                self.leave(client, choices)  # its turn came in the same moment
            else:
                self._forget(entry)
            if isinstance(error, TimeoutError):
                raise unavailable(f"the request has waited for {timeout:g} s", code="queue_timeout") from error
            raise

    def leave(self, client: str, choices: int) -> None:
        """Completions have ended: others may begin."""
        now = time.perf_counter()
        if self._last_end is not None:
            self._between_ends = _KEPT * self._between_ends + (1 - _KEPT) * (now - self._last_end) / choices
        self._last_end = now
        self.running -= choices
        self._under_way[client] -= choices
        if not self._under_way[client]:
            del self._under_way[client]
        self._let_in()

    def close(self, reason: str) -> None:
        """Let nobody wait any more."""
        for entry in [entry for queue in self._queues.values() for entry in queue]:
            self._forget(entry)
            if not entry.turn.done():
                entry.turn.set_exception(unavailable(reason))

    def _has_room(self, choices: int) -> bool:
        return not self.waiting and self.running + choices <= self._most

    def _begin(self, client: str, choices: int) -> None:
        self.running += choices
        self._under_way[client] += choices

    def _let_in(self) -> None:
        while self._queues:
            heads = (queue[0] for queue in self._queues.values())
            entry = min(heads, key=lambda head: (self._under_way[head.client], head.number))
            if self.running + entry.choices > self._most:
                return
            self._forget(entry, let_in=False)
            if not entry.turn.done():  # else it is on its way out
                self._begin(entry.client, entry.choices)
                entry.turn.set_result(None)

    def _forget(self, entry: _Waiting, *, let_in: bool = True) -> None:
        queue = self._queues.get(entry.client)
        if queue is None or entry not in queue:
            return
        queue.remove(entry)
        if not queue:
            del self._queues[entry.client]
        self.waiting -= entry.choices
        if let_in:  # it may have stood in the way of others
            self._let_in()

    def _seconds_until_room(self, choices: int) -> int:
        """From how often completions have ended lately."""
        return min(max(math.ceil(self._between_ends * (self.waiting + choices)), 1), _LONGEST_RETRY)
