"""ServiceStore: what coordinator and members tell each other, through the coordinator's TCPStore.

    log/k, log/length   command k: what all ranks do between two steps, in the same order; how many there are
    assign/m/k          the k-th generation that member m, while it is in none, shall prepare
    generation/n        who is in generation n
    open/n              generation n may begin: for members that are in none
    successor/n         the generation that follows n because a rank was lost
    settled/n           all members of generation n have begun, groups before it may go
    reports             a queue: what members tell the coordinator

Keys are deleted once nobody can need them. A connection serves one thread: a blocking read holds up all others.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moeplace.profiling.errors import MoeplaceError

Document = dict[str, Any]

_FOREVER = timedelta(days=365)
"""A read ends when its key comes or when the coordinator is gone."""


class ServiceEndedError(MoeplaceError):
    """The coordinator is gone."""


class ServiceStore:
    """A connection to the store of a service. Every method raises ServiceEndedError when the coordinator is gone."""

    def __init__(self, store: dist.Store, prefix: str) -> None:
        self._root, self._prefix = store, prefix
        self._store = dist.PrefixStore(prefix, store)

    @classmethod
    def connect(cls, host: str, port: int, prefix: str) -> "ServiceStore":
        """A connection of its own."""
        with _guard():
            return cls(dist.TCPStore(host, port, is_master=False, timeout=_FOREVER), prefix)

    def for_group(self, generation: int) -> dist.Store:
        """Where the ranks of a generation meet."""
        return dist.PrefixStore(f"{self._prefix}/group/{generation}", self._root)

    def put(self, key: str, document: Any) -> None:
        """Write a key."""
        with _guard():
            self._store.set(key, json.dumps(document))

    def find(self, key: str) -> Any | None:
        """The value of a key, None = it is not there."""
        with _guard():
            return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def read(self, key: str) -> Any:
        """The value of a key, once it is there."""
        with _guard():
            return json.loads(self._store.get(key))

    def delete(self, keys: Sequence[str]) -> None:
        """Delete keys; those that do not exist are ignored."""
        with _guard():
            for key in keys:
                self._store.delete_key(key)

    def delete_group(self, generation: int) -> None:
        """Delete what the ranks of a generation told each other when they met."""
        with _guard():
            prefix = f"{self._prefix}/group/{generation}/"
            for key in self._root.list_keys():  # type: ignore[attr-defined]
                if key.startswith(prefix):
                    self._root.delete_key(key)

    def append(self, index: int, command: Document) -> None:
        """Write command `index` of the log; there is one writer."""
        self.put(f"log/{index}", command)
        with _guard():
            self._store.add("log/length", 1)

    def log_length(self) -> int:
        """Commands in the log."""
        with _guard():
            return int(self._store.add("log/length", 0))

    def report(self, document: Document) -> None:
        """Tell the coordinator something."""
        with _guard():
            self._store.queue_push("reports", json.dumps(document))  # type: ignore[attr-defined]

    def next_report(self) -> Document:
        """The oldest report that was not read yet, once there is one."""
        with _guard():
            return dict(json.loads(self._store.queue_pop("reports")))  # type: ignore[attr-defined]


@contextmanager
def _guard() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise ServiceEndedError("the coordinator is gone") from error
