"""Forks are children of this process, end with it, and outlive the process that forked them."""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from moeplace.runtime.service.forks import ForkedProcess, ForkServer, ForkServerError, can_fork
from moeplace.runtime.service.options import MemberJob, ServiceOptions
from moeplace.runtime.service.spawner import LocalSpawner

PATIENCE = 120.0
JOB = MemberJob(0, "127.0.0.1", 70_000, "p", "no checkpoint", ServiceOptions(device="cpu"))
"""Of a service at a port that cannot be: it fails at once, with a `TypeError`."""
pytestmark = pytest.mark.timeout(200)


def environment(**variables: str) -> dict[str, str]:
    """Of members, the same for all tests: another one would take another server."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


@dataclass
class Fork:
    """One that waits for its job, and what is open for it."""

    process: ForkedProcess
    job: int
    words: Any

    @property
    def printed(self) -> str:
        self.words.seek(0)
        return str(self.words.read().decode())

    def do(self, line: bytes) -> int | None:
        """Give it its job; its exit code."""
        with os.fdopen(os.dup(self.job), "wb") as file:
            file.write(line + b"\n")
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        self.process.release()
        self.words.close()
        os.close(self.job)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """One that imports nothing: forks do, where they come so far."""
    forks = ForkServer(timeout=PATIENCE)
    yield forks
    forks.close()


@pytest.fixture
def fork(server: ForkServer) -> Iterator[Callable[..., Fork]]:
    forks: list[Fork] = []

    def make(by: ForkServer = server, checkpoint: str | None = None, **variables: str) -> Fork:
        theirs, ours = os.pipe()
        words = tempfile.TemporaryFile()  # noqa: SIM115
        process = by.fork(checkpoint, environment(**variables), words=words.fileno(), job=theirs)
        os.close(theirs)
        forks.append(Fork(process, ours, words))
        return forks[-1]

    yield make
    for each in forks:
        each.close()


def stat(pid: int) -> list[str]:
    """State, parent, group, session, ... of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def is_there(pid: int) -> bool:
    try:
        return stat(pid)[0] != "Z"
    except OSError:
        return False


def await_true(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def children() -> set[int]:
    """Of this process."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= set(map(int, (task / "children").read_text().split()))
    return found


def make_orphan() -> int:
    """A process below this one whose parent has ended."""
    code = "import os; pid = os.fork(); pid or os.execvp('sleep', ['sleep', '600']); print(pid)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        return int(process.stdout.readline())


@pytest.mark.parametrize("checkpoint", [None, "no checkpoint"])
def test_a_fork_is_a_child_like_any_other(checkpoint: str | None, fork: Callable[..., Fork]) -> None:
    """Of this process, in a session of its own, with nothing open but its three streams, and one thread; libraries are
    loaded where a checkpoint was given."""
    server = ForkServer(timeout=PATIENCE)
    made = fork(server, checkpoint)
    pid = made.process.pid
    assert stat(pid)[1] == str(os.getpid())
    await_true(lambda: stat(pid)[3] == str(pid), "it shares a session")
    await_true(lambda: len(os.listdir(f"/proc/{pid}/fd")) == 3, f"open: {os.listdir(f'/proc/{pid}/fd')}")
    assert ("libtorch" in Path(f"/proc/{pid}/maps").read_text()) == (checkpoint is not None)
    assert len(os.listdir(f"/proc/{pid}/task")) == 1
    assert made.process.poll() is None
    assert server.pid in children()
    assert Path(f"/proc/{server.pid}/comm").read_text() == "fork-server\n"
    server.close()


def test_it_says_what_is_wrong_and_ends_with_a_code(fork: Callable[..., Fork]) -> None:
    made = fork()
    assert made.do(b'{"member_id": 3}') == 1
    assert "KeyError: 'options'" in made.printed


def test_a_killed_one_has_the_code_of_its_signal(fork: Callable[..., Fork]) -> None:
    """And stays ended, whatever is asked of it."""
    made = fork()
    made.process.kill()
    assert made.process.wait(PATIENCE) == -signal.SIGKILL
    made.process.kill()
    made.process.release()
    assert (made.process.poll(), made.process.wait(0.0)) == (-signal.SIGKILL, -signal.SIGKILL)


def test_a_wait_ends_in_time_or_with_the_process(fork: Callable[..., Fork]) -> None:
    made, code = fork(), []
    assert made.process.wait(0.01) is None
    waiting = threading.Thread(target=lambda: code.append(made.process.wait(PATIENCE)))
    waiting.start()
    made.process.kill()
    waiting.join(PATIENCE)
    assert code == [-signal.SIGKILL]


def test_one_without_its_parent_end_of_the_pipe_ends(fork: Callable[..., Fork]) -> None:
    """Before it has its job."""
    made = fork()
    os.close(made.job)
    made.job = os.open(os.devnull, os.O_RDONLY)
    assert made.process.wait(PATIENCE) == 1


def test_forks_outlive_their_server(fork: Callable[..., Fork]) -> None:
    """The next one comes from a new one."""
    server = ForkServer(timeout=PATIENCE)
    first, pid = fork(server), server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await_true(lambda: not is_there(pid), "the server lives")
    second = fork(server)
    assert server.pid != pid
    assert (first.process.poll(), second.process.poll()) == (None, None)
    server.close()
    assert server.pid is None
    assert (first.process.poll(), second.process.poll()) == (None, None)


def test_a_server_has_the_environment_that_is_asked_for(fork: Callable[..., Fork], server: ForkServer) -> None:
    """Variables count while libraries are loaded: with others there is another server."""
    first, kept = fork(), server.pid
    fork()
    assert server.pid == kept
    other = fork(MOEPLACE_TEST="there")
    assert server.pid != kept
    told = [Path(f"/proc/{made.process.pid}/environ").read_bytes().split(b"\0") for made in (first, other)]
    assert [b"MOEPLACE_TEST=there" in variables for variables in told] == [False, True]
    assert all(b"OMP_NUM_THREADS=1" in variables for variables in told)


def test_orphans_are_adopted_for_the_moment_of_a_fork_only(fork: Callable[..., Fork]) -> None:
    """A process that is orphaned at another time goes to where it would go without this package."""
    fork()
    orphan = make_orphan()
    try:
        assert stat(orphan)[1] != str(os.getpid())
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_servers_fork_at_the_same_time(server: ForkServer) -> None:
    """Each fork is adopted, whoever else forks meanwhile."""
    servers, failed = [server, ForkServer(timeout=PATIENCE)], []

    def fork_often(by: ForkServer) -> None:
        try:
            for _ in range(12):
                theirs, ours = os.pipe()
                made = by.fork(None, environment(), words=theirs, job=theirs)
                os.close(theirs)
                os.close(ours)
                made.wait(PATIENCE)
                made.release()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=fork_often, args=(by,)) for by in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    servers[1].close()
    assert failed == []


def test_a_process_that_is_nobodys_child_here_is_refused_and_killed() -> None:
    orphan = make_orphan()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ChildProcessError):
        ForkedProcess(orphan)
    await_true(lambda: not is_there(orphan), "it lives")
    assert os.listdir("/proc/self/fd") == before


def test_a_server_that_hangs_is_given_up(fork: Callable[..., Fork]) -> None:
    """It is killed, and what it may yet have forked finds no job: the pipe is closed."""
    server = ForkServer(timeout=PATIENCE)
    fork(server)
    pid, server.timeout = server.pid, 0.2
    assert pid is not None
    assert server._running is not None
    server._running.connection.settimeout(0.2)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ForkServerError, match="timed out"):
        fork(server)
    await_true(lambda: not is_there(pid), "the server lives")
    server.timeout = PATIENCE
    fork(server)
    server.close()


def test_a_system_that_forbids_it_is_asked_twice(fork: Callable[..., Fork], monkeypatch: pytest.MonkeyPatch) -> None:
    """An accident costs one fork; what fails again is given up, and no server is started for it any more."""
    server, started, start = ForkServer(timeout=PATIENCE), [], ForkServer._start

    def count(*arguments: Any) -> Any:
        started.append(0)
        return start(*arguments)

    def refuse(*_: Any) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(ForkServer, "_start", count)
    for accident in (True, False):
        with monkeypatch.context() as forbidden:
            forbidden.setattr(os, "pidfd_open", refuse)
            for _ in range(1 if accident else 3):
                with pytest.raises(ForkServerError, match="not here"):
                    fork(server)
        if accident:
            fork(server)
    assert len(started) == 3  # after the accident, and after the first of the failures
    with pytest.raises(ForkServerError, match="not here"):
        fork(server)
    server.close()


@pytest.mark.parametrize("is_old", [True, False])
def test_where_processes_have_no_handles_nothing_is_forked(is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old system does not know them, and a container may forbid them."""

    def refuse(*_: Any) -> None:
        raise PermissionError("not here")

    assert can_fork()
    if is_old:
        monkeypatch.delattr(os, "pidfd_open")
    else:
        monkeypatch.setattr(os, "pidfd_open", refuse)
    assert not can_fork()
    assert not LocalSpawner()._forks


def test_nothing_stays_open_for_a_server_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No such program, twice: then it is not tried again."""
    server = ForkServer(timeout=PATIENCE)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    theirs, ours = os.pipe()
    before = os.listdir("/proc/self/fd")
    gc.disable()  # closed by whoever opened it, not by chance
    try:
        failed = []
        for _ in range(3):
            try:
                server.fork(None, environment(), words=ours, job=theirs)
            except ForkServerError as error:
                failed.append(error)  # whose traceback holds what was local
        assert ["nothing" in str(error) for error in failed] == [True] * 3
        assert os.listdir("/proc/self/fd") == before
    finally:
        gc.enable()
    server.close()
    os.close(theirs)
    os.close(ours)


def test_a_closed_server_forks_nothing(fork: Callable[..., Fork]) -> None:
    """Also one that is closed during its imports, for which nobody waits."""
    server, failed = ForkServer(timeout=PATIENCE), []

    def ask() -> None:
        try:
            fork(server)
        except ForkServerError as error:
            failed.append(error)

    before = children()
    asking = threading.Thread(target=ask)
    asking.start()
    await_true(lambda: bool(children() - before), "no server starts")
    started = children() - before
    server.close()
    asking.join(PATIENCE)
    assert len(failed) == 1
    assert not any(map(is_there, started))
    with pytest.raises(ForkServerError, match="closed"):
        fork(server)
    server.close()


def broken(folder: Path, code: str) -> dict[str, str]:
    """The variable with which every Python program runs some code first."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()", "2 threads"),
        (
            "import os, sys\nif 'fork_server' in ' '.join(sys.orig_argv): os.write(2, b'no room\\n'), os._exit(3)",
            "no room",
        ),
    ],
)
def test_where_nothing_can_be_forked_members_are_programs(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a server is started once."""
    for name, value in broken(tmp_path, code).items():
        monkeypatch.setenv(name, value)
    started: list[Any] = []
    start = ForkServer._start
    monkeypatch.setattr(ForkServer, "_start", lambda *arguments: (started.append(0), start(*arguments))[1])
    spawner = LocalSpawner()
    members = [spawner.start(number, JOB) for number in range(2)]
    try:
        assert [member.wait(PATIENCE) for member in members] == [1, 1]
        assert all("TypeError" in member.last_words() for member in members)
        assert (spawner._server.pid, len(started)) == (None, 1)
    finally:
        spawner.close()
    warnings = [record.getMessage() for record in caplog.records if "a program of its own" in record.getMessage()]
    assert len(warnings) == 2
    assert all(reason in warning for warning in warnings)


class Machine:
    def __init__(self, gpus: int) -> None:
        self._gpus = gpus

    def gpus(self) -> int:
        return self._gpus


@pytest.mark.parametrize(
    ("device", "gpus", "forks"), [("cpu", 2, True), ("auto", 0, True), ("auto", 2, False), ("cuda", 2, False)]
)
def test_members_on_gpus_are_programs(
    device: str, gpus: int, forks: bool, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    spawner = LocalSpawner(fork_server=server, machine=Machine(gpus))
    member = spawner.start(0, replace(JOB, options=ServiceOptions(device=device)))
    try:
        command = Path(f"/proc/{member.pid}/cmdline").read_bytes()
    finally:
        spawner.close()
    assert (b"fork_server" in command, b"member.start" in command) == (forks, not forks)


def test_one_that_is_killed_before_it_starts_never_does(tmp_path: Path) -> None:
    """While the server still imports."""
    spawner = LocalSpawner(tmp_path)
    members = [spawner.start(number, JOB) for number in range(3)]
    assert not members[2].has_started()
    assert members[2].is_alive()
    assert members[2].wait(0.0) is None
    members[2].kill()
    assert members[2].wait(PATIENCE) == -signal.SIGKILL
    assert members[2].has_started()
    with pytest.raises(ProcessLookupError):
        assert members[2].pid
    assert [member.wait(PATIENCE) for member in members[:2]] == [1, 1]
    assert (tmp_path / "member-2.log").read_bytes() == b""
    assert (tmp_path / "member-0.log").read_text().strip().endswith(members[0].last_words()[-1000:])
    spawner.close()


def test_a_long_job_reaches_its_member(server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a pipe holds."""
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    spawner = LocalSpawner(fork_server=server)
    member = spawner.start(0, replace(JOB, checkpoint="x" * 300_000))
    assert member.wait(PATIENCE) == 1
    assert "TypeError" in member.last_words()  # of the job, not of its form
    spawner.close()


@pytest.mark.parametrize("forks", [True, False])
def test_nothing_stays_open_for_members(forks: bool, server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    spawner = LocalSpawner(fork_server=server, forks=forks)
    numbers = []
    for number in range(4):
        member = spawner.start(number, JOB)
        assert member.wait(PATIENCE) == 1
        member.release()
        numbers.append(len(os.listdir("/proc/self/fd")))
    spawner.close()
    assert set(numbers) == {numbers[0]}


def test_all_end_with_the_process_that_asked_for_them() -> None:
    """Killed while one of them is stopped, and the server too."""
    script = (
        "import json, os, tempfile, time\n"
        "from moeplace.runtime.service.forks import ForkServer\n"
        "server, words = ForkServer(), tempfile.TemporaryFile()\n"
        "pids = []\n"
        "for _ in range(3):\n"
        "    theirs, ours = os.pipe()\n"
        "    pids.append(server.fork(None, dict(os.environ), words=words.fileno(), job=theirs).pid)\n"
        "    os.close(theirs)\n"
        "print(json.dumps([*pids, server.pid]), flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        pids = json.loads(process.stdout.readline())
        os.kill(pids[3], signal.SIGSTOP)
        process.kill()
    await_true(lambda: not any(map(is_there, pids)), "processes are left behind")
