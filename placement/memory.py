"""Memory: where experts are that do not fit beside their rank's compute units, and what fetching them costs.

    fast     budget of a rank, in experts per layer or in bytes over all layers; experts are computed from here
    host     link to the fast memory; the host may compute experts itself, at its own pace
    disk     read into the host, then over the link

Of a rank's fast rows a few are for transit: what is fetched lands there where no other row may be given up. They count
against the budget.

Shape letters: L MoE layers, E experts per layer, R ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np

from moeplace.profiling.errors import FormatError, InputError

Bytes = TypeVar("Bytes", float, np.ndarray)

RESIDENT, HOST, DISK = 0, 1, 2
TIERS = ("resident", "host", "disk")
"""Names of the tiers of a slot, by number."""


@dataclass(frozen=True)
class HostCompute:
    """Seconds that a host spends on one expert: affine in its tokens."""

    per_expert: float
    per_token: float

    def __post_init__(self) -> None:
        _check_numbers("host compute", {"per_expert": self.per_expert, "per_token": self.per_token})


@dataclass(frozen=True)
class HostTier:
    """A rank's share of host memory.

    Attributes:
        bandwidth: bytes per second from it into the fast memory of its rank.
        latency: seconds of a transfer, whatever it carries.
        bytes: room for experts, of a rank over all layers.
        compute: None = the host computes no experts.
        wake: seconds that a rank loses beside each wait for a load: it has to be woken, and its caches have gone cold.
    """

    bandwidth: float
    latency: float = 0.0
    bytes: float = float("inf")
    compute: HostCompute | None = None
    wake: float = 0.0

    def __post_init__(self) -> None:
        numbers = {"latency": self.latency, "wake": self.wake}
        _check_numbers("host", numbers, positive={"bandwidth": self.bandwidth, "bytes": self.bytes})


@dataclass(frozen=True)
class DiskTier:
    """A rank's share of a disk that holds the checkpoint.

    Attributes:
        bandwidth: bytes per second into host memory.
        latency: seconds of a read, whatever it carries.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers("disk", {"latency": self.latency}, positive={"bandwidth": self.bandwidth})


@dataclass(frozen=True, eq=False)
class Memory:
    """The tiers of every rank of a cluster.

    Attributes:
        fast_slots: (R,) int64 experts per layer that a rank's fast memory holds, on average over layers; None where
            `fast_bytes` says it.
        fast_bytes: (R,) float64 bytes of experts over all layers.
        host: what lies behind it.
        disk: what lies behind that; None = no disk.
        transit: rows of the budget, over all layers, for what is on its way.
        pieces: of an expert: between two of them a load that was begun ahead can be broken off, or wait for others.

    Raises:
        InputError: a value breaks a rule.
    """

    host: HostTier
    fast_slots: np.ndarray | None = None
    fast_bytes: np.ndarray | None = None
    disk: DiskTier | None = None
    transit: int = 2
    pieces: int = 4

    def __post_init__(self) -> None:
        if (self.fast_slots is None) == (self.fast_bytes is None):
            raise InputError("fast memory is stated either in slots per layer or in bytes")
        if self.transit < 1:
            raise InputError(f"transit rows ({self.transit}) must be at least 1: a missing expert needs room to land")
        if self.pieces < 1:
            raise InputError(f"pieces of a load ({self.pieces}) must be at least 1")
        for name, least, kind in (("fast_slots", 1, np.int64), ("fast_bytes", 0, np.float64)):
            value = getattr(self, name)
            if value is not None:
                own = np.atleast_1d(np.array(value, dtype=kind))
                if own.ndim != 1 or not (own >= least).all() or not (own > 0).all():
                    raise InputError(f"{name.replace('_', ' ')} must be positive, one number a rank, not {value}")
                own.flags.writeable = False
                object.__setattr__(self, name, own)

    @classmethod
    def from_document(cls, document: Mapping[str, Any], num_ranks: int) -> Self | None:
        """The tables `fast`, `host` and `disk` of a cluster file; None where it has none of them.

        Raises:
            InputError: a value breaks a rule.
            FormatError: a table or a key is missing or unknown.
        """
        if not {"fast", "host", "disk"} & set(document):
            return None
        for table in ("fast", "host"):
            if table not in document:
                raise FormatError(f"memory tiers need the table [{table}]")
        fast, host = dict(document["fast"]), dict(document["host"])
        transit = int(fast.pop("transit", cls.transit))
        pieces = int(host.pop("pieces", cls.pieces))
        unknown = set(fast) - {"slots", "bytes"}
        if unknown or len(fast) != 1:
            raise FormatError("[fast] has either slots or bytes, and optionally transit")
        (unit, amount), compute = fast.popitem(), host.pop("compute", None)
        per_rank = np.array(np.broadcast_to(np.asarray(amount), (num_ranks,)))
        tier = HostTier(**host, compute=None if compute is None else HostCompute(**compute))
        disk = DiskTier(**document["disk"]) if "disk" in document else None
        return cls(tier, disk=disk, transit=transit, pieces=pieces, **{f"fast_{unit}": per_rank})

    @property
    def num_ranks(self) -> int:
        return len(self._stated())

    def rows(self, rank: int, *, layers: int, expert_bytes: float) -> int:
        """Experts that the fast memory of a rank holds over all layers, rows for transit included.

        Raises:
            InputError: it does not hold one expert and one on its way, or its bytes cannot be counted in experts.
        """
        if self.fast_slots is not None:
            return int(self.fast_slots[rank]) * layers
        if expert_bytes <= 1:
            raise InputError("fast memory in bytes needs a trace that says how many bytes an expert has")
        rows = int(self._stated()[rank] // expert_bytes)
        if rows < self.transit:
            raise InputError(
                f"fast memory of rank {rank} ({self._stated()[rank]:.4g} bytes) must hold its {self.transit} rows for "
                f"transit, of {expert_bytes:.4g} bytes each"
            )
        return rows

    def load_seconds(self, tier: int, expert_bytes: Bytes) -> Bytes:
        """Seconds from the request of a backed expert until it is in fast memory, on idle links."""
        seconds = self.host.latency + expert_bytes / self.host.bandwidth
        if tier != DISK:
            return seconds
        if self.disk is None:
            raise InputError("the placement has experts on disk, the memory has no disk tier")
        return seconds + self.disk.latency + expert_bytes / self.disk.bandwidth

    def _stated(self) -> np.ndarray:
        stated = self.fast_bytes if self.fast_slots is None else self.fast_slots
        assert stated is not None
        return stated


def _check_numbers(name: str, numbers: Mapping[str, float], *, positive: Mapping[str, float] | None = None) -> None:
    for key, value in numbers.items():
        if not value >= 0:
            raise InputError(f"{name} {key} ({value}) must not be negative")
    for key, value in (positive or {}).items():
        if not value > 0:
            raise InputError(f"{name} {key} ({value}) must be positive")
