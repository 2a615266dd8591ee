"""TierLimits: how much of a rank's experts is in fast memory, and how the rest gets there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from moeplace.placement.tiers.policy import POLICIES, PolicyName
from moeplace.profiling.errors import InputError


@dataclass(frozen=True)
class TierLimits:
    """See the module. The same on every rank.

    Attributes:
        fast_slots: experts per layer that fast memory holds, on average over layers; rows for transit are among them.
        host_slots: experts per layer in host memory; beyond, they are read from the checkpoint. None = all.
            Staging rows of migrations are taken from these.
        policy: what stays and what is fetched ahead; see `placement.tiers.policy`.
        look_ahead: layers whose gates see this layer's input before their turn; 0 = what is asked for is loaded.
        transit: rows over all layers for what is on its way.
        pieces: in which an expert is fetched ahead; between two of them that can be broken off.
        host_computes: whether a missing expert may be computed on the host, where that ends sooner.
        latency: seconds that every load takes beside its bytes: a link to be emulated; None = as fast as it goes.
        bandwidth: bytes per second of that link; None = as fast as it goes.
    """

    fast_slots: int
    host_slots: int | None = None
    policy: PolicyName = "pinned"
    look_ahead: int = 0
    transit: int = 2
    pieces: int = 4
    host_computes: bool = False
    latency: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise InputError(f"policy {self.policy!r} must be one of {', '.join(POLICIES)}")
        if self.policy == "lookahead" and self.look_ahead < 1:
            object.__setattr__(self, "look_ahead", 1)
        for name, least in (("fast_slots", 1), ("host_slots", 0), ("look_ahead", 0), ("transit", 1), ("pieces", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} ({value}) must be at least {least}")
        if not 0 <= (self.latency or 0) < math.inf or (self.bandwidth is not None and not self.bandwidth > 0):
            raise InputError(f"a link of latency {self.latency} s and {self.bandwidth} bytes/s cannot be emulated")

    @classmethod
    def of(cls, value: "Self | Mapping[str, Any] | None") -> "TierLimits | None":
        """Limits, or the plain data that they were written as."""
        return cls(**value) if isinstance(value, Mapping) else value

    def least_seconds(self, size: int) -> float:
        """Seconds that the emulated link takes for a load of `size` bytes."""
        return (self.latency or 0.0) + (size / self.bandwidth if self.bandwidth else 0.0)
