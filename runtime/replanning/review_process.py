"""ReviewProcess: a review in a process of its own, which serving does not wait for and cannot be hurt by.

The process is started anew for every review, runs at low priority with one thread per library, and is ended when it
takes too long. It ends by itself when its parent does: it holds the other end of a pipe. Task and result go through
unnamed files that only these two processes have open, so nothing is left behind, whoever dies.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import IO, Protocol

from moeplace.placement.replacement.review import Review, ReviewTask, review
from moeplace.profiling.errors import MoeplaceError

NICENESS = 10
GRACE = 60.0
"""Seconds beside the search that a review may take: imports, drift test, evaluation, plan."""


@dataclass(frozen=True)
class ReviewFailure:
    """A review without a result.

    Attributes:
        sentence: what happened.
    """

    sentence: str


Outcome = Review | ReviewFailure


class ReviewRunner(Protocol):
    """Runs one review at a time."""

    def start(self, task: ReviewTask) -> None:
        """Begin; returns at once. The one before must have ended."""

    def poll(self) -> Outcome | None:
        """What came of it, once; None = not yet, or nothing was begun."""

    def cancel(self) -> None:
        """End it without a result."""


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    deadline: float
    result: IO[bytes]
    words: IO[bytes]  # what it prints

    def close(self) -> None:
        assert self.process.stdin is not None
        for file in (self.process.stdin, self.result, self.words):
            file.close()


class ReviewProcess:
    """A `ReviewRunner` in another process.

    Attributes:
        timeout: seconds after which a review is ended; None = three times its search and `GRACE`.
    """

    def __init__(self, *, timeout: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.timeout, self._clock = timeout, clock
        self._running: _Running | None = None

    @property
    def pid(self) -> int | None:
        """Of the process at work."""
        return None if self._running is None else self._running.process.pid

    def start(self, task: ReviewTask) -> None:
        """See `ReviewRunner`."""
        assert self._running is None, "a review is under way"
        limit = 3 * task.settings.time_limit + GRACE if self.timeout is None else self.timeout
        with ExitStack() as opened, tempfile.TemporaryFile() as content:
            result, words = (opened.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            pickle.dump(task, content)  # to our own process, through a file that has no name
            content.seek(0)
            files = (content.fileno(), result.fileno())
            process = subprocess.Popen(
                [sys.executable, "-m", "moeplace.runtime.replanning.review_process", *map(str, files)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=words,
                pass_fds=files,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            opened.pop_all()  # open until the process has ended
        self._running = _Running(process, self._clock() + limit, result, words)

    def poll(self) -> Outcome | None:
        """See `ReviewRunner`."""
        running = self._running
        if running is None:
            return None
        code = running.process.poll()
        if code is None:
            if self._clock() < running.deadline:
                return None
            self.cancel()
            return ReviewFailure("the review was ended because it took too long")
        self._running = None
        try:
            return _outcome(running, code)
        finally:
            running.close()

    def wait(self, timeout: float) -> Outcome | None:
        """`poll`, after waiting for the process to end, for `timeout` seconds at most."""
        if self._running is not None:
            with suppress(subprocess.TimeoutExpired):
                self._running.process.wait(timeout)
        return self.poll()

    def cancel(self) -> None:
        """See `ReviewRunner`."""
        running, self._running = self._running, None
        if running is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)  # its own session: what it started ends with it
        running.process.wait()
        running.close()


def _outcome(running: _Running, code: int) -> Outcome:
    if code == 0:
        try:
            running.result.seek(0)
            result = pickle.load(running.result)
        except Exception as error:  # of our own process: but who waits for it must hear of an end
            return ReviewFailure(f"the result of the review could not be read: {error}")
        return result if isinstance(result, Review) else ReviewFailure(str(result))
    if code < 0:
        return ReviewFailure(f"the process of the review was ended by signal {-code}")
    running.words.seek(0)
    lines = [line.strip() for line in running.words.read().decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1][:200] if lines else "it said nothing"
    return ReviewFailure(f"the process of the review failed with exit code {code}: {last}")


def main(arguments: list[str]) -> int:
    """Read a task from one descriptor, write its result, or a sentence, to the other."""
    os.nice(NICENESS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    source, target = (int(argument) for argument in arguments)
    with os.fdopen(source, "rb") as file:
        task = pickle.load(file)
    result: Review | str
    try:
        result = review(task)
    except MoeplaceError as error:
        result = str(error)
    with os.fdopen(target, "wb") as file:
        pickle.dump(result, file)
    return 0


def _end_with_parent() -> None:
    """Standard input is a pipe that the parent never writes to: it ends when the parent does."""
    os.read(sys.stdin.fileno(), 1)  # not through a buffer, whose lock would be held at the end of the interpreter
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
