"""What a service is given: options, the job of a member, and who starts members somewhere."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

from moeplace.profiling.errors import InputError
from moeplace.runtime.comm.devices import DEVICES
from moeplace.runtime.engine.limits import EngineLimits


@dataclass(frozen=True)
class ServiceOptions:
    """How members serve.

    Attributes:
        mode: auto, dispatch-combine, coherent or allgather.
        trace: file of recorded routing from which `auto` predicts every mode, readable by every member; None = `auto`
            follows the placement.
        calibration: file of measured links and expert time for that; None = nominal ones.
        dtype: number type by name, None = the checkpoint's.
        limits: of every member's engine.
        node_aware: dispatch-combine sends one copy per node; None = where tokens have several experts.
        probe_tokens: length of a token sequence whose logits are compared before and after every switch of a
            re-placement, a pass each; 0 = checksums and digests alone.
        bytes_per_step: most bytes a rank sends, and most it receives, between two steps of a re-placement.
        timeout: seconds without a sign of life after which a member counts as hung: how long it can stop all. A thread
            of its own gives them, so that a member at work is not taken for a hung one, however long its step is.
        step_timeout: seconds after which a step that does not end is given up although all members live.
        start_timeout: seconds for a member, from when its process runs, to load and become a rank.
        keep_width: whether members that were lost are replaced by new ones.
        threads: of a member; how many cores one rank may use.
        replica_rule: who serves an expert with several slots, `moeplace` or `balanced`.
        precision: names of precisions and the choice among them for each expert, as plain data; see
            `moeplace.runtime.models.precisions.precision_checkpoint`. None = exact.
        device: of members: cpu, cuda (a GPU for each), or auto: cuda where a machine has GPUs.
        check_steps: compare the ranks after every step, see `moeplace.runtime.engine.step_check`; for tests.
    """

    mode: str = "auto"
    dtype: str | None = None
    limits: EngineLimits = field(default_factory=lambda: EngineLimits(staging_rows=1))
    node_aware: bool | None = None
    probe_tokens: int = 0
    bytes_per_step: int = 1 << 22
    timeout: float = 20.0
    step_timeout: float = 600.0
    start_timeout: float = 300.0
    keep_width: bool = False
    threads: int = 1
    device: str = "auto"
    check_steps: bool = False
    replica_rule: str = "moeplace"
    trace: str | None = None
    calibration: str | None = None
    precision: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("bytes_per_step", "timeout", "step_timeout", "start_timeout"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} ({getattr(self, name)}) must be positive")
        if self.device not in DEVICES:
            raise InputError(f"device {self.device!r} must be one of {', '.join(DEVICES)}")
        if self.threads < 1:
            raise InputError(f"threads ({self.threads}) must be at least 1")
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
        secret: with which messages are signed.
        place: its number among the members that are alive on its machine, as its spawner counts them.
    """

    member_id: int
    host: str
    port: int
    prefix: str
    checkpoint: str
    options: ServiceOptions
    faults: tuple[Mapping[str, Any], ...] = ()
    secret: str = field(default="", repr=False)
    place: int = 0

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

    def has_started(self) -> bool:
        """Whether its process runs, or did: it may wait for room first."""

    def kill(self) -> None:
        """End it at once (SIGKILL)."""

    def wait(self, timeout: float) -> int | None:
        """Its exit code, None = it lives on after `timeout` seconds."""

    def last_words(self) -> str:
        """The end of what it printed, "" = nothing, or that is kept elsewhere."""

    def release(self) -> None:
        """It has ended and nothing more is asked of it: close what is open for it."""


class Spawner(Protocol):
    """Where members are started."""

    def start(self, member_id: int, job: MemberJob) -> Member:
        """Start a process that runs `moeplace.runtime.service.member.loop.run_member(job)`; returns at once.

        Where there is no room yet it starts when there is.
        """

    def close(self) -> None:
        """Kill what still runs."""
