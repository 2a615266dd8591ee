"""What `solve` says of what its solver made: caps and survival that are not kept, bounds that cannot be, layouts."""

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.solve import BoundError, _check_bounds, broken_cap, broken_survival, with_layout, within_caps
from moeplace.placement.solvers.replicas.budget import narrow, slot_steps, widen, with_steps
from tests.placement.instances import skewed_trace
from tests.placement.random_placements import random_placement
from tests.seeds import FIXED_AND_TODAY


def test_a_cap_is_broken_beyond_rounding_only() -> None:
    """The worst layer is named; a millionth more is rounding."""
    caps_L = np.array([1.5, 1.1, 1.25])
    assert broken_cap(np.array([9.0, 9.0, 9.0]), None) == ""
    assert broken_cap(caps_L + 1e-6, caps_L) == ""
    said = broken_cap(caps_L + np.array([2e-6, 0.3, 0.2]), caps_L)
    assert "MoE layer 1 has 1.4000, allowed are 1.1000" in said
    assert "MoE layer 0" in broken_cap(caps_L + np.array([2e-6, 0, 0]), caps_L)


def test_survival_is_counted_in_ranks_then_in_nodes() -> None:
    """Two further replicas want three ranks, and three nodes while there are as many; two nodes are enough of two."""
    trace = skewed_trace(0, tokens=20, layers=1, experts=2, top_k=1)

    def said(row: list[int], nodes: list[int], survive: int) -> str:
        cluster = Cluster(np.array(nodes), np.full(4, 2), np.ones(4))
        problem = Problem.from_trace(trace, cluster, survive=survive)
        return broken_survival(problem, Placement(np.array([row]), np.full(4, 2), np.array(nodes), np.full(1, 2)))

    on_three, on_two = [0, 1, 0, 1, 0, 1, -1, -1], [0, 1, 0, 1, 0, -1, -1, -1]
    assert said(on_three, [0, 0, 0, 0], 2) == ""
    assert "expert 1 of MoE layer 0 is on 2 of 3 ranks" in said(on_two, [0, 0, 0, 0], 2)
    assert said(on_two, [0, 0, 0, 0], 0) == ""
    assert said(on_two, [0, 1, 1, 1], 1) == ""
    assert "expert 0 of MoE layer 0 is on 1 of 2 nodes" in said(on_two, [0, 0, 0, 1], 1)
    assert said(on_three, [0, 0, 1, 1], 2) == ""
    assert "expert 0 of MoE layer 0 is on 2 of 3 nodes" in said(on_three, [0, 0, 1, 2], 2)


@pytest.mark.parametrize(
    ("objective", "lower", "bound", "fine"),
    [(2.0, 2.0, 1.0, True), (2.0, 2.0 + 1e-4, 1.0, False), (2.0, 1.0, 1.0 + 1e-4, False), (0.0, 0.0, 0.0, True)],
)
def test_a_bound_above_its_value_is_an_error(objective: float, lower: float, bound: float, fine: bool) -> None:
    """The objective against the solver's bound, every other value against its own."""
    values = {"imbalance": 1.0 if objective else 0.0, "seconds": 3.0}
    if fine:
        _check_bounds("traffic", objective, lower, values, {"imbalance": bound})
        return
    with pytest.raises(BoundError, match="internal error: the proven bound on"):
        _check_bounds("traffic", objective, lower, values, {"imbalance": bound})


def shared(slots: int = 3) -> Problem:
    trace = skewed_trace(0, tokens=50, layers=3, experts=8)
    return Problem.from_trace(
        trace, Cluster.uniform(4, slots_per_rank=slots), objective="traffic", replica_budget="global"
    )


def test_steps_of_slots_per_layer() -> None:
    """8 experts on 4 x 3 slots: a layer can give one slot a rank; one of three can get what two others give."""
    problem = shared()
    steps = slot_steps(problem)
    assert (steps[0], steps[-1]) == (-1, 2)
    assert problem.layout.slots_of_rank.tolist() == [5] * 4
    wider = with_steps(problem, 2)
    assert wider.cluster.slots_of_rank.tolist() == [5] * 4
    assert (wider.replica_budget, wider.previous, wider.max_moves) == ("per-layer", None, None)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_rows_are_widened_and_narrowed(seed: int) -> None:
    """Ranks keep what they hold, in their first slots; a narrow row has the fewest slots that hold it on every rank."""
    print("seed", seed)
    problem, rng = shared(), np.random.default_rng(seed)
    for step in slot_steps(problem):
        slots = 3 + step
        row_S = random_placement(rng, layers=1, experts=8, slots_of_rank=[slots] * 4).slot_to_expert[0]
        wide_S = widen(problem, row_S, step)
        assert wide_S.reshape(4, 5)[:, :slots].tolist() == row_S.reshape(4, slots).tolist()
        assert (wide_S.reshape(4, 5)[:, slots:] == -1).all()
        fewest, narrow_S = narrow(problem, wide_S)
        assert fewest == (row_S >= 0).reshape(4, slots).sum(axis=1).max() - 3
        held = [[e for e in part if e >= 0] for part in row_S.reshape(4, slots).tolist()]
        assert [[e for e in part if e >= 0] for part in narrow_S.reshape(4, 3 + fewest).tolist()] == held


def test_layouts_are_those_of_the_draft() -> None:
    """A draft as wide as the layout is judged on it; another one on the cluster, with a note."""
    problem = shared()
    wide, narrow_LS = (np.zeros((3, slots), np.int32) for slots in (20, 12))
    judged, draft = with_layout(problem, Draft(wide, "feasible"))
    assert (judged.cluster.num_slots, judged.replica_budget, draft.notes) == (20, "per-layer", ())
    judged, draft = with_layout(problem, Draft(narrow_LS, "feasible", notes=("before",)))
    assert (judged.cluster.num_slots, judged.replica_budget) == (12, "per-layer")
    assert draft.notes[0] == "before"
    assert "per layer" in draft.notes[1]


def test_caps_are_mended_where_moves_are_free() -> None:
    """A cap that replicas break by the runtime's rule is mended; not where moves are counted or priced."""
    trace = skewed_trace(2, tokens=300, layers=1, experts=8, top_k=2)
    problem = Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=3), objective="traffic")
    rng, stop = np.random.default_rng(0), np.zeros(1, np.uint8)
    rows = (random_placement(rng, layers=1, experts=8, slots_of_rank=[3] * 4).slot_to_expert for _ in range(50))
    start_LS = max(rows, key=lambda row: problem.evaluate(problem.placement(row)).imbalance_worst).astype(np.int32)
    caps_L, draft = np.full(1, 1.15), Draft(start_LS, "feasible")
    mended = within_caps(problem, draft, caps_L, rng, stop)
    assert problem.evaluate(problem.placement(start_LS)).imbalance_worst > 1.3
    assert problem.evaluate(problem.placement(mended.slot_to_expert)).imbalance_worst <= 1.15 + 1e-6
    old = problem.placement(start_LS)
    for terms in ({"max_moves": 3}, {"move_price": 1e-9}):
        counted = problem.replace(previous=old, **terms)
        assert within_caps(counted, draft, caps_L, rng, stop) is draft
    loads = Problem.from_load(problem.load_LE, problem.cluster)
    assert within_caps(loads, draft, caps_L, rng, stop) is draft
