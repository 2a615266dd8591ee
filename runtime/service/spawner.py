"""LocalSpawner: members of a service as processes of this machine."""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from moeplace.runtime.service.options import MemberJob

_LAST_BYTES = 4000
_PASSED_ON = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG")


class LocalMember:
    """A started process."""

    def __init__(self, member_id: int, place: int, process: "subprocess.Popen[bytes]", words: IO[bytes]) -> None:
        self.member_id, self.place = member_id, place
        self._process, self._words = process, words

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """See `Member`."""
        return self._process.poll() is None

    def has_started(self) -> bool:
        """See `Member`."""
        return True

    def kill(self) -> None:
        """See `Member`."""
        self._process.kill()

    def wait(self, timeout: float) -> int | None:
        """See `Member`."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def last_words(self) -> str:
        """See `Member`."""
        if self._words.closed:
            return ""
        size = os.fstat(self._words.fileno()).st_size
        content = os.pread(self._words.fileno(), _LAST_BYTES, max(size - _LAST_BYTES, 0))
        return content.decode(errors="replace").strip()

    @property
    def is_released(self) -> bool:
        """Whether nothing is open for it."""
        return self._words.closed

    def release(self) -> None:
        """See `Member`."""
        self._words.close()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()


class LocalSpawner:
    """Starts `python -m moeplace.runtime.service.member.start`, one thread each.

    They end with this process, however it ends: see there. What they print goes to `member-ID.log` in a folder, or
    without one to files that have no name, so that nothing is left behind.

    Attributes:
        folder: None = none was given.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._started: list[LocalMember] = []
        # Members are killed when the thread that started them ends: so it is one that lives as long as the spawner.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="spawner")

    def start(self, member_id: int, job: MemberJob) -> LocalMember:
        """See `Spawner`."""
        return self._starter.submit(self._start, member_id, job).result()

    def close(self) -> None:
        """See `Spawner`."""
        for member in self._started:
            if member.is_alive():
                member.kill()
        for member in self._started:
            member.wait(10.0)
            member.release()
        self._starter.shutdown()

    def _start(self, member_id: int, job: MemberJob) -> LocalMember:
        self._started = [member for member in self._started if not member.is_released]
        place = self._free_place()
        words: IO[bytes] = tempfile.TemporaryFile() if self.folder is None else self._log(member_id)  # noqa: SIM115
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "moeplace.runtime.service.member.start", str(os.getpid())],
                stdout=words,
                stderr=words,
                stdin=subprocess.PIPE,  # the job, which holds a secret, and our end of it as a sign of life
                env={
                    **os.environ,
                    **member_environment(job.host, chatter=os.environ.get("TORCH_CPP_LOG_LEVEL")),
                    "OMP_NUM_THREADS": str(job.options.threads),
                },
                start_new_session=True,  # Ctrl-C is for the coordinator, which ends its members in order
            )
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended already, which its exit code says
                process.stdin.write(json.dumps(replace(job, place=place).to_json()).encode() + b"\n")
                process.stdin.flush()
        except OSError:
            words.close()
            raise
        member = LocalMember(member_id, place, process, words)
        self._started.append(member)
        return member

    def _free_place(self) -> int:
        """The lowest number that no living member has: a GPU is free again when its member has ended."""
        taken = {member.place for member in self._started if member.is_alive()}
        return next(place for place in range(len(taken) + 1) if place not in taken)

    def _log(self, member_id: int) -> IO[bytes]:
        assert self.folder is not None
        return (self.folder / f"member-{member_id}.log").open("a+b")  # a service before may have left one


def member_environment(host: str, *, chatter: str | None = None) -> dict[str, str]:
    """One thread per rank, no chatter of the store unless it is wanted, and the networks that were named here; the
    loopback interface for gloo where the store is there."""
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # a lost peer must not end this process: see `CollectiveWatch`
    environment["TORCH_CPP_LOG_LEVEL"] = chatter or "ERROR"
    if host.startswith("127.") and Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return environment | {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
