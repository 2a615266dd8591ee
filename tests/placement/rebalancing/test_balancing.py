"""Balance by swaps and re-pointed replicas: limits are kept, and it ends where no step is left. Counted from slots."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from moeplace.placement.rebalancing.balancing import rebalance_layer
from tests.placement.random_placements import random_placement
from tests.seeds import FIXED_AND_TODAY

CAPACITY = [3, 2, 3, 2]
BEGINS = np.cumsum([0, *CAPACITY])
EXPERTS = 6


def held(row_S: np.ndarray) -> list[set[int]]:
    """Experts of each rank."""
    return [set(row_S[a:b].tolist()) - {-1} for a, b in itertools.pairwise(BEGINS)]


def fetched(start_S: np.ndarray, row_S: np.ndarray) -> int:
    """Experts on ranks that did not hold them."""
    return sum(len(new - old) for old, new in zip(held(start_S), held(row_S), strict=True))


def times(row_S: np.ndarray, load_E: np.ndarray, speed_R: np.ndarray) -> np.ndarray:
    """(R,) load over speed, loads split evenly over replicas."""
    count_E = np.bincount(row_S[row_S >= 0], minlength=EXPERTS)
    return np.array([sum(load_E[e] / count_E[e] for e in on) for on in held(row_S)]) / speed_R


def steps_from(row_S: np.ndarray, top: int, least: int) -> Iterator[np.ndarray]:
    """Every swap of a slot of rank `top` with one of another, every slot elsewhere given to an expert of it.

    No expert comes twice on a rank, none that loses a replica has fewer than `least`.
    """
    rank_S = np.repeat(np.arange(len(CAPACITY)), CAPACITY)
    for x, y in itertools.product(np.flatnonzero((rank_S == top) & (row_S >= 0)), np.flatnonzero(rank_S != top)):
        swapped, given = row_S.copy(), row_S.copy()
        swapped[[x, y]] = row_S[[y, x]]
        given[y] = row_S[x]
        for after in (swapped, given) if row_S[y] < 0 or (row_S == row_S[y]).sum() > least else (swapped,):
            if all(len(on) == (after[rank_S == r] >= 0).sum() for r, on in enumerate(held(after))):
                yield after


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_limits_are_kept_and_used(seed: int) -> None:
    """As many moves as it says and as are allowed; no step within them that lowers the busiest rank is left out."""
    print("seed", seed)
    rng, replicas_moved = np.random.default_rng(seed), 0
    for number in range(20):
        start_S = random_placement(rng, layers=1, experts=EXPERTS, slots_of_rank=CAPACITY, fill=0.7).slot_to_expert[0]
        load_E, speed_R, least = rng.lognormal(3, 1, EXPERTS), rng.choice([1.0, 2.0], len(CAPACITY)), 1 + number % 2
        for limit in (0, 1, 2, 4, None):
            row_S, most = start_S.astype(np.int32), 99 if limit is None else limit
            made = rebalance_layer(
                row_S, load_E, np.array(CAPACITY), speed_R, max_moves=limit, min_replicas=least, target=0.0
            )
            assert made == fetched(start_S, row_S) <= most, (number, limit)
            time_R = times(row_S, load_E, speed_R)
            assert time_R.max() <= times(start_S, load_E, speed_R).max() * (1 + 1e-9)
            for after_S in steps_from(row_S, int(time_R.argmax()), least):
                if fetched(start_S, after_S) <= most:
                    assert times(after_S, load_E, speed_R).max() >= time_R.max() * (1 - 1e-6), (number, limit, after_S)
            replicas_moved += sorted(row_S.tolist()) != sorted(start_S.tolist())
    assert replicas_moved
