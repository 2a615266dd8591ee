"""A service that a test plays by hand, a tokenizer of bytes, and a front served in a thread."""

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from moeplace.launch.http_front.application import HttpFront
from moeplace.launch.http_front.server import FrontServer, bind
from moeplace.launch.http_front.settings import FrontSettings
from moeplace.placement.placement import Placement, index_order
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.event import Event
from moeplace.runtime.service.api import FinishReason, RequestRecord, ServiceStatus, TokenEvent
from moeplace.runtime.service.local_requests import LocalRequests

WAIT = 60.0
"""Seconds after which something that must happen has not."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Ask again and again, leaving the cores to others meanwhile: for what a server tells only when asked."""
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, f"did not come true within {WAIT:g} s"
        time.sleep(0.02)


class ByteCoder:
    """A token is a byte: most characters outside ASCII are several tokens."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace")

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise InputError("the assistant cannot begin")
        return self.encode("".join(f"<{message['role']}>{message['content']}" for message in messages) + "<assistant>")


class ManualService:
    """Gives exactly the tokens that the test gives; remembers what it was asked.

    Attributes:
        submitted: requests, in the order in which they came.
        cancelled: names, likewise.
        serving, reason, changing, ended: of its status.
        placed: the placement that was last asked for.
        scaled: number of ranks and members to leave that were last asked for.
    """

    placed: Placement | None = None
    scaled: tuple[int, Sequence[int] | None] | None = None
    placement = index_order(np.full(100, 4), np.full(2, 2), np.zeros(2, int), layer_ids=np.arange(3, 103))

    def __init__(self) -> None:
        self.submitted: queue.Queue[Request] = queue.Queue()
        self.cancelled: queue.Queue[str] = queue.Queue()
        self.serving, self.reason, self.changing, self.ended = True, "", True, False
        self._known = LocalRequests()
        self._tickets: dict[str, str] = {}
        self._told: dict[str, list[int]] = {}

    def submit(self, request: Request, on_event: Callable[[TokenEvent], None]) -> str:
        if not self.serving:
            raise MoeplaceError(self.reason)
        if request.max_new_tokens > 100_000:
            raise InputError(f"request {request.request_id!r} can never fit")
        ticket = self._tickets[request.request_id] = self._known.take(request, on_event).request_id
        self._told[ticket] = []
        self.submitted.put(request)
        return ticket

    def find(self, request_id: str) -> RequestRecord | None:
        return self._known.find(request_id)

    def follow(self, request_id: str, on_event: Callable[[TokenEvent], None], *, first: int = 0) -> bool:
        return self._known.follow(request_id, on_event, first=first)

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended."""
        return sum(bool(self._known.tickets_of(name, None)) for name in self._tickets)

    def next_request(self) -> Request:
        """The next one that comes."""
        return self.submitted.get(timeout=WAIT)

    def give(
        self,
        request: Request,
        text: str | bytes = b"",
        end: FinishReason | None = None,
        error: str | None = None,
        logprobs: tuple[TokenLogprob | None, ...] = (),
    ) -> None:
        """Tokens for a request, the newest one of its name."""
        ticket = self._tickets[request.request_id]
        first = len(self._told[ticket])
        self._told[ticket] += text.encode() if isinstance(text, str) else text
        known = {first + index: found for index, found in enumerate(logprobs) if found is not None}
        self._known.tell(ticket, self._told[ticket], end, error, logprobs=known)

    def cancel(self, request_id: str, *, ticket: str | None = None) -> None:
        assert ticket is not None  # names may be those of clients
        self.cancelled.put(request_id)
        self._known.tell(ticket, None, "cancelled")

    def scale(self, num_ranks: int, *, leaving: Sequence[int] | None = None) -> None:
        if num_ranks < 1:
            raise InputError(f"ranks ({num_ranks}) must be at least 1")
        self.scaled = (num_ranks, leaving)

    def replace(self, placement: Placement) -> None:
        if placement.num_ranks != 2:
            raise InputError(f"the placement is for {placement.num_ranks} ranks, but 2 are active")
        self.placed = placement

    def status(self) -> ServiceStatus:
        return ServiceStatus(
            generation=3,
            placement_version=7,
            placement_digest="sha256:0",
            desired=4,
            allocated=(0, 1, 5),
            active=(0, 1),
            routable=(0,),
            waiting=2,
            running=1,
            steps=10,
            tokens=20,
            migration={"bytes_moved": 5, "bytes_planned": 9, "commits": 1},
            counters={
                "collectives": {"dispatch": 6},
                "bytes_sent": {"inter_node": 8},
                "copies_sent": 2,
                "overflows": 1,
                "single_exchange": 3,
                "tokens_computed": 9,
            },
            imbalance_per_layer=tuple(1 + layer / 100 for layer in range(100)),
            changing=self.changing,
            serving=self.serving,
            reason=self.reason,
            ended=self.ended,
            passes={"decode": 8, "prefill": 2},
            pass_seconds={"decode": 0.5, "prefill": 1.5},
            kv_used=30,
            kv_room=120,
            losses=2,
        )

    def events(self) -> list[Event]:
        return []

    def close(self, *, drain: bool = True, timeout: float = 60.0) -> None:
        pass


class ThreadedFront:
    """A front whose server runs in a thread.

    Attributes:
        port: where it listens.
        server: its server.
    """

    def __init__(self, service: ManualService, settings: FrontSettings) -> None:
        ready = threading.Event()
        self._scheme = "http" if settings.tls_certificate is None else "https"
        listener = bind("127.0.0.1", 0, settings)
        self.port = int(listener.getsockname()[1])
        front = HttpFront(service, settings, coder=ByteCoder(), stop_ids=(0,))
        self.server = FrontServer(front, settings, on_ready=ready.set)
        self._thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self._thread.start()
        assert ready.wait(WAIT)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        """A bare connection."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(WAIT)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def join(self) -> None:
        """Wait for the end of the server."""
        self._thread.join(WAIT)
        assert not self._thread.is_alive()


@contextmanager
def served(service: ManualService, **settings: object) -> Iterator[ThreadedFront]:
    """A front in a thread, stopped at the end."""
    front = ThreadedFront(service, FrontSettings("toy", **{"drain_timeout": 1.0, **settings}))  # type: ignore[arg-type]
    try:
        yield front
    finally:
        front.server.stop()
        front.join()


def post(front: ThreadedFront, **body: Any) -> httpx.Response:
    return httpx.post(f"{front.url}/v1/completions", json=body, timeout=WAIT)


def send_raw(front: ThreadedFront, body: dict[str, Any], **options: Any) -> socket.socket:
    """A connection on which a request has been sent and nothing read."""
    content = json.dumps(body).encode()
    connection = front.connect(**options)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


def metric(front: ThreadedFront, name: str, **labels: str) -> float:
    """The value of one sample."""
    families = text_string_to_metric_families(httpx.get(f"{front.url}/metrics", timeout=WAIT).text)
    found = [s.value for family in families for s in family.samples if (s.name, s.labels) == (name, labels)]
    assert len(found) == 1, (name, labels)
    return found[0]
