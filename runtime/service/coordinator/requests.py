"""RequestDesk: what was asked of a service, and what has been delivered. It outlives every rank.

A request is known to the ranks by its *ticket*, which is never used twice: so a name may be used again, by the same
client or another, whatever still comes of the request that had it before.

Ranks can be lost because of a request. One whose ranks were lost twice before it got another token is set aside, with
all that were in the same pass; those are tried again one at a time, and the one that loses its ranks again is given up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service.api import FinishReason, RequestRecord, TokenEvent
from moeplace.runtime.service.coordinator.actions import Accept, CommandLog, Outbox, Tell

Logprobs = Mapping[int, TokenLogprob]
"""By index among a request's tokens."""
_TRIES = 2
"""Losses without a new token after which a request is set aside, and again as many, alone, until it is given up."""


@dataclass(eq=False)
class Entry:
    """A request in flight.

    Attributes:
        ticket: the service's name for it.
        request: what was asked.
        tokens: delivered so far.
        command: index of the command that made it known to the ranks, -1 = none yet.
        losses: generations that lost a rank while it ran, since its last token.
        is_tried: whether the ranks of the generation in force have begun with it.
        is_aside: whether the ranks are not to have it now.
        is_alone: whether it was set aside and is tried again.
    """

    ticket: str
    request: Request
    tokens: list[int] = field(default_factory=list)
    command: int = -1
    losses: int = 0
    is_tried: bool = False
    is_aside: bool = False
    is_alone: bool = False


class RequestDesk:
    """Requests in flight.

    Attributes:
        entries: by ticket, in the order in which they were asked.
        num_tokens: delivered in all.
    """

    def __init__(self, log: CommandLog, out: Outbox) -> None:
        self._log, self._out = log, out
        self.entries: dict[str, Entry] = {}
        self.num_tokens = self._taken = 0

    def restore(self, records: Sequence[RequestRecord], *, taken: int) -> None:
        """Go on with the requests of a service that has ended; `taken` tickets are used up."""
        self._taken = max(taken, self._taken)
        for record in records:
            self.entries[record.ticket] = Entry(record.ticket, record.request, list(record.token_ids))

    def take(self, request: Request) -> str:
        """Take a request; its ticket."""
        self._taken += 1
        ticket = f"{self._taken}:{request.request_id}"
        entry = self.entries[ticket] = Entry(ticket, request)
        self._out.add(Accept(ticket, request))
        self._ask(entry)
        return ticket

    def cancel(self, request_id: str, ticket: str | None = None) -> None:
        """End one request, or all under a name."""
        found = [e.ticket for e in self.entries.values() if e.request.request_id == request_id]
        for name in found if ticket is None else {ticket} & set(found):
            self.drop(name, "cancelled")

    def drop(self, ticket: str, reason: FinishReason, error: str | None = None) -> None:
        """End a request that the ranks may be busy with."""
        entry = self.entries.get(ticket)
        if entry is not None:
            if entry.command >= 0:
                self._log.append({"kind": "cancel", "request_id": ticket})
            self._end(entry, (), reason, error)

    def end_all(self, error: str) -> None:
        """The service ends: whoever asked hears it; what was asked is kept for another one with the same state."""
        entries, self.entries = self.entries, {}
        for entry in entries.values():
            event = TokenEvent(entry.request.request_id, (), "failed", error)
            self._out.add(Tell(entry.ticket, len(entry.tokens), event, is_final=False))

    def hear(
        self,
        ticket: str,
        first: int,
        tokens: Sequence[int],
        reason: FinishReason | None,
        *,
        logprobs: Logprobs | None = None,
    ) -> None:
        """Ranks have tokens from index `first` on: those that are new are delivered. Ranks may tell them twice."""
        entry = self.entries.get(ticket)
        if entry is None:
            return
        known, most = len(entry.tokens), entry.request.max_new_tokens
        if not 0 <= first <= known or first + len(tokens) > most:
            told = f"token {first} was reported when {known} of at most {most} were known"
            self.drop(ticket, "failed", f"internal error: {told}")
            return
        new = tokens[known - first :]
        found = self._logprobs_of(entry, len(new), logprobs or {})
        if reason is not None:
            self._end(entry, new, reason, logprobs=found)
        elif new:
            self._deliver(entry, new, logprobs=found)

    def begin_pass(self, tickets: Sequence[str]) -> None:
        """The ranks of the generation in force begin with these."""
        for ticket in tickets:
            if ticket in self.entries:
                self.entries[ticket].is_tried = True

    def blame(self) -> None:
        """A generation that served has lost a rank."""
        for entry in list(self.entries.values()):
            if not entry.is_tried:
                continue
            entry.is_tried, entry.losses = False, entry.losses + 1
            if entry.losses >= 2 * _TRIES and entry.is_alone:
                told = f"the ranks that served it were lost {entry.losses} times: it is not tried again"
                self.drop(entry.ticket, "failed", told)
            elif entry.losses >= _TRIES and not entry.is_alone:
                entry.is_aside = True

    def try_one_aside(self) -> None:
        """Let the ranks have one of the requests that were set aside, unless one is being tried."""
        if any(entry.is_alone for entry in self.entries.values()):
            return
        entry = next((entry for entry in self.entries.values() if entry.is_aside), None)
        if entry is not None:
            entry.is_aside, entry.is_alone = False, True
            self._ask(entry)

    def ask_again(
        self,
        known: Mapping[str, Sequence[int]],
        *,
        applied: int,
        logprobs: Mapping[str, Logprobs] | None = None,
    ) -> None:
        """A generation begins with `known` requests, after `applied` commands: what it lacks it is told again."""
        for ticket, added in known.items():
            self.hear(ticket, 0, added, None, logprobs=(logprobs or {}).get(ticket))
            if ticket not in self.entries:  # it has ended while the generation formed
                self._log.append({"kind": "cancel", "request_id": ticket})
        for entry in self.entries.values():
            entry.is_tried = False
            if not entry.is_aside and entry.command < applied and entry.ticket not in known:
                self._ask(entry)

    def delivered(self) -> dict[str, list[int]]:
        """Tokens of every request that the ranks are to go on with."""
        return {e.ticket: list(e.tokens) for e in self.entries.values() if not e.is_aside}

    def find(self, request_id: str) -> RequestRecord | None:
        """The newest request in flight under a name."""
        found = [entry for entry in self.entries.values() if entry.request.request_id == request_id]
        return RequestRecord(found[-1].ticket, found[-1].request, tuple(found[-1].tokens)) if found else None

    @property
    def num_aside(self) -> int:
        """Requests that the ranks do not have now."""
        return sum(entry.is_aside for entry in self.entries.values())

    def _ask(self, entry: Entry) -> None:
        request = replace(entry.request, request_id=entry.ticket, note="")
        command = {"kind": "add", "request": request.to_json(), "added": list(entry.tokens)}
        entry.command = self._log.append(command)

    @staticmethod
    def _logprobs_of(entry: Entry, count: int, logprobs: Logprobs) -> tuple[TokenLogprob | None, ...]:
        """Of the next `count` tokens, where they are wanted."""
        first = len(entry.tokens)
        wanted = range(first, first + count) if entry.request.logprobs is not None else ()
        return tuple(logprobs.get(index) for index in wanted)

    def _deliver(
        self,
        entry: Entry,
        tokens: Sequence[int],
        reason: FinishReason | None = None,
        error: str = "",
        *,
        logprobs: tuple[TokenLogprob | None, ...] = (),
    ) -> None:
        first = len(entry.tokens)
        entry.tokens += tokens
        self.num_tokens += len(tokens)
        if tokens:
            entry.losses, entry.is_alone = 0, False
        event = TokenEvent(entry.request.request_id, tuple(tokens), reason, error or None, logprobs)
        self._out.add(Tell(entry.ticket, first, event))

    def _end(
        self,
        entry: Entry,
        tokens: Sequence[int],
        reason: FinishReason,
        error: str | None = None,
        *,
        logprobs: tuple[TokenLogprob | None, ...] = (),
    ) -> None:
        del self.entries[entry.ticket]
        self._deliver(entry, tokens, reason, error or "", logprobs=logprobs)
