"""Service: requests in, tokens out, while ranks come, go and fail.

A service is a *coordinator*, which is no rank, and its *members*, one process per rank. This module is what both sides
of it are written against: the front that submits requests, and the spawner that starts members somewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, Self

from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request

FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class TokenEvent:
    """What a request has got since its last event.

    Attributes:
        request_id: whose.
        token_ids: may be several, or none.
        finish_reason: None = it goes on.
        error: one sentence, with "failed".
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None = None


@dataclass(frozen=True)
class ServiceEvent:
    """An entry of the event log.

    Attributes:
        time: seconds since the epoch.
        kind: a word, such as "loss" or "joined".
        sentence: what happened, for people.
        figures: the same, for programs.
    """

    time: float
    kind: str
    sentence: str
    figures: Mapping[str, Any] = field(default_factory=dict)


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


class Service(Protocol):
    """What a front needs. All methods are thread-safe."""

    def submit(self, request: Request, on_event: Callable[[TokenEvent], None]) -> None:
        """Queue a request. `on_event` is called from a thread of the service, never twice at a time.

        Raises:
            InputError: it can never fit, a token id is out of range, or its name is in use.
        """

    def cancel(self, request_id: str) -> None:
        """End a request; a "cancelled" event follows. An unknown name is ignored."""

    def scale(self, num_ranks: int, *, leaving: Sequence[int] | None = None) -> None:
        """Want another number of ranks; returns at once, `status` shows what comes of it.

        Args:
            leaving: members that shall leave; None = those with the highest numbers.

        Raises:
            InputError: there would be no rank, or a member named is not there.
            MoeplaceError: the service has not begun, or has ended.
        """

    def replace(self, placement: Placement) -> None:
        """Migrate to another placement of the same ranks; returns at once.

        Raises:
            InputError: it is for another model or number of ranks.
        """

    def status(self) -> ServiceStatus:
        """How things are."""

    def events(self) -> list[ServiceEvent]:
        """The event log, without the oldest events where it has become long."""

    def close(self, *, drain: bool = True, timeout: float = 60.0) -> None:
        """End the members; with `drain` after all requests are done, or the timeout is over."""


@dataclass(frozen=True)
class ServiceOptions:
    """How members serve.

    Attributes:
        mode: auto, dispatch-combine, coherent or allgather.
        dtype: number type by name, None = the checkpoint's.
        limits: of every member's engine.
        node_aware: dispatch-combine sends one copy per node; None = where tokens have several experts.
        probe_tokens: length of a token sequence whose logits are compared before and after every switch of a
            re-placement, a pass each; 0 = checksums and digests alone.
        bytes_per_step: most bytes a rank sends, and most it receives, between two steps of a re-placement.
        timeout: seconds after which a collective that does not end is given up: how long a hung rank can stop all.
        start_timeout: seconds for a member to start and load.
        keep_width: whether members that were lost are replaced by new ones.
        check_steps: compare the ranks after every step, see `moeplace.runtime.engine.step_check`; for tests.
    """

    mode: str = "auto"
    dtype: str | None = None
    limits: EngineLimits = field(default_factory=lambda: EngineLimits(staging_rows=1))
    node_aware: bool | None = None
    probe_tokens: int = 0
    bytes_per_step: int = 1 << 22
    timeout: float = 20.0
    start_timeout: float = 300.0
    keep_width: bool = False
    check_steps: bool = False

    def __post_init__(self) -> None:
        for name in ("bytes_per_step", "timeout", "start_timeout"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} ({getattr(self, name)}) must be positive")
        if self.probe_tokens < 0:
            raise InputError(f"probe_tokens ({self.probe_tokens}) must not be negative")
        if self.limits.staging_rows < 1:
            raise InputError(f"staging_rows ({self.limits.staging_rows}) must be at least 1 for a service")

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """From plain data."""
        return cls(**{**document, "limits": EngineLimits(**document["limits"])})


@dataclass(frozen=True)
class MemberJob:
    """What a member is told when it starts: plain data.

    Attributes:
        member_id: its number, never used twice.
        host, port: the coordinator's store.
        prefix: of the service's keys there.
        checkpoint: folder.
        options: how to serve.
        faults: what to do to itself and when, for tests; see `moeplace.runtime.service.faults`.
    """

    member_id: int
    host: str
    port: int
    prefix: str
    checkpoint: str
    options: ServiceOptions
    faults: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """From plain data."""
        options = ServiceOptions.from_json(document["options"])
        return cls(**{**document, "options": options, "faults": tuple(document["faults"])})


class Member(Protocol):
    """One started process, or an actor."""

    member_id: int

    def is_alive(self) -> bool:
        """Whether it has not ended."""

    def kill(self) -> None:
        """End it at once (SIGKILL)."""

    def wait(self, timeout: float) -> int | None:
        """Its exit code, None = it lives on after `timeout` seconds."""


class Spawner(Protocol):
    """Where members are started."""

    def start(self, member_id: int, job: MemberJob) -> Member:
        """Start a process that runs `moeplace.runtime.service.member.loop.run_member(job)`; returns at once."""

    def close(self) -> None:
        """Kill what still runs."""
