"""Every bound lies below every placement of tiny problems; closed forms against brute force; known values."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.placement.bounds.dual import solve_dual
from moeplace.placement.bounds.layers import layer_bounds
from moeplace.placement.bounds.load import busiest_without_replicas, slowest_with_replicas
from moeplace.placement.bounds.problem import held_imbalance, problem_bounds
from moeplace.placement.bounds.relaxation import Layout, connectivity_slope, linear_slope
from moeplace.placement.bounds.traffic import (
    ksets_of,
    psi,
    ranks_per_token,
    stay_by_load,
    stay_by_rows,
    stay_by_spectrum,
)
from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.modes import MODES
from moeplace.placement.problem import Problem
from moeplace.placement.solvers.exact.viterbi import enumerate_states, solve_viterbi
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_problem, skewed_trace
from tests.placement.oracles import all_placements, traffic_of

SLACK = 1e-9

CLUSTERS = (
    {"ranks": 2, "slots": 2},
    {"ranks": 2, "slots": [3, 1]},
    {"ranks": 4, "slots": 1, "ranks_per_node": 2},
    {"ranks": 2, "slots": 2, "speed": [1.0, 0.6]},
    {"ranks": 2, "slots": 2, "ranks_per_node": 1},
    {"ranks": 2, "slots": 3},
    {"ranks": 3, "slots": [2, 2, 1]},
)


@pytest.mark.parametrize("cluster", CLUSTERS)
@given(
    seed=st.integers(0, 999),
    mode=st.sampled_from(MODES),
    top_k=st.integers(1, 3),
    cap=st.sampled_from([None, 1.05, 1.3]),
    ragged=st.sampled_from([0.0, 0.25]),
)
@settings(max_examples=4, deadline=None)
def test_no_placement_beats_its_bounds(cluster, seed, mode, top_k, cap, ragged) -> None:  # type: ignore[no-untyped-def]
    """Traffic, imbalance and seconds of all placements (under the cap) are at least the bounds, in every mode."""
    problem = skewed_problem(
        seed,
        **cluster,
        mode=mode,
        max_imbalance=cap,
        trace={"top_k": top_k, "ragged": ragged, "tokens": 30},
        shape=StepShape(batch=8),
        calibration=Calibration(Link(1e-5, 1e9), Link(2e-5, 1e8, 1.5e8), ExpertTime(1e-6, 1e-6, 3e-6)),
    )
    bounds, caps_L = problem_bounds(problem, time_limit=0.1), held_imbalance(problem)
    checked = 0
    for placement in itertools.islice(all_placements(problem), 0, None, 1 + (problem.redundant_slots[0] > 0) * 40):
        evaluation = problem.evaluate(placement)
        if caps_L is not None and not placement.has_replicas and (evaluation.imbalance_L > caps_L + SLACK).any():
            continue
        checked += 1
        assert bounds["traffic"] <= traffic_of(problem, evaluation) + SLACK
        assert bounds["imbalance"] <= evaluation.imbalance_mean + SLACK
        assert bounds["seconds"] <= evaluation.predicted_seconds * (1 + 1e-9)
    assert checked


@given(seed=st.integers(0, 10_000), ranks=st.integers(2, 4), per_rank=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_busiest_rank_without_replicas(seed: int, ranks: int, per_rank: int) -> None:
    """The load bound is at most the optimum over all balanced partitions."""
    if ranks * per_rank > 9:
        per_rank = 2
    load_E = np.random.default_rng(seed).integers(0, 60, ranks * per_rank).astype(float)
    slots_R = np.full(ranks, per_rank)
    states_ME = enumerate_states(slots_R)
    load_MR = np.stack([(states_ME == rank) @ load_E for rank in range(ranks)], axis=1)
    assert busiest_without_replicas(load_E, slots_R, whole=True) <= load_MR.max(axis=1).min() + SLACK


def test_load_bounds_by_hand() -> None:
    """Largest + C-1 smallest; jR+1 heavy experts meet; one hot expert with two replicas spreads over two ranks."""
    assert busiest_without_replicas(np.array([10.0, 1, 2, 3]), np.array([2, 2])) == 11
    assert busiest_without_replicas(np.array([5.0, 5, 5, 0]), np.array([2, 2])) == 10
    assert slowest_with_replicas(np.array([10.0, 1, 1]), 4, np.ones(2)) == 6
    assert slowest_with_replicas(np.array([10.0, 1, 1, 1]), 5, np.ones(4)) == 5


@given(seed=st.integers(0, 10_000), skew=st.floats(0.0, 2.0))
@settings(max_examples=25, deadline=None)
def test_stay_bounds_and_relaxation_of_a_boundary(seed: int, skew: float) -> None:
    """All bounds on stayed tokens hold for every pair of balanced partitions; the relaxation is the closest."""
    rng = np.random.default_rng(seed)
    weight_EE = rng.poisson(np.exp(skew * rng.standard_normal((6, 6))) * 3).astype(float)
    states_ME = enumerate_states(np.array([2, 2, 2]))
    held_MX = (states_ME[:, :, None] == np.arange(3)).reshape(len(states_ME), -1).astype(float)
    stayed_MM = held_MX @ np.kron(weight_EE, np.eye(3)) @ held_MX.T
    optimum = stayed_MM.max()
    rows, spectrum = stay_by_rows(weight_EE, 2), stay_by_spectrum(weight_EE, 3, 2)
    total = max(weight_EE.sum(), 1.0)
    relaxed = -solve_dual(Layout(2, 6, 3, 2, True), linear_slope([weight_EE]), iterations=80, curved=False).bound
    any_sizes = -solve_dual(Layout(2, 6, 3, 2, False), linear_slope([weight_EE]), iterations=80, curved=False).bound
    assert optimum <= min(rows, spectrum, relaxed, any_sizes) + SLACK * total
    share_M = [held_MX.reshape(-1, 6, 3).transpose(0, 2, 1) @ weight_EE.sum(axis=axis) for axis in (1, 0)]
    for kappa in (1.05, 1.3, 2.0):
        fair = [(share.max(axis=1) <= kappa * weight_EE.sum() / 3 + SLACK) for share in share_M]
        if fair[0].any() and fair[1].any():
            assert stayed_MM[np.ix_(fair[0], fair[1])].max() <= stay_by_load(weight_EE, 3, kappa) + SLACK * total


@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 5), shape=st.sampled_from([(3, 2), (2, 3), (2, 4), (4, 2)]))
@settings(max_examples=25, deadline=None)
def test_connectivity_bounds_of_a_layer(seed: int, top_k: int, shape: tuple[int, int]) -> None:
    """Closed forms and relaxation lie below the least mean d over all balanced partitions, capped or not."""
    parts, capacity = shape
    experts = parts * capacity
    ids_TK = skewed_trace(seed, layers=1, experts=experts, top_k=top_k, tokens=60, ragged=0.1).layer(0)
    states_ME = enumerate_states(np.full(parts, capacity))
    sets_UK, share_U = ksets_of(ids_TK)
    on_MPE = states_ME[:, None, :] == np.arange(parts)[:, None]
    padded = np.pad(on_MPE, ((0, 0), (0, 0), (0, 1)))
    d_M = padded[:, :, sets_UK].any(axis=3).sum(axis=1) @ share_U
    load_E = np.bincount(ids_TK[ids_TK >= 0], minlength=experts).astype(float)
    imbalance_M = (on_MPE @ load_E).max(axis=1) / (load_E.sum() / parts)
    slope = connectivity_slope(sets_UK, share_U, experts, capacity)
    relaxed = solve_dual(Layout(1, experts, parts, capacity, True), slope, iterations=60).bound
    assert relaxed <= d_M.min() + SLACK
    for kappa in (None, 1.05, 1.4):
        allowed = d_M if kappa is None else d_M[imbalance_M <= kappa]
        if len(allowed):
            bound = ranks_per_token(ids_TK, experts, parts, capacity, exact=True, kappa=kappa)
            assert bound <= allowed.min() + SLACK


def test_relaxation_is_tight_on_a_planted_partition() -> None:
    """Tokens that never leave a block of C experts: d = 1, and the bound reaches it; uniform routing too."""
    rng = np.random.default_rng(0)
    block_T = rng.integers(0, 4, 400)
    inside_TK = np.argsort(rng.random((400, 4)), axis=1)[:, :2]
    ids_TK = block_T[:, None] * 4 + inside_TK
    problem = Problem.from_trace(
        RoutingTrace(ids_TK[:, None, :], np.array([16])), Cluster.uniform(4, slots_per_rank=4), objective="traffic"
    )
    assert problem_bounds(problem, time_limit=2)["traffic"] == pytest.approx(1.0, abs=1e-6)
    uniform = skewed_trace(1, tokens=3000, layers=1, experts=16, top_k=4)
    shuffled = np.argsort(rng.random((3000, 16)), axis=1)[:, None, :4]
    problem = problem.replace(trace=uniform.replace(topk_ids=shuffled), load_LE=np.ones((1, 16)))
    random_d = 4 * (1 - np.prod([(12 - i) / (16 - i) for i in range(4)]))  # any placement of uniform routing
    assert 0.8 * random_d < problem_bounds(problem, time_limit=2)["traffic"] < random_d * 1.02


def test_psi_is_the_hull_of_even_splits() -> None:
    """K = 6: one part has 36, two have 18, three 12, six 6; between them a straight line; C = 3 forbids one part."""
    assert psi(36, 6, 8, 8) == 1
    assert psi(18, 6, 8, 8) == 2
    assert psi(15, 6, 8, 8) == 2.5
    assert psi(6, 6, 8, 8) == 6
    assert psi(36, 6, 8, 3) == 2


def test_more_time_and_a_cap_never_weaken_a_bound() -> None:
    """Closed forms <= relaxation; no cap <= cap; fewer slots <= more forbidden."""
    trace = {"experts": 16, "top_k": 3, "tokens": 400}
    free = skewed_problem(3, ranks=4, slots=4, trace=trace)
    capped = free.replace(max_imbalance=1.05)
    quick, slow = (problem_bounds(free, time_limit=limit)["traffic"] for limit in (0.0, 3.0))
    assert quick <= slow
    assert slow <= problem_bounds(capped, time_limit=3.0)["traffic"] + 1e-6
    spare = skewed_problem(3, ranks=4, slots=5, trace=trace)
    assert problem_bounds(spare, time_limit=3.0)["traffic"] <= slow


def test_bounds_do_not_depend_on_labels() -> None:
    """Renaming experts leaves the bounds where they are."""
    problem = skewed_problem(5, ranks=4, slots=2, trace={"experts": 8, "top_k": 3, "tokens": 200})
    names = np.random.default_rng(1).permutation(8)
    assert problem.trace is not None
    renamed = Problem.from_trace(
        problem.trace.replace(topk_ids=names[problem.trace.topk_ids]), problem.cluster, objective="traffic"
    )
    ours, theirs = (problem_bounds(p, time_limit=30.0) for p in (problem, renamed))  # all iterations, busy or not
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_loads_alone_have_an_imbalance_bound_only() -> None:
    """Without tokens there is no traffic to bound."""
    problem = Problem.from_load(np.array([[9.0, 1, 1, 1]]), Cluster.uniform(2, slots_per_rank=2))
    assert problem_bounds(problem, time_limit=1.0) == {"imbalance": pytest.approx(10 / 6)}


def test_layer_bounds_are_trivial_where_the_mode_does_not_pay() -> None:
    """`allgather` bounds no traffic; one rank has d = 1."""
    problem = skewed_problem(2, mode="allgather")
    assert problem.trace is not None
    assert (layer_bounds(problem, problem.trace, time_limit=1.0, caps_L=None).d_L == 1).all()
    assert problem_bounds(skewed_problem(2, ranks=1, slots=4), time_limit=1.0)["traffic"] == 1.0


@given(seed=st.integers(0, 999), cap=st.sampled_from([None, 1.1]))
@settings(max_examples=4, deadline=None)
def test_windows_of_layers_bound_the_chain(seed: int, cap: float | None) -> None:
    """Several boundaries relaxed together: still below the proven optimum of the chain, and not below the pairs."""
    problem = skewed_problem(
        seed, mode="coherent", max_imbalance=cap, trace={"layers": 5, "experts": 6, "top_k": 1}, ranks=3
    )
    assert problem.trace is not None
    optimum = solve_viterbi(problem, Budget(10.0)).lower_bound
    assert optimum is not None
    assert problem_bounds(problem, time_limit=5.0)["traffic"] <= optimum + SLACK


def test_the_time_limit_is_kept() -> None:
    """58 layers of 64 experts on four nodes in one second: closed forms everywhere, relaxation while it lasts."""
    trace = {"layers": 58, "experts": 64, "top_k": 4, "tokens": 500}
    problem = skewed_problem(0, ranks=8, slots=8, ranks_per_node=2, trace=trace)
    started = time.monotonic()
    assert problem_bounds(problem, time_limit=1.0)["traffic"] > 1
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("capacity", [2, 3, 8])
def test_slopes_touch_the_interpolated_inverse(capacity: int) -> None:
    """sum over a token's experts of 1/n, interpolated between whole n: value where it was asked, below it elsewhere."""
    rng = np.random.default_rng(capacity)
    sets_UK = np.array([[0, 1, 2], [3, 0, -1], [4, -1, -1], [2, 4, 1]])
    share_U = np.array([0.4, 0.3, 0.1, 0.2])
    slope = connectivity_slope(sets_UK, share_U, 5, capacity)
    most = max(min(3, capacity), 2)

    def value(z: np.ndarray) -> float:
        total = 0.0
        for members, share in zip(sets_UK, share_U, strict=True):
            held = [e for e in members if e >= 0]
            for e in held:
                together = 1.0 + sum(z[e, f] for f in held if f != e)
                pieces = [(1 - (together - n) / (n + 1)) / n for n in range(1, most)]
                total += share * max(pieces)
        return total

    def symmetric() -> np.ndarray:
        z = rng.random((5, 5))
        return (z + z.T) / 2

    for _ in range(5):
        z, other = symmetric(), symmetric()
        constant, gain = slope(z)
        assert constant - (gain * z).sum() == pytest.approx(value(z))
        assert constant - (gain * other).sum() <= value(other) + 1e-12
