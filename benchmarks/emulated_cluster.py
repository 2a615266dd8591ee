"""Several hosts on one machine: network namespaces joined by a bridge, every link limited in rate.

    python benchmarks/emulated_cluster.py --hosts 2 --ranks-per-host 2 --rate 200mbit -- COMMAND ...

runs COMMAND under torchrun, one agent per host, and returns COMMAND's exit code (that of the rank that failed first).
COMMAND is one of

    moeplace bench replay ...     a console script (any executable on PATH or given by path; not only Python)
    program.py ...                a Python file
    -m package.module ...         a Python module

Every host is a namespace with its own loopback and one interface `eth0` (10.77.0.1, 10.77.0.2, ...) whose outgoing side
is a token bucket (tbf) of the given rate; traffic inside a host is not limited. `GLOO_SOCKET_IFNAME` is set.

Everything is removed at the end, also on SIGINT, SIGTERM and, by a second process that outlives this one, on SIGKILL.
Leftovers of runs that no longer exist are removed at the start. Needs root and iproute2 (`ip`, `tc`); without them the
exit code is 2.
"""

import argparse
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PREFIX = "moeplace"
INTERFACE = "eth0"
MASTER_PORT = "29500"
USAGE = 2
GRACE_SECONDS = 15.0
"""How long other ranks may go on after one has failed: they notice the loss and say so. (A torchrun agent whose ranks
are done waits minutes for the agents of other hosts, also for those that have failed.)"""


class Unavailable(Exception):
    """The machine cannot emulate hosts; the message says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command; 2 = usage, or not possible here."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--worker"]:
        return run_worker(Path(arguments[1]), arguments[2:])
    if arguments[:1] == ["--reap"]:
        sys.stdin.read()  # ends when the owner is gone
        Hosts(int(arguments[1]), int(arguments[2])).remove()
        return 0
    args = parse_arguments(arguments)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        require_tools()
        remove_stale()
        return run_on_hosts(args)
    except Unavailable as error:
        print(f"emulated_cluster: {error}", file=sys.stderr)
        return USAGE


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Options before `--`, the command behind it.

    Raises:
        SystemExit: with 2, the options are wrong or there is no command.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], usage="%(prog)s [options] -- COMMAND ..."
    )
    parser.add_argument("--hosts", type=int, default=2, metavar="N", help="emulated hosts (2)")
    parser.add_argument("--ranks-per-host", type=int, default=2, metavar="N", help="ranks on each of them (2)")
    parser.add_argument("--rate", default="200mbit", help="of each host's link, in each direction, as tc writes it")
    parser.add_argument("--burst", default="64kb", help="what may leave at once (64kb)")
    parser.add_argument("--queue", default="200ms", metavar="TIME", help="longest time a packet may wait (200ms)")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:split])
    args.command = list(arguments[split + 1 :])
    if not args.command or args.command == ["-m"]:
        parser.error("no command: give it behind --")
    if not 1 <= args.hosts <= 250 or args.ranks_per_host < 1:
        parser.error("--hosts must lie in 1..250, --ranks-per-host must be at least 1")
    return args


def require_tools() -> None:
    """Check that hosts can be emulated.

    Raises:
        Unavailable: not root, or iproute2 is missing.
    """
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root; run it as root, or on real hosts with torchrun")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} not found; install iproute2")


class Hosts:
    """Namespaces `moeplace-OWNER-hN`, their links and a bridge `mpOWNER`; the owner is a process id.

    The bridge has no address, so runs side by side do not see each other.
    """

    def __init__(self, owner: int, count: int) -> None:
        self.owner, self.count = owner, count
        self.bridge = f"mp{owner}"
        self.names = [f"{PREFIX}-{owner}-h{index}" for index in range(count)]

    @staticmethod
    def address(index: int) -> str:
        return f"10.77.0.{index + 1}"

    def make(self, *, rate: str, burst: str, queue: str) -> None:
        """Create them.

        Raises:
            Unavailable: the kernel refuses, or the rate is not one that tc knows.
        """
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("link", "set", self.bridge, "up")
        for index, name in enumerate(self.names):
            link = f"{self.bridge}v{index}"
            _ip("netns", "add", name)
            _ip("link", "add", link, "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _ip("link", "set", link, "master", self.bridge, "up")
            _ip("-n", name, "addr", "add", f"{self.address(index)}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            bucket = ("tbf", "rate", rate, "burst", burst, "latency", queue)
            _call("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", INTERFACE, "root", *bucket)

    def remove(self) -> None:
        """Kill what runs inside and delete what exists."""
        for name in self.names:
            for pid in _output("ip", "netns", "pids", name).split():
                _kill(int(pid))
            _output("ip", "netns", "del", name)
        for index in range(self.count):
            _output("ip", "link", "del", f"{self.bridge}v{index}")
        _output("ip", "link", "del", self.bridge)


def remove_stale() -> None:
    """Remove hosts whose owner lives no more."""
    for line in _output("ip", "netns", "list").splitlines():
        parts = line.split()[0].split("-") if line.split() else []
        if len(parts) == 3 and parts[0] == PREFIX and parts[1].isdigit() and not _is_owner(int(parts[1])):
            Hosts(int(parts[1]), int(parts[2].removeprefix("h")) + 1).remove()


def run_on_hosts(args: argparse.Namespace) -> int:
    """Make the hosts, run the command, remove the hosts."""
    hosts = Hosts(os.getpid(), args.hosts)
    reaper = subprocess.Popen(
        [sys.executable, __file__, "--reap", str(hosts.owner), str(hosts.count)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    agents: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}-codes-") as folder:
        try:
            hosts.make(rate=args.rate, burst=args.burst, queue=args.queue)
            for index in range(args.hosts):
                agents.append(_start_agent(hosts, index, args, Path(folder)))
            return _wait(agents, Path(folder))
        except KeyboardInterrupt as stop:
            return 128 + int(stop.args[0] if stop.args else signal.SIGINT)
        finally:
            for agent in agents:
                agent.terminate()  # torchrun ends its workers
            _wait_briefly(agents)
            hosts.remove()
            assert reaper.stdin is not None
            reaper.stdin.close()
            reaper.wait()


def _start_agent(hosts: Hosts, index: int, args: argparse.Namespace, codes: Path) -> "subprocess.Popen[bytes]":
    environment = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(hosts.count), "--node-rank", str(index)]
    torchrun += ["--nproc-per-node", str(args.ranks_per_host)]
    torchrun += ["--master-addr", hosts.address(0), "--master-port", MASTER_PORT]
    worker = [str(Path(__file__).resolve()), "--worker", str(codes), *args.command]
    command = ["ip", "netns", "exec", hosts.names[index], *torchrun, *worker]
    return subprocess.Popen(command, env={**environment, **os.environ}, stdin=subprocess.DEVNULL)


def _wait(agents: "list[subprocess.Popen[bytes]]", codes: Path) -> int:
    """Exit code of the first rank that fails, else of the first agent; 0 = all ended well."""
    code, deadline = 0, float("inf")
    while any(agent.poll() is None for agent in agents) and time.monotonic() < deadline:
        code = code or _first_failure(codes) or next((agent.returncode for agent in agents if agent.returncode), 0)
        if code and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.05)
    return _first_failure(codes) or code or max((abs(agent.returncode or 0) for agent in agents), default=0)


def _wait_briefly(agents: "list[subprocess.Popen[bytes]]") -> None:
    deadline = time.monotonic() + 5.0
    for agent in agents:
        try:
            agent.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


def run_worker(codes: Path, command: list[str]) -> int:
    """One rank: run the command in this process and note its exit code, which torchrun does not pass on."""
    code = 1
    try:
        code = _run_command(command)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    finally:
        if code:
            note = codes / os.environ["RANK"]
            note.write_text(str(code))
            note.rename(note.with_suffix(".code"))  # seen when it is whole
    return code


def _run_command(command: list[str]) -> int:
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return 0
    path = shutil.which(command[0]) or command[0]
    if not _is_python(path):
        return subprocess.call([path, *command[1:]])
    sys.argv = [path, *command[1:]]
    sys.path[0] = str(Path(path).resolve().parent)
    runpy.run_path(path, run_name="__main__")
    return 0


def _is_python(path: str) -> bool:
    if path.endswith(".py"):
        return True
    with open(path, "rb") as file:
        first = file.readline(256)
    return first.startswith(b"#!") and b"python" in first


def _first_failure(codes: Path) -> int:
    """Exit code of the rank that failed first, 0 = none noted one."""
    noted = sorted(codes.glob("*.code"), key=lambda path: path.stat().st_mtime_ns)
    return int(noted[0].read_text()) if noted else 0


def _is_owner(pid: int) -> bool:
    """Whether a process is a run of this program."""
    try:
        return Path(__file__).name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _stop(number: int, _frame: object) -> None:
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # tearing down must not be interrupted
    raise KeyboardInterrupt(number)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _ip(*arguments: str) -> None:
    _call("ip", *arguments)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())}")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    sys.exit(main())
