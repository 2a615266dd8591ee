"""LocalRequests: who asked a local service for what, and what they were told."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service.api import FinishReason, RequestRecord, TokenEvent

logger = logging.getLogger(__name__)

OnEvent = Callable[[TokenEvent], None]

KEPT = 1000
"""Requests that have ended and can still be asked for."""


@dataclass(eq=False)
class Listener:
    """Who wants to hear of a request, and how many of its tokens it has heard."""

    on_event: OnEvent
    heard: int = 0


@dataclass(eq=False)
class Asked:
    """A request.

    Attributes:
        ticket: under which the engine knows it.
        request: what was asked, under the name that its client gave it.
        listeners: who wants to hear of it.
        tokens: all so far.
        logprobs: of each, where they are wanted.
        reason: how it ended, None = it goes on.
        error: one sentence, with "failed".
        telling: held while its listeners are told: nobody is told twice at a time, or out of order.
    """

    ticket: str
    request: Request
    listeners: list[Listener]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    reason: FinishReason | None = None
    error: str | None = None
    telling: threading.RLock = field(default_factory=threading.RLock)


class LocalRequests:
    """Requests in flight, by ticket: names may be used several times at once. All methods are thread-safe.

    Attributes:
        num_tokens: told in all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[str, Asked] = {}
        self._newest: dict[str, Asked] = {}  # by name, of those in flight and those that are kept
        self._ended: deque[Asked] = deque()
        self._taken = self.num_tokens = 0

    def take(self, request: Request, on_event: OnEvent) -> Request:
        """The request under its ticket."""
        with self._lock:
            self._taken += 1
            ticket = f"{self._taken}:{request.request_id}"
            self._asked[ticket] = self._newest[request.request_id] = Asked(ticket, request, [Listener(on_event)])
        return replace(request, request_id=ticket, note="")

    def tickets_of(self, name: str, ticket: str | None) -> list[str]:
        """Of all requests in flight under a name, or of one."""
        with self._lock:
            found = [key for key, asked in self._asked.items() if asked.request.request_id == name]
        return found if ticket is None else [key for key in found if key == ticket]

    def find(self, name: str) -> RequestRecord | None:
        """The newest request under a name."""
        with self._lock:
            asked = self._newest.get(name)
            if asked is None:
                return None
            tokens, logprobs = tuple(asked.tokens), tuple(asked.logprobs)
            return RequestRecord(asked.ticket, asked.request, tokens, asked.reason, asked.error, logprobs)

    def follow(self, name: str, on_event: OnEvent, *, first: int) -> bool:
        """Tell somebody else what is known of the newest request under a name, and what is still to come."""
        with self._lock:
            asked = self._newest.get(name)
        if asked is None:
            return False
        with asked.telling:
            asked.listeners.append(Listener(on_event, first))
            self._tell_listeners(asked)
        return True

    def tell(
        self,
        ticket: str,
        token_ids: Sequence[int] | None,
        reason: FinishReason | None = None,
        error: str | None = None,
        *,
        logprobs: Mapping[int, TokenLogprob] | None = None,
    ) -> bool:
        """Tell what is new of all tokens (None = none are); whether anybody could take it. Who has heard the end
        hears nothing more. `logprobs` are by index of the token."""
        with self._lock:
            asked = self._asked.get(ticket)
            if asked is None:
                return True
            first = len(asked.tokens)
            new = token_ids[first:] if token_ids is not None else ()
            asked.tokens += new
            if asked.request.logprobs is not None:
                asked.logprobs += [(logprobs or {}).get(index) for index in range(first, first + len(new))]
            self.num_tokens += len(new)
            if reason is not None:
                asked.reason, asked.error = reason, error
                self._keep_ended(asked)
        return self._tell_listeners(asked) if new or reason is not None else True

    def end_all(self, reason: FinishReason, error: str | None) -> None:
        """Tell everybody that nothing more will come."""
        with self._lock:
            tickets = list(self._asked)
        for ticket in tickets:
            self.tell(ticket, None, reason, error)

    def _keep_ended(self, asked: Asked) -> None:
        del self._asked[asked.ticket]
        self._ended.append(asked)
        if len(self._ended) > KEPT:
            oldest = self._ended.popleft()
            name = oldest.request.request_id
            if self._newest.get(name) is oldest:
                del self._newest[name]

    def _tell_listeners(self, asked: Asked) -> bool:
        """Bring all who listen up to date; whether one is left who could take it."""
        with asked.telling:
            with self._lock:
                count, reason, error = len(asked.tokens), asked.reason, asked.error
            for listener in [*asked.listeners]:
                heard, listener.heard = listener.heard, max(listener.heard, count)
                new, logprobs = tuple(asked.tokens[heard:count]), tuple(asked.logprobs[heard:count])
                if not new and reason is None:
                    continue
                try:
                    listener.on_event(TokenEvent(asked.request.request_id, new, reason, error, logprobs))
                except Exception as failure:  # a defect of the listener must not end the others
                    name = asked.request.request_id
                    logger.error("the listener of request %r failed: %s: %s", name, type(failure).__name__, failure)
                    asked.listeners.remove(listener)
            could = bool(asked.listeners)
            if reason is not None:
                asked.listeners.clear()
            return could
