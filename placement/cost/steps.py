"""Steps of a trace: how many tokens are served together, and which.

A trace has no steps. A step of B tokens is formed from B lanes: the token sequence is cut into B pieces of equal
length, and step s holds the s-th token of every piece, so that each lane reads its sequences in order.

Shape letters: T tokens, B batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True)
class StepShape:
    """Sizes of one step.

    Attributes:
        batch: tokens of one step over all ranks.
        hidden_size: D, elements that travel per token copy.
        dtype_bytes: bytes per element.
        kv_dim: K/V elements per token and layer, which `coherent` exchanges once per step.
    """

    batch: int = 256
    hidden_size: int = 2048
    dtype_bytes: int = 2
    kv_dim: int = 576

    def __post_init__(self) -> None:
        for name in ("batch", "hidden_size", "dtype_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.kv_dim < 0:
            raise InputError(f"kv_dim ({self.kv_dim}) must not be negative")


class Lanes(NamedTuple):
    """Token `lane * length + step` is in step `step`; tokens beyond the last lane fill no step."""

    width: int
    """Lanes: tokens of a step."""
    length: int
    """Steps: tokens of a lane."""


def cut_lanes(num_tokens: int, batch: int) -> Lanes:
    """`batch` lanes, or one per token where there are fewer."""
    width = min(batch, num_tokens)
    return Lanes(width, num_tokens // width)


def step_of_token(num_tokens: int, batch: int) -> np.ndarray:
    """(T,) step of each token with B lanes; -1 for the at most B - 1 tokens that fill no step."""
    lanes = cut_lanes(num_tokens, batch)
    index = np.arange(num_tokens)
    return np.where(index < lanes.width * lanes.length, index % lanes.length, -1)


def default_shape(trace: RoutingTrace) -> StepShape:
    """Sizes of a step with what the trace knows of its model."""
    nominal = StepShape()
    return StepShape(hidden_size=trace.hidden_size or nominal.hidden_size, kv_dim=trace.kv_dim or nominal.kv_dim)
