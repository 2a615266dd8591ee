"""Members of a machine have places: the number of their GPU, free again when they have ended. They leave nothing."""

import os
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeplace.runtime.service.coordinator.processes import MemberProcesses
from moeplace.runtime.service.options import MemberJob, ServiceOptions
from moeplace.runtime.service.spawner import LocalSpawner


class FakeProcess:
    """A process that reads what it is told, and ends when it is killed."""

    pid = 0

    def __init__(self, *_: Any, stdin: int, **__: Any) -> None:
        self.code: int | None = None
        self._input = os.dup(stdin)

    def told(self) -> bytes:
        return os.read(self._input, 1 << 16)

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -9

    def wait(self, timeout: float) -> int | None:
        return self.code


def test_the_lowest_free_place_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members 0 to 3 at places 0 to 3; who comes after 1 and 2 are gone takes those, whatever its own number."""
    processes: list[FakeProcess] = []

    def start(*words: Any, **options: Any) -> FakeProcess:
        processes.append(FakeProcess(*words, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    spawner = LocalSpawner(forks=False)
    job = MemberJob(0, "127.0.0.1", 1, "p", "checkpoint", ServiceOptions(device="cuda"))
    members = [spawner.start(number, job) for number in range(4)]
    assert [member.pid for member in members] == [0, 0, 0, 0]  # all have started
    assert [member.place for member in members] == [0, 1, 2, 3]
    for number in (2, 1):
        members[number].kill()
    later = [spawner.start(number, job) for number in (4, 5, 6)]
    assert [member.place for member in later] == [1, 2, 4]
    assert later[0].pid == 0
    told = processes[4].told()
    assert b'"place": 1' in told
    assert b'"device": "cuda"' in told
    spawner.close()


@pytest.mark.parametrize("program", ["true", "false"])
def test_nothing_stays_open_for_members_that_have_ended(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there were: a service of which ranks come and go must not run out of files."""
    monkeypatch.setattr(sys, "executable", program)
    job = MemberJob(0, "127.0.0.1", 1, "p", "checkpoint", ServiceOptions())
    died: queue.Queue[dict[str, Any]] = queue.Queue()
    spawner = LocalSpawner()
    processes = MemberProcesses(spawner, job_of=lambda member: job, report=died.put)
    numbers = []
    for member in range(12):
        processes.start(member)
        assert died.get(timeout=30)["code"] == ["true", "false"].index(program)
        numbers.append(len(os.listdir("/proc/self/fd")))
    assert len(spawner._started) == 1  # the last one, until another is started
    processes.close(30)
    assert max(numbers) == numbers[0]


def test_the_last_words_of_a_member_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that failed, and of none that was released."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho first\necho out of luck >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    job = MemberJob(0, "127.0.0.1", 1, "p", "checkpoint", ServiceOptions())
    died: queue.Queue[dict[str, Any]] = queue.Queue()
    spawner = LocalSpawner()
    processes = MemberProcesses(spawner, job_of=lambda member: job, report=died.put)
    processes.start(0)
    report = died.get(timeout=30)
    assert (report["code"], report["error"]) == (3, "its process ended with code 3: out of luck")
    assert spawner._started[0].last_words() == ""
    processes.close(30)
