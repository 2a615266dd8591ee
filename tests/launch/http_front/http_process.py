"""`moeplace serve --http` as a process of its own, on a port that the system chose."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from tests.shared_data import tiny_moe_path

WAIT = 60.0


class ServerProcess:
    """A running server.

    Attributes:
        url: where it answers.
        process: its process.
        asked_to_end: whether `terminate` was called.
    """

    def __init__(self, log: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "moeplace.launch.cli", "serve", str(tiny_moe_path()), "--http", "127.0.0.1:0"]
        self._log, self.asked_to_end = log.open("wb"), False
        self.process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # ends with the process, if it does not come up
        found = re.search(r"http://\S+", line)
        if not found:
            self.process.kill()
        assert found, f"{line!r}, {log.read_text()}"
        self.url = found[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """It is gone afterwards, however it went."""
        self.process.kill()
        self.process.communicate()
        self._log.close()

    def terminate(self) -> None:
        """Ask it to end."""
        self.asked_to_end = True
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> tuple[int, str]:
        """Exit code, and what it printed after the address."""
        out, _ = self.process.communicate(timeout=WAIT)
        self._log.close()
        return self.process.returncode, out


@contextmanager
def running_server(log: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """A server; it is ended by a signal, and must end well."""
    server = ServerProcess(log, *options, environment=environment)
    try:
        yield server
        if not server.asked_to_end:  # a second signal, while it ends, would end it at once
            server.terminate()
        ended = server.wait()
        assert ended == (0, "stopped\n"), f"{ended}: {log.read_text()}"
        assert "Traceback" not in log.read_text()
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.communicate()


def members(server: ServerProcess) -> list[int]:
    """Process ids of the ranks, whichever thread started them, in the order of their numbers."""
    files = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    names = {
        int(child): Path(f"/proc/{child}/comm").read_text() for file in files for child in file.read_text().split()
    }
    ranks = {int(name.removeprefix("member-")): child for child, name in names.items() if name.startswith("member-")}
    return [ranks[number] for number in sorted(ranks)]
