"""Service: what takes requests and gives tokens, whoever computes them.

The HTTP front, Ray jobs and benchmarks stand on this protocol; they do not know how many ranks there are, nor where.
Members, the processes behind a service, are started by a `Spawner`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from moeplace.placement.placement import Placement
from moeplace.runtime.batch import Request

FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class TokenEvent:
    """What a request has got since its last event.

    Attributes:
        request_id: whose.
        token_ids: new tokens, in order; there may be several, or none at the end.
        finish_reason: None = it goes on. "stop" = the last token is a stop id.
        error: one sentence, with "failed".
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class ServiceEvent:
    """A line of a service's log.

    Attributes:
        time: seconds since the epoch.
        kind: a short name, for programs.
        sentence: for people.
        figures: what belongs to it.
    """

    time: float
    kind: str
    sentence: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class ServiceStatus:
    """A service at one moment.

    Attributes:
        generation: counter of memberships.
        placement_version: counter of commits.
        placement_digest: of the placement in force.
        desired: members that were asked for.
        allocated: ids of members whose processes run.
        active: ids of members in the serving generation.
        routable: ids of members that hold experts to which tokens go.
        waiting: requests without a place.
        running: requests that get tokens.
        steps: passes so far.
        tokens: tokens generated so far.
        migration: `bytes_moved`, `bytes_planned`, `commits`, ... of the one under way; None = there is none.
        counters: totals over members: `collectives` by kind, `bytes_sent` by tier, ...
        imbalance_per_layer: (L,) busiest rank / mean over ranks of routed tokens.
        serving: whether requests are taken.
        reason: why not, else empty.
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
    serving: bool
    reason: str


class Service(Protocol):
    """Takes requests and gives tokens. Every method may be called from any thread and returns soon."""

    def submit(self, request: Request, on_event: Callable[[TokenEvent], None]) -> None:
        """Queue a request.

        `on_event` is called from the service's thread, never concurrently for one request; it must be quick and must
        not raise.

        Raises:
            InputError: it can never fit, or its name is in use.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request; a "cancelled" event follows. Unknown ids are ignored."""
        ...

    def scale(self, num_ranks: int, *, leaving: Sequence[int] | None = None) -> None:
        """Ask for another number of ranks; `status` shows how far that is."""
        ...

    def replace(self, placement: Placement) -> None:
        """Change the placement of the same ranks while serving."""
        ...

    def status(self) -> ServiceStatus:
        """A cheap snapshot."""
        ...

    def events(self) -> list[ServiceEvent]:
        """The log so far."""
        ...

    def close(self, *, drain: bool = True, timeout: float = 60.0) -> None:
        """Take no more requests and end; with `drain` what is in flight is finished first, within `timeout` seconds."""
        ...
