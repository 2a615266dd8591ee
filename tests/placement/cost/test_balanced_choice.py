"""The rule `balanced`: what its text says, as few ranks as the default rule, and loads that are level."""

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.replica_rule import BALANCED, MOEPLACE
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from tests.placement.cost.balanced_reference import serve_trace
from tests.placement.instances import skewed_trace
from tests.placement.random_placements import random_placement
from tests.seeds import FIXED_AND_TODAY


def holders_of(placement: Placement, layer: int) -> dict[int, list[int]]:
    """{expert: ranks}."""
    return {e: np.flatnonzero(row).tolist() for e, row in enumerate(placement.copies_LER[layer])}


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_serves_as_the_text_says(seed: int) -> None:
    """Every rank of every token, for whole and broken steps, known and unknown places, absent experts, nodes."""
    rng = np.random.default_rng(seed)
    for _ in range(6):
        ranks, experts, top_k = int(rng.integers(1, 7)), int(rng.integers(4, 13)), int(rng.integers(1, 5))
        nodes = np.sort(rng.integers(0, 2, ranks)) if rng.random() < 0.5 else np.zeros(ranks, int)
        slots = [-(-experts // ranks) + int(rng.integers(0, 3))] * ranks
        placement = random_placement(
            rng, layers=2, experts=experts, slots_of_rank=slots, node_of_rank=(nodes - nodes[0]).tolist()
        )
        tokens, batch = int(rng.integers(1, 150)), int(rng.integers(1, 60))
        ids_TK = np.argsort(rng.random((tokens, experts)), axis=1)[:, : min(top_k, experts)].astype(np.int16)
        ids_TK[rng.random(ids_TK.shape) < 0.1] = -1
        near_T = rng.integers(-1, ranks, tokens).astype(np.int32)
        choose, rank_TK = BALANCED.on(placement, batch), np.empty(ids_TK.shape, np.int32)
        for layer in range(2):
            choose(layer, ids_TK, near_T, rank_TK)
            expected = serve_trace(ids_TK, near_T, holders_of(placement, layer), placement.node_of_rank.tolist(), batch)
            assert rank_TK.tolist() == expected


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_needs_no_more_ranks_and_levels(seed: int) -> None:
    """Ranks per token as by the default rule, to a hair, and the same nodes; loads no further apart."""
    trace = skewed_trace(seed, tokens=3000, layers=3, experts=16, top_k=4)
    problem = Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=6, ranks_per_node=2), objective="traffic")
    rng = np.random.default_rng(seed)
    placement = random_placement(rng, layers=3, experts=16, slots_of_rank=[6] * 4, node_of_rank=[0, 0, 1, 1])
    default = problem.replace(replica_rule=MOEPLACE).evaluate(placement)
    balanced = problem.replace(replica_rule=BALANCED).evaluate(placement)
    assert balanced.ranks_per_token == pytest.approx(default.ranks_per_token, rel=2e-3)
    assert balanced.nodes_per_token == pytest.approx(default.nodes_per_token, rel=2e-3)
    assert balanced.imbalance_mean < default.imbalance_mean


@pytest.mark.parametrize("batch", [1, 8, 64, 1000])
def test_levels_whatever_the_batch(batch: int) -> None:
    """Two ranks share an expert, one of them has another of a third of the tokens: both end up with half of the load.

    A token of its own cannot be split: the load so far must do it.
    """
    placement = Placement(np.array([[0, 1, 0, 2]]), np.full(2, 2), np.zeros(2, int), np.full(1, 3))
    ids_TK = np.where(np.arange(3000) % 3 == 0, 1, 0).astype(np.int16)[:, None]  # expert 1: rank 0 only
    near_T, rank_TK = np.full(3000, -1, np.int32), np.empty((3000, 1), np.int32)
    BALANCED.on(placement, batch)(0, ids_TK, near_T, rank_TK)
    load_R = np.bincount(rank_TK[:, 0], minlength=2)
    assert abs(load_R[0] - load_R[1]) < 150  # without memory, steps of one token end 1000 apart


def test_forgets() -> None:
    """What was sent long ago counts less: after a burst on one rank, ties are even again."""
    placement = Placement(np.array([[0, 1, 0, 2]]), np.full(2, 2), np.zeros(2, int), np.full(1, 3))
    burst, after = 20_000, 40_000
    ids_TK = np.concatenate([np.ones(burst), np.zeros(after)]).astype(np.int16)[:, None]
    rank_TK = np.empty((burst + after, 1), np.int32)
    BALANCED.on(placement, 1)(0, ids_TK, np.full(burst + after, -1, np.int32), rank_TK)
    last = rank_TK[-4000:, 0]
    assert 0.4 < last.mean() < 0.6


def test_batches_are_those_of_the_steps() -> None:
    """Another number of tokens a step cuts other batches; the figures say which were taken."""
    trace = skewed_trace(11, tokens=1500, layers=2, experts=16, top_k=4)
    placement = random_placement(np.random.default_rng(1), layers=2, experts=16, slots_of_rank=[6] * 4)
    small, large = (evaluate(trace, placement, rule=BALANCED, shape=StepShape(batch=size)) for size in (16, 512))
    assert (small.load_LR != large.load_LR).any()
    assert small.ranks_per_token == pytest.approx(large.ranks_per_token, rel=5e-3)
