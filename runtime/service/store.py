"""ServiceStore: what coordinator and members tell each other, through the coordinator's TCPStore.

    log/k, log/length   command k: what all ranks do between two steps, in the same order; how many there are
    assign/m/k          the k-th generation that member m, while it is in none, shall prepare
    generation/n        who is in generation n
    open/n              generation n may begin: for members that are in none
    successor/n         the generation that follows n because a rank was lost
    loaded/n            whether all members of generation n have read their experts; False = one was lost before
    settled/n           all members of generation n have begun, groups before it may go
    reports             a queue: what members tell the coordinator

Every value is signed with the service's secret, and every report is numbered: who reaches the port without the secret
can read and disturb, but command nothing and report nothing, nor repeat what was reported. What the ranks of a group
tell each other to meet (`for_group`) is torch's own, and not signed.

Keys are deleted once nobody can need them. A connection serves one thread: a blocking read holds up all others.
"""

import hashlib
import hmac
import json
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moeplace.profiling.errors import InputError, MoeplaceError

Document = dict[str, Any]

CONNECT_SECONDS = 30.0
"""In which a member must reach the coordinator; one that is gone is not waited for."""
_FOREVER = timedelta(days=365)
"""A read, once connected, ends when its key comes or when the coordinator is gone."""


class ServiceEndedError(MoeplaceError):
    """The coordinator is gone."""


class ForgedError(MoeplaceError):
    """A value was not written by this service."""


def serve_store(host: str) -> dist.TCPStore:
    """A store that listens on one address of this machine, not on all of them, at a free port.

    Raises:
        InputError: the address is not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        raise InputError(f"members cannot be reached on {host}: {error.strerror}") from error
    port, limit = listener.getsockname()[1], timedelta(seconds=CONNECT_SECONDS)
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=limit, master_listen_fd=listener.detach()
    )


class ServiceStore:
    """A connection to the store of a service. Every method raises ServiceEndedError when the coordinator is gone.

    Methods that read raise ForgedError where the value is not of this service.
    """

    def __init__(self, store: dist.Store, prefix: str, secret: str) -> None:
        self._root, self._prefix, self._secret = store, prefix, secret.encode()
        self._store = dist.PrefixStore(prefix, store)
        self._name, self._reported, self._lock = secrets.token_hex(8), 0, threading.Lock()
        self._heard: dict[str, int] = {}  # of each sender, the number of its last report

    @classmethod
    def connect(
        cls, host: str, port: int, prefix: str, secret: str, *, seconds: float = CONNECT_SECONDS
    ) -> "ServiceStore":
        """A connection of its own."""
        with _guard():
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))
            store.set_timeout(_FOREVER)
            return cls(store, prefix, secret)

    def for_group(self, generation: int) -> dist.Store:
        """Where the ranks of a generation meet."""
        return dist.PrefixStore(f"{self._prefix}/group/{generation}", self._root)

    def put(self, key: str, document: Any) -> None:
        """Write a key."""
        with _guard():
            self._store.set(key, self._sign(key, json.dumps(document)))

    def find(self, key: str) -> Any | None:
        """The value of a key, None = it is not there."""
        with _guard():
            return self._open(key, self._store.get(key)) if self._store.check([key]) else None

    def read(self, key: str) -> Any:
        """The value of a key, once it is there."""
        with _guard():
            return self._open(key, self._store.get(key))

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
        """Tell the coordinator something; from any thread, unless another one waits for a key."""
        with _guard(), self._lock:
            self._reported += 1
            content = json.dumps([self._name, self._reported, document])
            self._store.queue_push("reports", self._sign("reports", content))  # type: ignore[attr-defined]

    def next_report(self) -> Document:
        """The oldest report that was not read yet, once there is one.

        Raises:
            ForgedError: somebody else wrote it, or it is a repetition.
        """
        with _guard():
            content = self._store.queue_pop("reports")  # type: ignore[attr-defined]
        try:
            name, number, document = self._open("reports", content)
        except (TypeError, ValueError) as error:
            raise ForgedError("a report is not one") from error
        if number <= self._heard.get(name, 0):
            raise ForgedError("a report was repeated")
        self._heard[name] = number
        return document if isinstance(document, dict) else {}

    def _sign(self, key: str, content: str) -> str:
        return f"{self._mark(key, content.encode())} {content}"

    def _open(self, key: str, value: bytes) -> Any:
        mark, _, content = value.partition(b" ")
        if not hmac.compare_digest(mark, self._mark(key, content).encode()):
            raise ForgedError(f"the value of {key!r} was not written by this service")
        return json.loads(content)

    def _mark(self, key: str, content: bytes) -> str:
        named = f"{self._prefix}\0{key}\0".encode() + content
        return hmac.new(self._secret, named, hashlib.sha256).hexdigest()


@contextmanager
def _guard() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise ServiceEndedError("the coordinator is gone") from error
