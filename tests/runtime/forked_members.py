"""Members of a service as forks of a process that has imported torch and transformers: a start costs no import.

For tests of what a service does, which start many members. How members are really started (a program of their own that
ends with its parent) is what the tests that kill a coordinator, the HTTP front and `bench elastic` go through.
"""

import multiprocessing as mp
import os
import sys
import tempfile
import threading
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from moeplace.runtime.service.options import MemberJob
from moeplace.runtime.service.spawner import member_environment
from tests.rank_pool import IMPORTED

_LAST_CHARACTERS = 4000


class ForkedMember:
    """A started process; see `Member`."""

    def __init__(self, member_id: int, process: Any, words: Path) -> None:
        self.member_id, self._process, self._words = member_id, process, words

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def is_alive(self) -> bool:
        return bool(self._process.is_alive())

    def has_started(self) -> bool:
        return True

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def last_words(self) -> str:
        return self._words.read_text(errors="replace")[-_LAST_CHARACTERS:].strip()

    def release(self) -> None:
        """Nothing is open for it."""


class ForkingSpawner:
    """Starts members as forks; what they print goes to `member-ID.log` in a folder. See `Spawner`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="moeplace-members-")
        self.folder = Path(self._own.name) if folder is None else folder
        self._started: list[ForkedMember] = []
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)

    def start(self, member_id: int, job: MemberJob) -> ForkedMember:
        words = self.folder / f"member-{member_id}.log"
        words.touch()
        process = self._context.Process(target=_be_member, args=(job.to_json(), str(words)), daemon=True)
        process.start()
        member = ForkedMember(member_id, process, words)
        self._started.append(member)
        return member

    def close(self) -> None:
        for member in self._started:
            member.kill()
        for member in self._started:
            member.wait(10.0)


def _be_member(job: dict[str, Any], words: str) -> None:
    log = os.open(words, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    made = MemberJob.from_json(job)
    os.environ.update(member_environment(made.host))
    parent = mp.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()

    from moeplace.runtime.service.member.loop import run_member

    code = run_member(made)
    sys.stdout.flush()
    os._exit(code)


def _end_with(sentinel: int) -> None:
    """The process that started this one is gone: so is this one."""
    wait([sentinel])
    os._exit(1)
