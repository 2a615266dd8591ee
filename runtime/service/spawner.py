"""LocalSpawner: members of a service as processes of this machine."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from moeplace.runtime.service.api import MemberJob


class LocalMember:
    """A started process."""

    def __init__(self, member_id: int, process: "subprocess.Popen[bytes]") -> None:
        self.member_id = member_id
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def is_alive(self) -> bool:
        """See `Member`."""
        return self._process.poll() is None

    def kill(self) -> None:
        """See `Member`."""
        self._process.kill()

    def wait(self, timeout: float) -> int | None:
        """See `Member`."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None


class LocalSpawner:
    """Starts `python -m moeplace.runtime.service.member.loop`, one thread each.

    Attributes:
        folder: what members print, `member-ID.log`; deleted with the spawner unless it was given.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="moeplace-members-") if folder is None else None
        self.folder = Path(self._temporary.name if self._temporary else folder or ".")
        self._started: list[LocalMember] = []

    def start(self, member_id: int, job: MemberJob) -> LocalMember:
        """See `Spawner`."""
        command = [sys.executable, "-m", "moeplace.runtime.service.member.loop", json.dumps(job.to_json())]
        with (self.folder / f"member-{member_id}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=_environment(job.host),
                start_new_session=True,  # Ctrl-C is for the coordinator, which ends its members in order
            )
        member = LocalMember(member_id, process)
        self._started.append(member)
        return member

    def close(self) -> None:
        """See `Spawner`."""
        for member in self._started:
            if member.is_alive():
                member.kill()
        for member in self._started:
            member.wait(10.0)
        if self._temporary is not None:
            self._temporary.cleanup()


def _environment(host: str) -> dict[str, str]:
    """One thread per rank, the loopback interface for gloo where the store is there, no chatter of the store."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if host.startswith("127.") and Path("/sys/class/net/lo").exists():
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment
