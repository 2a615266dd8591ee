"""CommandLog: the coordinator's end of the command log."""

from moeplace.runtime.service.store import Document, ServiceStore


class CommandLog:
    """Commands in order; those that every rank has applied are deleted.

    Attributes:
        length: commands written.
    """

    def __init__(self, store: ServiceStore) -> None:
        self._store = store
        self.length = self._deleted = 0

    def append(self, command: Document) -> int:
        """Write a command; its index."""
        self._store.append(self.length, command)
        self.length += 1
        return self.length - 1

    def forget(self, applied: int) -> None:
        """Delete the commands before `applied`, which all ranks have read."""
        self._store.delete([f"log/{index}" for index in range(self._deleted, applied)])
        self._deleted = max(self._deleted, applied)
