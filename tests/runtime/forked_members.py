"""Members of a service as forks of one server that all tests of a process share: a start costs no import."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeplace.runtime.service.forks import ForkedProcess, ForkServer
from moeplace.runtime.service.spawner import LocalSpawner


class SharedForkServer(ForkServer):
    """One for members of all tests, whatever test they are of."""

    def fork(self, checkpoint: str | None, environment: Mapping[str, str], **files: int) -> ForkedProcess:
        kept = {name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"}
        return super().fork(checkpoint, kept, **files)


@functools.cache
def shared_fork_server() -> ForkServer:
    """It ends with this process."""
    return SharedForkServer()


class ForkingSpawner(LocalSpawner):
    """A `LocalSpawner` by the shared server."""

    def __init__(self, folder: Path | None = None, **options: Any) -> None:
        super().__init__(folder, fork_server=shared_fork_server(), **options)
