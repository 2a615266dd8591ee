"""Request: what an engine asks of the policy, in one canonical form."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Request:
    """Loads, the shape of the cluster, the map in force, and limits on moves (`plan` says what they mean).

    Attributes:
        load_TLE: (steps, L, E) float64.
        previous: (L, S) integers, -1 = empty; None = nothing is placed yet.
    """

    load_TLE: np.ndarray
    ranks: int
    slots_per_rank: int
    nodes: int = 1
    groups: int = 1
    previous: np.ndarray | None = None
    max_moves: int | None = None
    max_moves_per_rank: int | None = None
    max_moves_across_nodes: int | None = None
    move_price: float = 0.0
    time_limit: float = 0.25

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, E, S."""
        return self.load_TLE.shape[1], self.load_TLE.shape[2], self.ranks * self.slots_per_rank

    def without_limits(self) -> Self:
        """The same with any number of moves."""
        return replace(self, max_moves=None, max_moves_per_rank=None, max_moves_across_nodes=None)

    def with_some_load(self) -> Self:
        """The same, where layers with empty slots but without load have equal loads: their slots must be filled."""
        idle_L = np.logical_not(self.load_TLE.any(axis=(0, 2)))
        if self.previous is not None:
            idle_L = idle_L & (self.previous < 0).any(axis=1)
        return replace(self, load_TLE=np.where(idle_L[:, None], 1.0, self.load_TLE)) if idle_L.any() else self


def steps_of(load: object) -> np.ndarray:
    """(steps, L, E) float64 of (E,), (L, E) or (steps, L, E) numbers; steps without any load are left out.

    Raises:
        ValueError: it has another number of axes, no expert, or is no array of numbers.
    """
    array = np.asarray(load, dtype=np.float64)
    if not 1 <= array.ndim <= 3 or not array.shape[-1]:
        raise ValueError(f"load has shape {array.shape}, not (layers, experts) or (steps, layers, experts)")
    load_TLE = np.array(array, ndmin=3, copy=None)
    if not np.isfinite(load_TLE).all() or (load_TLE < 0).any():
        raise ValueError("load must be finite numbers, not negative")
    used_T = load_TLE.any(axis=(1, 2))
    return load_TLE[used_T] if used_T.any() else load_TLE[:1]


def finite(name: str, value: float) -> float:
    """A number that is finite and not negative; ValueError names it otherwise."""
    if not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name} ({value}) must be a number, not negative")
    return float(value)
