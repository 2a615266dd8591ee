"""LocalRequests: who asked a local service for what, and what they were told."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service.api import FinishReason, TokenEvent

logger = logging.getLogger(__name__)

OnEvent = Callable[[TokenEvent], None]


@dataclass(eq=False)
class Asked:
    """A request in flight.

    Attributes:
        name: that its client gave it.
        on_event: who wants to hear of it.
        wants_logprobs: whether log-probabilities of its tokens are wanted.
        told: tokens that were told.
    """

    name: str
    on_event: OnEvent
    wants_logprobs: bool = False
    told: int = 0


class LocalRequests:
    """Requests in flight, by ticket: names may be used several times at once. All methods are thread-safe.

    Attributes:
        num_tokens: told in all.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[str, Asked] = {}
        self._taken = self.num_tokens = 0

    def take(self, request: Request, on_event: OnEvent) -> Request:
        """The request under its ticket."""
        with self._lock:
            self._taken += 1
            ticket = f"{self._taken}:{request.request_id}"
            self._asked[ticket] = Asked(request.request_id, on_event, request.logprobs is not None)
        return replace(request, request_id=ticket)

    def tickets_of(self, name: str, ticket: str | None) -> list[str]:
        """Of all requests in flight under a name, or of one."""
        with self._lock:
            found = [key for key, asked in self._asked.items() if asked.name == name]
        return found if ticket is None else [key for key in found if key == ticket]

    def tell(
        self,
        ticket: str,
        token_ids: Sequence[int] | None,
        reason: FinishReason | None = None,
        error: str | None = None,
        *,
        logprobs: Mapping[int, TokenLogprob] | None = None,
    ) -> bool:
        """Tell what is new of all tokens (None = none are); whether the client could take it. Who has heard the end
        hears nothing more. `logprobs` are by index of the token."""
        with self._lock:
            asked = self._asked.get(ticket)
            if asked is None:
                return True
            first = asked.told
            new = tuple(token_ids[first:]) if token_ids is not None else ()
            asked.told += len(new)
            self.num_tokens += len(new)
            if reason is not None:
                del self._asked[ticket]
        if not new and reason is None:
            return True
        try:
            found: tuple[TokenLogprob | None, ...] = ()
            if asked.wants_logprobs:
                found = tuple((logprobs or {}).get(index) for index in range(first, first + len(new)))
            asked.on_event(TokenEvent(asked.name, new, reason, error, found))
        except Exception as failure:  # a defect of the listener must not end the others
            logger.error("the listener of request %r failed: %s: %s", asked.name, type(failure).__name__, failure)
            return False
        return True

    def end_all(self, reason: FinishReason, error: str | None) -> None:
        """Tell everybody that nothing more will come."""
        with self._lock:
            tickets = list(self._asked)
        for ticket in tickets:
            self.tell(ticket, None, reason, error)
