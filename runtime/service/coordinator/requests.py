"""RequestLedger: what was asked of a service, and what has been delivered. It outlives every rank."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service.api import TokenEvent

Deliver = Callable[[TokenEvent], None]


@dataclass(eq=False)
class Entry:
    """A request in flight.

    Attributes:
        request: what was asked.
        on_event: who wants to hear of it.
        tokens: delivered so far.
        command: index of the command that made it known to the ranks.
    """

    request: Request
    on_event: Deliver
    tokens: list[int] = field(default_factory=list)
    command: int = -1


class RequestLedger:
    """Requests in flight, and how many tokens were delivered in all.

    Attributes:
        entries: by request id, in the order in which they were asked.
        num_tokens: delivered.
        num_requests: asked.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.num_tokens = self.num_requests = 0

    def add(self, request: Request, on_event: Deliver) -> Entry:
        """Take a request.

        Raises:
            InputError: its name is in use.
        """
        if request.request_id in self.entries:
            raise InputError(f"request {request.request_id!r} is already in flight; names must be unique")
        entry = self.entries[request.request_id] = Entry(request, on_event)
        self.num_requests += 1
        return entry

    def deliver(
        self, request_id: str, first: int, tokens: list[int], reason: Literal["stop", "length"] | None
    ) -> tuple[Deliver, TokenEvent] | None:
        """Note tokens from index `first` on: who is to hear what. None = that is known already, or nobody asks.

        Ranks may tell the same tokens twice, never with a gap.
        """
        entry = self.entries.get(request_id)
        if entry is None:
            return None
        assert first <= len(entry.tokens), f"request {request_id!r} lacks tokens {len(entry.tokens)}..{first}"
        new = tokens[len(entry.tokens) - first :]
        if not new and reason is None:
            return None
        entry.tokens += new
        self.num_tokens += len(new)
        if reason is not None:
            del self.entries[request_id]
        return entry.on_event, TokenEvent(request_id, tuple(new), reason)

    def end(
        self, request_id: str, reason: Literal["cancelled", "failed"], error: str | None = None
    ) -> tuple[Deliver, TokenEvent] | None:
        """Forget a request: who is to hear it. None = it is not in flight."""
        entry = self.entries.pop(request_id, None)
        return None if entry is None else (entry.on_event, TokenEvent(request_id, (), reason, error))

    def delivered(self) -> dict[str, list[int]]:
        """Tokens delivered of every request in flight."""
        return {request_id: list(entry.tokens) for request_id, entry in self.entries.items()}
