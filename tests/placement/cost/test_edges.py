"""Edges of the evaluation: nothing to count, null experts, arrays that may not be written, hashes as sequence ids."""

import tracemalloc

import numpy as np
import pytest

from moeplace.placement.bounds.problem import problem_bounds
from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.modes import MODES, Mode
from moeplace.placement.placement import index_order, with_slots
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.profiling.scores.summary import summarize
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_trace


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_without_any_expert(mode: Mode, top_k: int) -> None:
    """All ids -1: no copies, no load, balance 1; bounds and solvers cope."""
    trace = RoutingTrace(np.full((20, 2, top_k), -1), np.full(2, 4))
    problem = Problem.from_trace(trace, Cluster.uniform(2, slots_per_rank=2), mode=mode, objective="traffic")
    result = solve(problem, time_limit=0.2)
    figures = problem.evaluate(result.placement)
    assert (figures.ranks_per_token, figures.imbalance_worst, figures.step_imbalance_mean) == (0.0, 1.0, 1.0)
    assert figures.stay_rate == 0.0
    assert problem_bounds(problem, time_limit=0.1)["traffic"] == 0.0
    assert result.objective in (0.0, 1.0)  # imbalance where traffic depends on nothing


@pytest.mark.clock(0.1)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_global_budget_with_few_layers(layers: int) -> None:
    """Even one layer may ask for the budget of all: there is nobody to take slots from."""
    trace = skewed_trace(2, tokens=120, layers=layers, experts=6, top_k=2)
    problem = Problem.from_trace(
        trace, Cluster.uniform(3, slots_per_rank=3), objective="traffic", replica_budget="global"
    )
    plain = problem.replace(replica_budget="per-layer")
    ours, theirs = solve(problem, time_limit=0.6), solve(plain, time_limit=0.6)
    assert ours.placement.num_layers == layers
    assert ours.objective <= theirs.objective * 1.2


@pytest.mark.parametrize("layers", [1, 2])
def test_null_experts_of_a_trace_that_may_not_be_written(layers: int) -> None:
    """One layer of contiguous ids is a view of the trace: what is read must not be written to."""
    ids = np.arange(16, dtype=np.int16).reshape(8, 1, 2).repeat(layers, axis=1) % 6
    ids.flags.writeable = False
    trace = RoutingTrace(ids, np.full(layers, 4), null_experts=2)
    assert trace.layer(0).max() == 3
    assert trace.topk_ids.max() == 5
    placement = index_order(np.full(layers, 4), np.full(2, 2), np.zeros(2, int))
    assert evaluate(trace, placement).ranks_per_token < 1  # tokens with null experts alone are served nowhere


def test_a_cluster_does_not_freeze_what_it_is_given() -> None:
    """The caller's arrays stay the caller's; changing them changes no cluster."""
    node, slots, speed, distance = np.zeros(2, np.int64), np.full(2, 3), np.ones(2), np.array([[0.0, 1], [1, 0]])
    cluster = Cluster(node, slots, speed, distance_RR=distance)
    for array in (node, slots, speed, distance):
        array[...] = 9
    assert cluster.slots_of_rank.tolist() == [3, 3]
    assert cluster.distance_RR is not None
    assert cluster.distance_RR[0, 1] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        cluster.slots_of_rank[0] = 1


def test_sequence_ids_that_are_hashes() -> None:
    """Ids near 2^31 (and beyond) cost what few small ones cost."""
    trace = skewed_trace(1, tokens=64, layers=2, experts=4)
    small = trace.replace(sequence_ids=np.arange(64) // 8)
    hashed = trace.replace(sequence_ids=(np.arange(64) // 8) * 268_435_399 + 2**31 - 8)
    summarize(small, seed=0, locality=False)  # kernels and threads
    peaks = []
    for each in (small, hashed):
        tracemalloc.start()
        document = summarize(each, seed=0, locality=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0] + 1_000_000
    assert document["stability"]["random_halves"]["load_tv"] is not None


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    """A batch of one makes every token a step: no (layers, tokens, ranks) table is kept."""
    trace = skewed_trace(1, tokens=20_000, layers=2, experts=16, top_k=1)
    placement = index_order(np.full(2, 16), np.full(16, 1), np.zeros(16, int))
    peaks = []
    for batch in (1, 1000):
        evaluate(trace, placement, shape=StepShape(batch=batch))
        tracemalloc.start()
        evaluate(trace, placement, shape=StepShape(batch=batch))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < 1.2 * peaks[1] + 100_000


def test_links_of_the_cluster_are_the_problems_own() -> None:
    """Without a calibration a problem is judged with its cluster's links, not with nominal ones."""
    trace = skewed_trace(1, tokens=50)
    slow = Cluster.uniform(2, slots_per_rank=2)
    slow = slow.replace(intra=slow.intra.__class__(1.0, 1e3))
    problem = Problem.from_trace(trace, slow)
    placement = index_order(np.full(2, 4), np.full(2, 2), np.zeros(2, int))
    assert problem.evaluate(placement).predicted_seconds > 4.0
    assert problem.evaluate(placement).predicted_seconds == evaluate(trace, placement, cluster=slow).predicted_seconds


def test_more_slots_hold_the_same_experts() -> None:
    """`with_slots` widens and narrows; an expert is never cut off."""
    placement = index_order(np.full(1, 4), np.full(2, 2), np.zeros(2, int))
    wide = with_slots(placement, np.array([3, 2]))
    assert wide.slot_to_expert.tolist() == [[0, 1, -1, 2, 3]]
    assert with_slots(wide, np.full(2, 2)).equals(placement)
