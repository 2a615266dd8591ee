"""MemberProcesses: members are started, watched and ended here, and what becomes of them is reported."""

import logging
import threading
import time
from collections.abc import Callable

from moeplace.runtime.service.coordinator.actions import Document
from moeplace.runtime.service.coordinator.helpers import Threads
from moeplace.runtime.service.errors import sentence_of
from moeplace.runtime.service.options import Member, MemberJob, Spawner

logger = logging.getLogger(__name__)


class MemberProcesses:
    """See the module. All methods are thread-safe.

    Args:
        job_of: what a member is told.
        report: told "died" once for each that was to start.
    """

    def __init__(
        self, spawner: Spawner, *, job_of: Callable[[int], MemberJob], report: Callable[[Document], None]
    ) -> None:
        self._spawner, self._job_of, self._report = spawner, job_of, report
        self._lock = threading.Lock()
        self._alive: dict[int, Member] = {}
        self._watchers = Threads()

    def __getitem__(self, member_id: int) -> Member:
        """One that is alive; KeyError = it is not."""
        with self._lock:
            return self._alive[member_id]

    def start(self, member_id: int) -> None:
        """Start one, or report why not."""
        try:
            process = self._spawner.start(member_id, self._job_of(member_id))
        except Exception as error:
            logger.exception("member %d could not be started", member_id)
            self._report({"kind": "died", "member": member_id, "code": None, "error": sentence_of(error)})
            return
        with self._lock:
            self._alive[member_id] = process
        self._watchers.start(f"watch-{member_id}", lambda: self._watch(process))

    def kill(self, member_id: int) -> None:
        """End one at once; one that has ended is ignored."""
        with self._lock:
            process = self._alive.get(member_id)
        try:
            if process is not None:
                process.kill()
        except Exception:
            logger.exception("member %d could not be killed", member_id)

    def has_started(self, member_id: int) -> bool:
        """Whether one does not wait for room."""
        with self._lock:
            process = self._alive.get(member_id)
        return process is None or process.has_started()

    def have_started(self) -> bool:
        """Whether none waits for room."""
        with self._lock:
            processes = list(self._alive.values())
        return all(process.has_started() for process in processes)

    def wait(self, timeout: float) -> None:
        """Until all have ended, or so many seconds are over."""
        with self._lock:
            processes = list(self._alive.values())
        deadline = time.monotonic() + timeout
        for process in processes:
            process.wait(max(deadline - time.monotonic(), 0.0))

    def close(self, timeout: float) -> None:
        """End all; all is reported afterwards, or so many seconds are over."""
        self._spawner.close()
        self._watchers.join(timeout)

    def _watch(self, process: Member) -> None:
        """Report when a member has ended: what it reported before is in the queue already."""
        member_id, words = process.member_id, ""
        try:
            while (code := process.wait(3600.0)) is None:
                pass
            words = process.last_words() if code else ""
        except Exception as error:
            logger.exception("member %d cannot be watched", member_id)
            code, words = -1, sentence_of(error)
        self._release(process)
        told = f"its process ended with code {code}"
        if words:
            told = f"{told}: {words.splitlines()[-1][:200]}"
            logger.info("the last that member %d printed:\n%s", member_id, words)
        with self._lock:
            self._alive.pop(member_id, None)
        self._report({"kind": "died", "member": member_id, "code": code, "error": told})

    def _release(self, process: Member) -> None:
        try:
            process.release()
        except Exception:  # its end is told all the same
            logger.exception("what was open for member %d could not be closed", process.member_id)
