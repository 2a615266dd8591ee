"""LocalSpawner: members of a service as processes of this machine."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from moeplace.runtime.comm.devices import Machine, ThisMachine
from moeplace.runtime.service.errors import sentence_of
from moeplace.runtime.service.forks import ForkServer, ForkServerError, can_fork
from moeplace.runtime.service.local_member import LocalMember, NotStarted, Process
from moeplace.runtime.service.options import MemberJob

logger = logging.getLogger(__name__)

_PASSED_ON = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG")


class Program:
    """A process that runs a program of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """See `Process`."""
        return self._process.pid

    def poll(self) -> int | None:
        """See `Process`."""
        return self._process.poll()

    def wait(self, timeout: float) -> int | None:
        """See `Process`."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self._process.poll()

    def kill(self) -> None:
        """See `Process`."""
        self._process.kill()

    def release(self) -> None:
        """Nothing is open for it."""


class LocalSpawner:
    """Starts members as forks of a process that has imported what they need (`ForkServer`), in tens of milliseconds.

    They are programs of their own (`python -m moeplace.runtime.service.member.start`), each with its own imports, where
    the system cannot fork them, and where they compute on GPUs. They end with this process, however it ends: see there.
    What they print goes to `member-ID.log` in a folder, or without one to files that have no name, so that nothing is
    left behind.

    Attributes:
        folder: None = none was given.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        fork_server: ForkServer | None = None,
        forks: bool = True,
        machine: Machine | None = None,
    ) -> None:
        """`fork_server` lives on when this is closed; None = one of its own. Without `forks` every member is a program
        of its own. `machine` tells of GPUs, None = this one."""
        self.folder = None if folder is None else Path(folder)
        self._started: list[LocalMember] = []
        self._server, self._owns_server = fork_server or ForkServer(), fork_server is None
        self._forks = forks and can_fork()
        self._machine: Machine = machine or ThisMachine()
        # Programs are killed when the thread that started them ends: so it is one that lives as long as the spawner.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="spawner")

    def start(self, member_id: int, job: MemberJob) -> LocalMember:
        """See `Spawner`. The first fork comes after the imports of the fork server."""
        self._started = [member for member in self._started if not member.is_released]
        place = self._free_place()
        words: IO[bytes] = tempfile.TemporaryFile() if self.folder is None else self._log(member_id)  # noqa: SIM115
        member = LocalMember(member_id, place, words)
        try:
            self._starter.submit(self._start, member, replace(job, place=place))
        except RuntimeError:  # of a spawner that was closed
            member.release()
            raise
        self._started.append(member)
        return member

    def close(self) -> None:
        """See `Spawner`."""
        for member in self._started:
            member.kill()
        if self._owns_server:
            self._server.close()
        for member in self._started:
            member.wait(10.0)
            member.release()
        self._starter.shutdown()

    def _start(self, member: LocalMember, job: MemberJob) -> None:
        """In the thread of the starter."""
        process: Process
        life: int | None = None
        try:
            if member.is_killed:
                process = NotStarted(-signal.SIGKILL, "it was killed before it started")
            else:
                process, life = self._start_process(member, job)
        except Exception as error:
            if not member.is_killed:  # else the fork server was closed meanwhile
                logger.exception("member %d could not be started", member.member_id)
            process = NotStarted(1, sentence_of(error))
            with suppress(OSError, ValueError):  # nobody may want to know any more
                os.write(member.words, sentence_of(error).encode() + b"\n")
        member.begin(process, life)

    def _start_process(self, member: LocalMember, job: MemberJob) -> tuple[Process, int]:
        """As a fork if that is possible, and our end of its standard input."""
        environment = {
            **os.environ,
            **member_environment(job.host, chatter=os.environ.get("TORCH_CPP_LOG_LEVEL")),
            "OMP_NUM_THREADS": str(job.options.threads),
        }
        content = json.dumps(job.to_json()).encode() + b"\n"
        if self._forks and (job.options.device == "cpu" or not self._machine.gpus()):
            try:
                return _with_job(
                    content,
                    lambda file: self._server.fork(job.checkpoint, environment, words=member.words, job=file),
                )
            except ForkServerError as error:
                if member.is_killed:
                    raise
                logger.warning("member %d starts as a program of its own: %s", member.member_id, error)
        return _with_job(content, lambda file: _run_program(environment, words=member.words, job=file))

    def _free_place(self) -> int:
        """The lowest number that no living member has: a GPU is free again when its member has ended."""
        taken = {member.place for member in self._started if member.is_alive()}
        return next(place for place in range(len(taken) + 1) if place not in taken)

    def _log(self, member_id: int) -> IO[bytes]:
        assert self.folder is not None
        return (self.folder / f"member-{member_id}.log").open("a+b")  # a service before may have left one


def _with_job(content: bytes, start: Callable[[int], Process]) -> tuple[Process, int]:
    """Start a process with one end of a pipe, and write its job, which holds a secret, to the other end, which stays
    open for as long as we live."""
    theirs, ours = os.pipe()
    try:
        process = start(theirs)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    with suppress(BrokenPipeError):  # it has ended already, which its exit code says
        while content:
            content = content[os.write(ours, content) :]
    return process, ours


def _run_program(environment: dict[str, str], *, words: int, job: int) -> Process:
    command = [sys.executable, "-m", "moeplace.runtime.service.member.start", str(os.getpid())]
    # A session of its own: Ctrl-C is for the coordinator, which ends its members in order.
    options = {"stdin": job, "stdout": words, "stderr": words, "env": environment, "start_new_session": True}
    return Program(subprocess.Popen(command, **options))  # type: ignore[call-overload]


def member_environment(host: str, *, chatter: str | None = None) -> dict[str, str]:
    """One thread per rank, no chatter of the store unless it is wanted, and the networks that were named here; the
    loopback interface for gloo where the store is there."""
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # a lost peer must not end this process: see `CollectiveWatch`
    environment["TORCH_CPP_LOG_LEVEL"] = chatter or "ERROR"
    if host.startswith("127.") and Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
