"""Answer: what an engine is told, and what it is told on any doubt: the slots that it has."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Answer:
    """A map for an engine; unpacks as `map, moves, bound`.

    Attributes:
        map: (L, S) int32 expert of every slot.
        moves: (L,) int64 experts that a rank must fetch; zeros without a previous map.
        bound: (L,) float64 proven least imbalance of the loads; ones where nothing was planned.
        imbalance: (L,) float64 that the map reaches, 1 without load; NaN where nothing was planned.
        across: (L,) int64, those of the moves that no rank of the node held.
        reason: why the previous map was kept; None = this is a plan.
        note: why this is a plan by loads alone although a trace was given; None = the trace was used, or none given.
    """

    map: np.ndarray
    moves: np.ndarray
    bound: np.ndarray
    imbalance: np.ndarray
    across: np.ndarray
    reason: str | None = None
    note: str | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.map, self.moves, self.bound))


def keep(previous: object, shape: tuple[int, int, int], reason: str) -> Answer:
    """The previous map; without one, experts in index order, which is how engines start.

    Args:
        previous: the map in force, as the caller gave it.
        shape: L, E, S, as far as they are known; zeros where not.
        reason: what is in doubt.
    """
    layers, experts, slots = shape
    if previous is not None:
        slots_LS = _array_of(previous)
    elif 0 < experts <= slots:
        slots_LS = np.tile(np.arange(slots, dtype=np.int32) % experts, (layers, 1))
    else:
        slots_LS = np.empty((0, 0), np.int32)
    rows = len(slots_LS)
    none_L = np.zeros(rows, np.int64)
    return Answer(slots_LS, none_L, np.ones(rows), np.full(rows, np.nan), none_L.copy(), reason)


def _array_of(previous: object) -> np.ndarray:
    """A copy of a map, (L, S) int32 wherever it is one; empty if it is no array of numbers."""
    try:
        return np.atleast_2d(np.array(previous)).astype(np.int32)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return np.empty((0, 0), np.int32)


def why_not(
    slots_LS: np.ndarray, shape: tuple[int, int, int], slots_per_rank: int, *, twice: bool = False
) -> str | None:
    """What is wrong with a map for an engine; None = nothing: it has every expert of every layer, none twice on a rank.

    Args:
        slots_LS: the map.
        shape: L, E, S.
        slots_per_rank: C.
        twice: whether a rank may hold an expert twice.
    """
    layers, experts, slots = shape
    if slots_LS.shape != (layers, slots):
        return f"the map has shape {slots_LS.shape}, not {(layers, slots)}"
    if not np.issubdtype(slots_LS.dtype, np.integer):
        return f"the map holds {slots_LS.dtype}, not integers"
    if slots_LS.size and not 0 <= slots_LS.min() <= slots_LS.max() < experts:
        return f"the map holds experts {slots_LS.min()}..{slots_LS.max()}, not 0..{experts - 1}"
    ranks = slots // slots_per_rank
    held_LRE = np.zeros((layers, ranks, experts), np.int32)
    rank_S = np.arange(slots) // slots_per_rank
    np.add.at(held_LRE, (np.arange(layers)[:, None], rank_S[None, :], slots_LS), 1)
    missing = np.argwhere(held_LRE.sum(axis=1) == 0)
    if len(missing):
        return f"expert {missing[0, 1]} of layer {missing[0, 0]} has no slot"
    if not twice and slots_per_rank <= experts and held_LRE.max(initial=0) > 1:
        layer, rank, expert = np.argwhere(held_LRE > 1)[0]
        return f"rank {rank} holds expert {expert} of layer {layer} twice"
    return None
