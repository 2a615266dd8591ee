"""The threads of a coordinator: none outlives it. One inside torch when the interpreter goes aborts the process."""

import queue
import threading
import time
from typing import Any

import pytest

from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.coordinator.processes import MemberProcesses
from moeplace.runtime.service.options import MemberJob
from tests.shared_data import tiny_moe_path

WAIT = 30.0


class DumbMember:
    """A member that never says anything while it lives, and takes its time when it is asked for its last words."""

    def __init__(self, member_id: int) -> None:
        self.member_id = member_id
        self.ended = threading.Event()
        self.waits_for_room = self.refuses_to_end = self.refuses_to_be_released = self.is_released = False

    def is_alive(self) -> bool:
        return not self.ended.is_set()

    def has_started(self) -> bool:
        return not self.waits_for_room

    def kill(self) -> None:
        if self.refuses_to_end:
            raise OSError("it is not ours")
        self.ended.set()

    def wait(self, timeout: float) -> int | None:
        return -9 if self.ended.wait(timeout) else None

    def last_words(self) -> str:
        assert not self.is_released
        time.sleep(0.1)  # of a file or a cluster: this is where a watcher was when its process ended
        return "bye"

    def release(self) -> None:
        self.is_released = True
        if self.refuses_to_be_released:
            raise OSError("the disk is full")


class DumbSpawner:
    """Starts such members; `refused` of them not."""

    def __init__(self, refused: int = -1) -> None:
        self.members: list[DumbMember] = []
        self.refused = refused

    def start(self, member_id: int, job: MemberJob) -> DumbMember:
        if member_id == self.refused:
            raise OSError("no room")
        self.members.append(DumbMember(member_id))
        return self.members[-1]

    def close(self) -> None:
        for member in self.members:
            member.kill()


@pytest.fixture
def before() -> set[threading.Thread]:
    return set(threading.enumerate())


def test_none_is_left_when_a_service_is_closed(before: set[threading.Thread]) -> None:
    """Whoever watches, reminds, delivers or reports: all have ended when `close` returns."""
    service = Coordinator(tiny_moe_path(), ranks=2, spawner=DumbSpawner())
    assert {"watch-0", "watch-1"} <= {thread.name for thread in set(threading.enumerate()) - before}
    service.close(drain=False)
    assert set(threading.enumerate()) <= before
    service.close()  # again: nothing happens


def test_an_end_is_told_whatever_becomes_of_what_was_open(caplog: pytest.LogCaptureFixture) -> None:
    """With the code and the last words; that it could not be closed is in the log."""
    died: queue.Queue[dict[str, Any]] = queue.Queue()
    spawner = DumbSpawner()
    processes = MemberProcesses(spawner, job_of=lambda member: None, report=died.put)  # type: ignore[arg-type, return-value]
    processes.start(0)
    spawner.members[0].refuses_to_be_released = True
    processes.kill(0)
    report = died.get(timeout=WAIT)
    assert (report["member"], report["code"]) == (0, -9)
    assert report["error"].endswith(": bye")
    assert spawner.members[0].is_released
    assert "could not be closed" in caplog.text
    processes.close(WAIT)


def test_members_are_ended_by_their_number(caplog: pytest.LogCaptureFixture) -> None:
    """One that is not there any more, or cannot be ended, is no error; each is told of once."""
    died: queue.Queue[int] = queue.Queue()
    spawner = DumbSpawner()
    processes = MemberProcesses(spawner, job_of=lambda member: None, report=lambda report: died.put(report["member"]))  # type: ignore[arg-type, return-value]
    for member in (3, 4, 5):
        processes.start(member)
    assert processes[4] is spawner.members[1]
    assert processes.have_started()
    spawner.members[2].waits_for_room = True
    assert [processes.has_started(member) for member in (3, 5, 6)] == [True, False, True]
    assert not processes.have_started()
    processes.kill(4)
    assert died.get(timeout=WAIT) == 4
    processes.kill(4)
    processes.wait(0.01)  # the others live on
    assert [member.is_alive() for member in spawner.members] == [True, False, True]
    assert not caplog.records
    spawner.members[0].refuses_to_end = True
    processes.kill(3)
    assert "member 3 could not be killed" in caplog.text
    spawner.members[0].refuses_to_end = False
    processes.close(WAIT)
    assert sorted(died.get_nowait() for _ in range(2)) == [3, 5]


def test_members_are_watched_once_each(before: set[threading.Thread]) -> None:
    """One that ends and one that cannot be started are both told of, with what was said last; none stays known."""
    spawner = DumbSpawner(refused=1)
    service = Coordinator(tiny_moe_path(), ranks=2, spawner=spawner)
    try:
        assert service.wait_for(lambda status: 1 not in status.allocated, timeout=WAIT)
        spawner.members[0].kill()
        assert service.wait_for(lambda status: 0 not in status.allocated, timeout=WAIT)
        sentences = [event.sentence for event in service.events()]
        assert any("no room" in sentence for sentence in sentences)
        assert any("its process ended with code -9: bye" in sentence for sentence in sentences)
        with pytest.raises(KeyError):
            service.member(0)
    finally:
        service.close(drain=False)
    assert set(threading.enumerate()) <= before
