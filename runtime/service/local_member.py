"""LocalMember: a member of a service that is, or will be, a process of this machine."""

import os
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import IO, Protocol

_LAST_BYTES = 4000


class Process(Protocol):
    """A child of this process."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """Its exit code, None = it lives."""

    def wait(self, timeout: float) -> int | None:
        """The same, after so many seconds at most."""

    def kill(self) -> None:
        """End it at once."""

    def release(self) -> None:
        """Close what is open for it."""


class NotStarted:
    """What is there instead of a process that could not be started, or was no longer wanted."""

    def __init__(self, code: int, reason: str) -> None:
        self._code, self._reason = code, reason

    @property
    def pid(self) -> int:
        """Has none.

        Raises:
            ProcessLookupError: always.
        """
        raise ProcessLookupError(self._reason)

    def poll(self) -> int | None:
        """See `Process`."""
        return self._code

    def wait(self, timeout: float) -> int | None:
        """See `Process`."""
        return self._code

    def kill(self) -> None:
        """There is nothing to end."""

    def release(self) -> None:
        """Nothing is open for it."""


class LocalMember:
    """A process that was asked for."""

    def __init__(self, member_id: int, place: int, words: IO[bytes]) -> None:
        self.member_id, self.place = member_id, place
        self._words = words
        self._process: Future[Process] = Future()
        self._lock = threading.Lock()
        self._life: int | None = None  # our end of its standard input: a pipe, whose end it takes for ours
        self.is_killed = False

    @property
    def pid(self) -> int:
        """Its process id; waits until it has started.

        Raises:
            ProcessLookupError: it could not be started.
        """
        return self._process.result().pid

    @property
    def words(self) -> int:
        """The open file for what it prints."""
        return self._words.fileno()

    @property
    def is_released(self) -> bool:
        """Whether nothing is open for it."""
        return self._words.closed

    def is_alive(self) -> bool:
        """See `Member`."""
        return not self._process.done() or self._process.result().poll() is None

    def has_started(self) -> bool:
        """See `Member`."""
        return self._process.done()

    def kill(self) -> None:
        """See `Member`."""
        with self._lock:
            self.is_killed = True
        if self._process.done():
            self._process.result().kill()

    def wait(self, timeout: float) -> int | None:
        """See `Member`."""
        deadline = time.monotonic() + timeout
        try:
            process = self._process.result(timeout)
        except FutureTimeoutError:
            return None
        return process.wait(max(deadline - time.monotonic(), 0.0))

    def last_words(self) -> str:
        """See `Member`."""
        if self._words.closed:
            return ""
        size = os.fstat(self._words.fileno()).st_size
        content = os.pread(self._words.fileno(), _LAST_BYTES, max(size - _LAST_BYTES, 0))
        return content.decode(errors="replace").strip()

    def release(self) -> None:
        """See `Member`."""
        with self._lock:
            self._words.close()
            life, self._life = self._life, None
        if self._process.done():
            self._process.result().release()
        if life is not None:
            os.close(life)

    def begin(self, process: Process, life: int | None) -> None:
        """It has started, and reads its job from the pipe of which `life` is our end."""
        with self._lock:
            self._life = life
            self._process.set_result(process)
            is_killed, is_released = self.is_killed, self.is_released
        if is_killed:
            process.kill()
        if is_released:
            self.release()
