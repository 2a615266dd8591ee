"""Seeded placements for tests."""

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, Placement


def random_placement(
    rng: np.random.Generator,
    *,
    layers: int,
    experts: int,
    slots_of_rank: list[int],
    node_of_rank: list[int] | None = None,
    fill: float = 1.0,
) -> Placement:
    """Experts on random ranks with room, then replicas in a share `fill` of what is left, in random slots."""
    rows = [_random_row(rng, experts, slots_of_rank, fill) for _ in range(layers)]
    nodes = [0] * len(slots_of_rank) if node_of_rank is None else node_of_rank
    return Placement(np.stack(rows), np.array(slots_of_rank), np.array(nodes), np.full(layers, experts))


def _random_row(rng: np.random.Generator, experts: int, slots_of_rank: list[int], fill: float) -> np.ndarray:
    """(S,) one layer."""
    bins: list[list[int]] = [[] for _ in slots_of_rank]
    room = [min(size, experts) for size in slots_of_rank]
    for expert in rng.permutation(experts):
        choices = [rank for rank, held in enumerate(bins) if len(held) < room[rank]]
        bins[rng.choice(choices)].append(int(expert))
    row = []
    for held, size, limit in zip(bins, slots_of_rank, room, strict=True):
        others = rng.permutation([e for e in range(experts) if e not in held])
        held += [int(e) for e in others[: limit - len(held)] if rng.random() < fill]
        row.append(rng.permutation(held + [EMPTY_SLOT] * (size - len(held))))
    return np.concatenate(row).astype(np.int64)
