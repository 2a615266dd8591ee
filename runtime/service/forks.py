"""ForkServer: members of this machine as forks of a process that has imported what they need (Linux).

A member that starts as a program of its own takes seconds of processor time for imports; a fork takes none, and shares
their memory. To those who started it a fork is what a program would be: a child of this process, which it can wait for,
and with which it ends (see `moeplace.runtime.service.member.start`). The fork server may end at any time: its forks
live on, and the next one that is asked for comes from a new one.
"""

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_UNKNOWN_CODE = 255
_CLOSED = "the fork server is closed"
_adopting = threading.Lock()
"""Whether orphans are adopted is a property of the process, not of a server."""


class ForkServerError(Exception):
    """Members cannot be forked here; the message says why."""


class ForkedProcess:
    """A child of this process that another one has forked. All methods are thread-safe.

    Attributes:
        pid: its process id.

    Raises:
        OSError: it is no child of this process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._lock = threading.Lock()
        self._code: int | None = None
        self._handle: int | None = os.pidfd_open(pid)
        try:
            os.waitid(os.P_PIDFD, self._handle, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except OSError:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            os.close(self._handle)
            raise

    def poll(self) -> int | None:
        """Its exit code, negative where a signal has ended it; None = it lives."""
        with self._lock:
            if self._code is None and self._handle is not None:
                self._code = _code_of(self._handle)
            return self._code

    def wait(self, timeout: float) -> int | None:
        """As `poll`, after at most so many seconds."""
        with self._lock:
            handle = None if self._handle is None else os.dup(self._handle)  # it may be released meanwhile
        if handle is not None:
            try:
                poller = select.poll()
                poller.register(handle, select.POLLIN)
                poller.poll(max(timeout, 0.0) * 1e3)
            finally:
                os.close(handle)
        return self.poll()

    def kill(self) -> None:
        """End it at once; nothing happens where it has ended."""
        with self._lock, suppress(ProcessLookupError):
            if self._code is None and self._handle is not None:
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def release(self) -> None:
        """Nothing more is asked of it but what is known."""
        with self._lock:
            if self._handle is not None:
                os.close(self._handle)
            self._handle = None


def _code_of(handle: int) -> int | None:
    try:
        ended = os.waitid(os.P_PIDFD, handle, os.WEXITED | os.WNOHANG)
    except ChildProcessError:  # somebody has waited for all children of this process
        return _UNKNOWN_CODE
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


@dataclass(frozen=True)
class _Running:
    """A fork server that has said that it is ready."""

    process: "subprocess.Popen[bytes]"
    connection: socket.socket
    kind: tuple[Any, ...]  # what else the process was started with

    def close(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


class ForkServer:
    """See the module. All methods are thread-safe; one fork is made after the other.

    The process starts when the first fork is asked for, and again where one is wanted with another environment, from
    another working directory, or after it has ended.

    A process that never says that it is ready is not tried twice, nor one whose forks fail twice in a row.

    Attributes:
        timeout: seconds for its imports, and for a fork.
    """

    def __init__(self, *, timeout: float = 120.0) -> None:
        self.timeout = timeout
        self._running: _Running | None = None
        self._refusal, self._failed = "", 0
        self._starting: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()
        # The process is killed when the thread that started it ends: so it is one that lives as long as this object.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fork-server")

    @property
    def pid(self) -> int | None:
        """Of its process; None = there is none."""
        running = self._running
        return None if running is None else running.process.pid

    def fork(self, checkpoint: str | None, environment: Mapping[str, str], *, words: int, job: int) -> ForkedProcess:
        """A member.

        Args:
            checkpoint: what serving it takes is imported before the first fork; None = nothing is.
            environment: of its process.
            words: file for what it prints.
            job: file from which it reads its job, a line that is written *after* this has returned.

        Raises:
            ForkServerError: it cannot be forked.
        """
        try:
            forking = self._thread.submit(self._fork, checkpoint, dict(environment), words, job)
        except RuntimeError as error:  # of an executor that was shut down
            raise ForkServerError(_CLOSED) from error
        return forking.result()

    def close(self) -> None:
        """End the server; its forks live on."""
        self._closed.set()
        running = self._running
        for process in (self._starting, None if running is None else running.process):
            if process is not None:
                process.kill()  # nobody waits for its answer
        with suppress(RuntimeError):  # it is closed already
            self._thread.submit(self._drop).result()
        self._thread.shutdown()

    def _fork(self, checkpoint: str | None, environment: dict[str, str], words: int, job: int) -> ForkedProcess:
        if self._closed.is_set() or self._refusal:
            raise ForkServerError(self._refusal or _CLOSED)
        try:
            running = self._started(checkpoint, environment)
            with _orphans_adopted():
                socket.send_fds(running.connection, [b"f"], [words, job])
                answer = _read_answer(running.connection)
                if "pid" not in answer:
                    raise ForkServerError(str(answer.get("error", answer)))
                process = ForkedProcess(int(answer["pid"]))
            self._failed = 0
            return process
        except (OSError, ValueError) as error:
            self._drop()
            sentence = f"{type(error).__name__}: {error}"
            self._failed += 1
            if self._failed > 1:  # in a row: it is the system, not an accident
                self._refusal = sentence
            raise ForkServerError(sentence) from error

    def _started(self, checkpoint: str | None, environment: dict[str, str]) -> _Running:
        """The server for forks with this environment."""
        kind = (sys.executable, os.getcwd(), environment)
        if self._running is not None and (self._running.kind != kind or self._running.process.poll() is not None):
            self._drop()
        if self._running is None:
            self._running = self._start(checkpoint, kind)
        return self._running

    def _start(self, checkpoint: str | None, kind: tuple[Any, ...]) -> _Running:
        executable, _, environment = kind
        here, there = socket.socketpair()
        module = "moeplace.runtime.service.member.fork_server"
        with tempfile.TemporaryFile() as words:
            with there, ExitStack() as failing:
                failing.callback(here.close)
                process = subprocess.Popen(
                    [executable, "-m", module, str(os.getpid()), str(there.fileno()), *filter(None, [checkpoint])],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=words,
                    # Idle threads of numpy's products would live in the server, and members compute with torch.
                    env={**environment, "OPENBLAS_NUM_THREADS": "1"},
                    pass_fds=[there.fileno()],
                    start_new_session=True,
                )
                failing.pop_all()
            running = _Running(process, here, kind)
            here.settimeout(self.timeout)
            self._starting = process
            try:
                if self._closed.is_set():
                    raise ForkServerError(_CLOSED)
                answer = _read_answer(here)
                if "error" in answer:
                    raise ForkServerError(str(answer["error"]))
            except (OSError, ValueError, ForkServerError) as error:
                running.close()
                words.seek(0)
                printed = words.read().decode(errors="replace").strip().splitlines()
                self._refusal = ": ".join([str(error), *printed[-1:]])  # another one would find the same
                raise ForkServerError(self._refusal) from error
            finally:
                self._starting = None
        return running

    def _drop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()


def can_fork() -> bool:
    """Whether this system has what it takes; in a container it may be forbidden."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return hasattr(signal, "pidfd_send_signal")


def _read_answer(connection: socket.socket) -> dict[str, Any]:
    """A line."""
    line = bytearray()
    while not line.endswith(b"\n"):
        content = connection.recv(1 << 12)
        if not content:
            raise ConnectionError("the fork server has ended")
        line += content
    return dict(json.loads(line))


@contextmanager
def _orphans_adopted() -> Iterator[None]:
    """Processes below this one whose parent ends meanwhile become children of this one.

    Raises:
        OSError: the system refuses.
    """
    system = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    with _adopting:
        _check(system.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0))
        _check(system.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        try:
            yield
        finally:
            system.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def _check(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
