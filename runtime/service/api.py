"""Service: requests in, tokens out, while ranks come, go and fail.

A service is a *coordinator*, which is no rank, and its *members*, one process per rank. This module is what both sides
of it and the fronts that submit requests are written against; what a member is told is in `options`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from moeplace.placement.placement import Placement
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.event import Event

FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class TokenEvent:
    """What a request has got since its last event.

    Attributes:
        request_id: whose.
        token_ids: may be several, or none.
        finish_reason: None = it goes on.
        error: one sentence, with "failed".
        logprobs: of each of the tokens, where the request wants them; None = those of a token are not known any more,
            because it was delivered before to somebody else. Empty = they were not asked for.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None = None
    logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True)
class RequestRecord:
    """What is known of a request that was taken.

    Attributes:
        ticket: the service's own name for it, never used twice.
        request: what was asked.
        token_ids: all that were delivered.
        finish_reason: None = it goes on.
        error: one sentence, with "failed".
        logprobs: as of a `TokenEvent`.
    """

    ticket: str
    request: Request
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True)
class ServiceStatus:
    """A snapshot.

    Attributes:
        generation: number of the membership in force, 0 = none yet.
        placement_version: switches to another placement so far.
        placement_digest: of the placement in force.
        desired: ranks wanted.
        allocated: members that have been started and live.
        active: members of the generation in force.
        routable: members that hold experts.
        waiting, running: requests without and with a place.
        steps: forward passes of the service.
        tokens: tokens delivered.
        migration: the re-placement under way (bytes_moved, bytes_planned, commits), None = none.
        counters: summed over members: steps, collectives, bytes_sent by tier, and so on.
        imbalance_per_layer: (L,) most over mean of the assignments that ranks have computed, 1 = even.
        changing: whether a change of ranks or of the placement is wanted or under way.
        serving: whether requests are being answered.
        reason: why not; while serving, why the last change of ranks failed, "" = it did not.
        ended: nothing will be answered any more.
        passes, pass_seconds: of the ranks, by phase (prefill, decode).
        kv_used, kv_room: positions of the K/V caches: with K/V of running sequences, and all.
        losses: how often ranks were lost.
    """

    generation: int
    placement_version: int
    placement_digest: str
    desired: int
    allocated: tuple[int, ...]
    active: tuple[int, ...]
    routable: tuple[int, ...]
    waiting: int
    running: int
    steps: int
    tokens: int
    migration: Mapping[str, Any] | None
    counters: Mapping[str, Any]
    imbalance_per_layer: tuple[float, ...]
    changing: bool
    serving: bool
    reason: str
    ended: bool = False
    passes: Mapping[str, int] = field(default_factory=dict)
    pass_seconds: Mapping[str, float] = field(default_factory=dict)
    kv_used: int = 0
    kv_room: int = 0
    losses: int = 0


class Service(Protocol):
    """What a front needs. All methods are thread-safe."""

    @property
    def placement(self) -> Placement:
        """In force."""

    def submit(self, request: Request, on_event: Callable[[TokenEvent], None]) -> str:
        """Queue a request; its ticket. `on_event` is called from a thread of the service, never twice at a time.

        Requests that are in flight under the same name are independent of each other.

        Raises:
            InputError: it can never fit, or a token id is out of range.
            MoeplaceError: the service takes no requests.
        """

    def find(self, request_id: str) -> RequestRecord | None:
        """The newest request under a name, one that has ended too; of those, the last are kept."""

    def follow(self, request_id: str, on_event: Callable[[TokenEvent], None], *, first: int = 0) -> bool:
        """Hear of the newest request under a name from token `first` on, as a client that has lost its connection,
        or whose coordinator was started again; whether it is known. Who asked for it goes on hearing of it."""

    def cancel(self, request_id: str, *, ticket: str | None = None) -> None:
        """End the request of a ticket, or without one all in flight under a name; a "cancelled" event follows.

        What is not in flight is ignored.
        """

    def scale(self, num_ranks: int, *, leaving: Sequence[int] | None = None) -> None:
        """Want another number of ranks; returns at once, `status` shows what comes of it.

        Every rank holds an expert of some layer, so there are never more ranks than filled slots.

        Args:
            leaving: members that shall leave; None = those with the highest numbers.

        Raises:
            InputError: there would be no rank, or too many, or a member named is not there.
            MoeplaceError: the service has not begun, or has ended.
        """

    def replace(self, placement: Placement) -> None:
        """Migrate to another placement of the same ranks; returns at once.

        Raises:
            InputError: it is for another model or number of ranks.
        """

    def status(self) -> ServiceStatus:
        """How things are."""

    def events(self) -> list[Event]:
        """The event log, without the oldest events where it has become long."""

    def close(self, *, drain: bool = True, timeout: float = 60.0) -> None:
        """End the members; with `drain` after all requests are done, or the timeout is over."""
