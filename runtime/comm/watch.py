"""CollectiveWatch: gives up collectives that do not end, for back ends whose `wait` does not block the host.

NCCL's `wait` orders streams and returns. A peer that is gone shows as a kernel that never ends: the host would hang in
its next read of a tensor. So a thread of its own looks at what has been issued, and when one does not end in time, it
aborts the communicator: kernels end, the host comes back from its read with whatever is in memory, and `check`, which
follows every read that matters, raises instead of using it.

    host    issue -- issue -- read ........................ comes back -- check: PeerLostError
    watch        look    look    look    look   time is up: abort
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from moeplace.runtime.errors import PeerLostError

POLL_SECONDS = 0.05


class Work(Protocol):
    """A collective that was issued."""

    def is_completed(self) -> bool:
        """Whether it has ended, well or not; may raise what went wrong."""


class CollectiveWatch:
    """See the module.

    Args:
        abort: ends everything that was issued; called once, on the watching thread.
        timeout: seconds for a collective, from when it was issued or from when the one before has ended.
        clock: seconds that go on.
        start: whether to look from a thread; else the caller does (`look`).
    """

    def __init__(
        self,
        abort: Callable[[], None],
        *,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
        start: bool = True,
    ) -> None:
        self._abort, self._timeout, self._clock = abort, timeout, clock
        self._pending: deque[tuple[Work, str]] = deque()
        self._since = 0.0
        self._lost = ""
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collectives", daemon=True) if start else None
        if self._thread is not None:
            self._thread.start()

    def add(self, work: Work, kind: str) -> None:
        """A collective was issued; they end in the order in which they were."""
        with self._lock:
            if not self._pending:
                self._since = self._clock()
            self._pending.append((work, kind))

    def look(self) -> None:
        """Forget what has ended; give up when the first of the others has had its time, or has failed."""
        with self._lock:
            reason = self._advance()
            if not reason or self._lost:
                return
            self._lost = reason
            self._pending.clear()
        with suppress(Exception):  # a communicator that is broken already; the thread has to live on
            self._abort()

    def check(self) -> None:
        """Whether all is well.

        Raises:
            PeerLostError: a collective was given up.
        """
        if self._lost:
            raise PeerLostError(self._lost)

    def close(self) -> None:
        """Look no more, and let go of what was watched: a group whose collectives these are ends with its owner."""
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._abort = _nothing
        self._pending.clear()

    def _advance(self) -> str:
        """What is wrong, "" = nothing."""
        while self._pending:
            work, kind = self._pending[0]
            try:
                is_done = work.is_completed()
            except Exception as error:  # whatever it is: nobody else would hear of it
                return f"{kind} failed: {' '.join(str(error).split())[:160]}"
            if not is_done:
                waited = self._clock() - self._since
                return f"{kind} has not ended within {self._timeout:g} s" if waited > self._timeout else ""
            self._pending.popleft()
            self._since = self._clock()
        return ""

    def _run(self) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            self.look()


def _nothing() -> None:
    """What ends collectives of which none are watched any more."""
