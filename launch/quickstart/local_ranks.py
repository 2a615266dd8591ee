"""Start ranks on this machine with torchrun, wait for them, and say in one sentence what went wrong."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from moeplace.profiling.errors import MoeplaceError

_POLL = 0.1
_GRACE = 10.0
_PEER_LOST = "lost a peer"


def run_local_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    ranks: int,
    log: Path,
    failure_of_rank: Callable[[int], Path],
    timeout: float,
    poll: Callable[[], None] = lambda: None,
) -> None:
    """Run `python -m module arguments` on `ranks` processes of this machine until all are done.

    Args:
        module: module to run on every rank.
        log: file for what the ranks print.
        failure_of_rank: file in which a rank leaves one sentence when it fails.
        timeout: seconds until they are ended.
        poll: called some times a second.

    Raises:
        MoeplaceError: a rank failed, died, or all took too long; names the first one that failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", module, *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=_environment(), start_new_session=True
        )
        try:
            code = _wait(process, time.monotonic() + timeout, poll)
        finally:
            _end(process)
    if code is None:
        raise MoeplaceError(f"the {ranks} ranks did not finish within {timeout:g} s (their output is in {log})")
    if code != 0:
        raise MoeplaceError(f"{_culprit(ranks, failure_of_rank, log)} (the output of the ranks is in {log})")


def _environment() -> dict[str, str]:
    """One thread per rank, and the loopback interface for gloo where there is one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if Path("/sys/class/net/lo").exists():
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment


def _wait(process: subprocess.Popen[bytes], deadline: float, poll: Callable[[], None]) -> int | None:
    while process.poll() is None:
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL)
        poll()
    return process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its ranks; then whatever of the session is left."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _culprit(ranks: int, failure_of_rank: Callable[[int], Path], log: Path) -> str:
    """The first rank that failed by itself: those that only lost a peer come last."""
    failed = [(rank, failure_of_rank(rank)) for rank in range(ranks) if failure_of_rank(rank).exists()]
    found = sorted((_PEER_LOST in path.read_text(), path.stat().st_mtime, rank) for rank, path in failed)
    if not found:
        last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"the ranks could not be started or were killed: {last[-1][:200] if last else 'they said nothing'}"
    lost_peer, _, rank = found[0]
    if lost_peer:
        silent = sorted(set(range(ranks)) - {r for r, _ in failed})
        return f"rank {silent[0] if silent else rank} of {ranks} died without a word: it may have been killed"
    return f"rank {rank} of {ranks} failed: {failure_of_rank(rank).read_text()}"
