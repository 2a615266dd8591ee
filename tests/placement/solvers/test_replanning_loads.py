"""Loads and an engine's own start in force: `solve --max-moves` reaches what an engine's policy reaches."""

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.migration.relabel import moves
from moeplace.placement.objective import load_imbalance
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve


def start_layout(layers: int, experts: int, ranks: int, slots_per_rank: int) -> Placement:
    """Experts in index order, then the first ones again, as vLLM begins."""
    row = np.arange(ranks * slots_per_rank) % experts
    node = np.arange(ranks) // (ranks // 2)
    return Placement(np.tile(row, (layers, 1)), np.full(ranks, slots_per_rank), node, np.full(layers, experts))


@pytest.mark.parametrize("shares", ["zipf", "lognormal"])
def test_few_moves_balance_an_engines_start(shares: str, dated_seed: int) -> None:
    """64 experts on 8 ranks of 9 slots: 16 moves a layer leave at most 5 %, which no single swap at a time reaches."""
    rng = np.random.default_rng(dated_seed)
    share_LE = {
        "zipf": np.stack([rng.permutation(1 / np.arange(1, 65)) for _ in range(4)]),
        "lognormal": np.exp(0.7 * rng.standard_normal((4, 64))),
    }[shares]
    load_LE = np.rint(1e6 * share_LE / share_LE.sum(axis=1, keepdims=True))
    previous = start_layout(4, 64, 8, 9)
    cluster = Cluster.uniform(8, slots_per_rank=9, ranks_per_node=4)
    problem = Problem.from_load(load_LE, cluster, previous=previous, max_moves=16)
    result = solve(problem, time_limit=2)
    before, after = (load_imbalance(problem, placement).mean() for placement in (previous, result.placement))
    assert (moves(previous, result.placement) <= 16).all()
    assert after < min(1.05, before)
