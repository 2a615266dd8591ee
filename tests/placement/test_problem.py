"""Problem: validated once; at the limit it passes, one beyond it says why not."""

from typing import Any

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.placement import index_order
from moeplace.placement.problem import Problem
from moeplace.profiling.errors import InfeasibleError, InputError
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_trace

LOADS = np.ones((2, 4))
FLAT = Cluster.uniform(2, slots_per_rank=2)


@pytest.mark.parametrize(("fields", "message"), [
    ({"mode": "best"}, "mode 'best' must be one of"),
    ({"objective": "best"}, "objective 'best'"),
    ({"replica_budget": "best"}, "replica budget 'best'"),
    ({"max_imbalance": 0.999}, "at least 1"),
    ({"max_imbalance": float("nan")}, "at least 1"),
    ({"max_moves": 0}, "needs the previous placement"),
    ({"max_moves": -1}, "must not be negative"),
    ({"move_price": -1e-9}, "move price"),
    ({"survive": -1}, "survive"),
    ({"experts_per_layer": np.array([4, 3, 3])}, "loads of shape"),
    ({"experts_per_layer": np.array([3, 3])}, "loads of shape"),
])  # fmt: skip
def test_what_is_no_problem(fields: dict[str, Any], message: str) -> None:
    """Every rule by its sentence."""
    Problem.from_load(LOADS, FLAT, max_imbalance=1.0, survive=0, move_price=0.0)
    with pytest.raises(InputError, match=message):
        Problem.from_load(LOADS, FLAT, **fields)


def test_loads_must_be_counts() -> None:
    """Neither negative nor infinite."""
    for wrong in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="finite and not negative"):
            Problem.from_load(np.full((1, 4), wrong), FLAT)


@pytest.mark.parametrize(("slots", "survive", "message"), [
    ([2, 2], 0, ""),
    ([4, 4], 1, ""),
    ([2, 1], 0, "MoE layer 1 needs 4 slots for 4 experts, but 2 ranks have 3 slots: 1 are missing"),
    ([4, 3], 1, "needs 8 slots for 4 experts on 2 ranks each, but 2 ranks have 7 slots: 1 are missing"),
    ([5, 3], 1, "no rank can hold an expert twice, so only 7 of 8 can be used: 1 are missing"),
    ([9, 9], 2, "surviving 2 lost ranks needs 3 ranks, there are 2"),
])  # fmt: skip
def test_slots_must_hold_the_experts(slots: list[int], survive: int, message: str) -> None:
    """The largest layer decides, here the second; with survivors every expert counts so many times."""
    loads = np.array([[1.0, 1, 1, 0], [1, 1, 1, 1]])
    options: dict[str, Any] = {"experts_per_layer": np.array([3, 4]), "survive": survive}
    cluster = Cluster.uniform(2, slots_per_rank=slots)
    if not message:
        assert Problem.from_load(loads, cluster, **options).num_experts == 4
        return
    with pytest.raises(InfeasibleError, match=message):
        Problem.from_load(loads, cluster, **options)


def test_every_rank_needs_a_slot() -> None:
    """A rank that joins is no place for a problem."""
    with pytest.raises(InputError, match="every rank must have slots"):
        Problem.from_load(LOADS, Cluster.uniform(3, slots_per_rank=[2, 2, 0]))


@pytest.mark.parametrize(("slots", "survive", "spare", "growth"), [
    ([4, 4, 4], 0, 2, 2), ([3, 3, 3], 0, 1, 2), ([2, 2, 2], 0, 0, 0), ([5, 3, 4], 0, 2, 1), ([5, 5, 5], 1, 1, 1),
    ([2, 5, 5], 0, 1, 1), ([6, 6, 6], 0, 4, 0),
])  # fmt: skip
def test_slots_that_a_layer_can_spare_and_gain(slots: list[int], survive: int, spare: int, growth: int) -> None:
    """Six experts on three ranks: what is beyond one slot each (survivors counted), but no rank left empty; a layer may
    have twice that more, and no rank more than there are experts."""
    problem = Problem.from_load(
        np.ones((1, 6)), Cluster.uniform(3, slots_per_rank=slots), survive=survive, replica_budget="global"
    )
    assert problem.spare_per_rank == spare
    assert (problem.layout.slots_of_rank - problem.cluster.slots_of_rank).tolist() == [growth] * 3
    assert problem.redundant_slots.tolist() == [sum(slots) - 6]
    assert problem.replace(replica_budget="per-layer").layout is problem.cluster


def test_tokens_become_counts() -> None:
    """Loads and transitions are those of the trace; a placement of the problem carries its layers."""
    trace = RoutingTrace(np.array([[[0, 1], [2, -1]], [[1, 0], [2, 3]]]), np.full(2, 4), layer_ids=np.array([1, 5]))
    problem = Problem.from_trace(trace, FLAT, mode="coherent")
    assert problem.load_LE.tolist() == [[2, 2, 0, 0], [0, 0, 2, 1]]
    assert problem.transitions_LEE[0].nonzero()[0].tolist() == [0, 1]
    assert problem.transitions_LEE[0].sum() == 2
    placement = problem.placement(np.array([[0, 1, 2, 3]] * 2))
    assert placement.layer_ids is not None
    assert (placement.layer_ids.tolist(), placement.num_hidden_layers, placement.mode) == ([1, 5], 6, "coherent")
    with pytest.raises(InputError, match="no tokens to fit"):
        Problem.from_trace(trace.select(slice(0, 0)), FLAT)
    with pytest.raises(InputError, match="loads alone has no tokens"):
        Problem.from_load(LOADS, FLAT).evaluate(placement)


def test_the_previous_placement_must_be_of_the_model() -> None:
    """Same experts per layer; any number of ranks."""
    trace = skewed_trace(1, experts=4)
    same = index_order(np.full(2, 4), np.full(4, 1), np.zeros(4, int))
    assert Problem.from_trace(trace, FLAT, previous=same, max_moves=0).previous is same
    other = index_order(np.full(2, 3), np.full(2, 2), np.zeros(2, int))
    with pytest.raises(InputError, match="another model"):
        Problem.from_trace(trace, FLAT, previous=other)
