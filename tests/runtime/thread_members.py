"""Members of a service as threads of this process: a start costs no process, and many losses can be tried in seconds.

A member that is killed raises `Killed` at the moment at which a fault is due and closes its connections, as the end of
a process would. What this cannot show: a member that stops in the middle of torch, and what becomes of its process.
"""

import gc
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opening import ServedModel, open_model
from moeplace.runtime.service.faults import FaultPlan
from moeplace.runtime.service.generation import Forming
from moeplace.runtime.service.member import heartbeat as heartbeat_module
from moeplace.runtime.service.member import loop as loop_module
from moeplace.runtime.service.options import MemberJob
from moeplace.runtime.service.store import ServiceStore

_KILLED = -9
_POLL = 0.002
_LAST_WORDS = 20.0


class Killed(BaseException):
    """The end of a member, which no code of its own can handle."""


class ThreadFaults(FaultPlan):
    """Faults of a member that is a thread; those that have come about are noted.

    Attributes:
        is_killed: whether it ends as soon as it does anything.
        fired: faults that were due.
    """

    def __init__(self, faults: Any) -> None:
        super().__init__(faults)
        self.is_killed = False
        self.fired: list[Mapping[str, Any]] = []

    def reach(self, phase: str, *, after: bool = False) -> None:
        if self.is_killed:
            raise Killed
        super().reach(phase, after=after)

    def _do(self, fault: Mapping[str, Any]) -> None:
        self.fired.append(fault)
        self.is_killed = True
        raise Killed


def _end_if_killed() -> None:
    loop = getattr(threading.current_thread(), "loop", None)
    if loop is not None and "_faults" in loop.__dict__ and loop._faults.is_killed:
        raise Killed


class ThreadStore(ServiceStore):
    """A connection that a member does not wait at when it is killed."""

    def find(self, key: str) -> Any | None:
        _end_if_killed()
        return super().find(key)

    def read(self, key: str) -> Any:
        # The other end is a server of torch, whose own waiting nobody could end when this member is killed.
        while (value := self.find(key)) is None:
            time.sleep(_POLL)
        return value


class ThreadLoop(loop_module.MemberLoop):
    """A member that says to its thread what has to be closed when it is killed."""

    def __init__(self, job: MemberJob) -> None:
        threading.current_thread().loop = self  # type: ignore[attr-defined]
        super().__init__(job)

    def _start_forming(self, generation: Any) -> Forming:
        forming = super()._start_forming(generation)
        self.__dict__.setdefault("formings", []).append(forming)
        return forming

    def release(self) -> None:
        """Close what the end of a process would close, as far as it has come."""
        for forming in self.__dict__.get("formings", []):
            forming.abandon()
        if "_group" in self.__dict__:
            self._close_group()
        if "_heartbeat" in self.__dict__:
            self._heartbeat.stop()


class ThreadMember:
    """See `Member`."""

    def __init__(self, member_id: int, job: MemberJob) -> None:
        self.member_id, self._job = member_id, job
        self._code: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"member-{member_id}", daemon=True)
        self._thread.start()

    @property
    def faults(self) -> ThreadFaults | None:
        loop = getattr(self._thread, "loop", None)
        return None if loop is None else loop.__dict__.get("_faults")

    def is_alive(self) -> bool:
        return self._code is None

    def has_started(self) -> bool:
        return True

    def kill(self) -> None:
        if self.faults is not None:
            self.faults.is_killed = True
        self._end(_KILLED)

    def wait(self, timeout: float) -> int | None:
        self._ended.wait(timeout)
        return self._code

    def last_words(self) -> str:
        return ""

    def release(self) -> None:
        """Nothing is open for it."""

    def _run(self) -> None:
        code = _KILLED
        try:
            code = loop_module.run_member(self._job)
        except Killed:
            pass
        finally:
            loop = getattr(self._thread, "loop", None)
            if loop is not None:
                loop.release()
            self._end(code)

    def _end(self, code: int) -> None:
        """With this code, unless it has ended before."""
        self._code = code if self._code is None else self._code
        self._ended.set()


class ThreadSpawner:
    """Starts members as threads. See `Spawner`.

    Attributes:
        started: all members that were.
        opened: checkpoints and models by folder.
        read_while: what members gave as sign of life when they read experts.
    """

    def __init__(self) -> None:
        self.started: list[ThreadMember] = []
        self.read_while: set[str] = set()
        self.opened: dict[str, tuple[Checkpoint, ServedModel]] = {}

    def open(self, path: Path, dtype: torch.dtype) -> None:
        """What members share: they read experts of it, and keep nothing of a pass in it but for their last rows."""
        checkpoint = Checkpoint(path)
        model: Any = open_model(checkpoint, dtype=dtype)
        logits, lock = model.logits, threading.Lock()

        def one_by_one(x: torch.Tensor) -> torch.Tensor:
            with lock:
                found: torch.Tensor = logits(x)
                return found

        model.logits = one_by_one
        read = checkpoint.expert

        def read_expert(layer: int, expert: int) -> Any:
            self.read_while.add(threading.current_thread().loop._heartbeat.state)  # type: ignore[attr-defined]
            return read(layer, expert)

        checkpoint.expert = read_expert  # type: ignore[method-assign]
        self.opened[str(path)] = checkpoint, model

    def checkpoint(self, path: Path) -> Checkpoint:
        """One that was opened."""
        return self.opened[str(path)][0]

    def start(self, member_id: int, job: MemberJob) -> ThreadMember:
        self.started.append(ThreadMember(member_id, job))
        return self.started[-1]

    def close(self) -> None:
        for member in self.started:
            member.kill()

    def fired(self) -> list[tuple[int, str, int, bool]]:
        """(member, phase, at, after) of the faults that came about."""
        return [
            (member.member_id, fault["phase"], fault["at"], fault.get("after", False))
            for member in self.started
            if member.faults is not None
            for fault in member.faults.fired
        ]


@pytest.fixture
def thread_members(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadSpawner]:
    """A spawner, with members prepared for being threads: none of them ends this process, and all have what was
    opened beforehand (`ThreadSpawner.open`), because to open a model changes settings of torch that threads share."""
    before, spawner = set(threading.enumerate()), ThreadSpawner()
    monkeypatch.setattr(loop_module, "open_checkpoint", lambda path, precision: spawner.opened[str(path)][0])
    monkeypatch.setattr(loop_module, "open_model", lambda checkpoint, **_: spawner.opened[str(checkpoint.path)][1])
    monkeypatch.setattr(loop_module, "ServiceStore", ThreadStore)
    monkeypatch.setattr(loop_module, "MemberLoop", ThreadLoop)
    monkeypatch.setattr(loop_module, "FaultPlan", ThreadFaults)
    monkeypatch.setattr(heartbeat_module, "os", type("NoExit", (), {"_exit": staticmethod(lambda code: None)}))
    yield spawner
    spawner.close()
    gc.collect()  # with the coordinator goes its store, and with that whoever still waits there to connect
    for thread in set(threading.enumerate()) - before:  # one inside torch when Python ends would abort it
        thread.join(_LAST_WORDS)
