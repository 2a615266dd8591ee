"""Bounds with replicas, against every layout of tiny layers: each serves a token by as few ranks as it can."""

import itertools

import numpy as np
import pytest

from moeplace.placement.bounds.dual import solve_dual
from moeplace.placement.bounds.problem import problem_bounds
from moeplace.placement.bounds.relaxation import connectivity_slope, kset_slope
from moeplace.placement.bounds.replicated import Copies, certify_copies, nearest_rows
from moeplace.placement.bounds.traffic import ksets_of, ranks_per_token
from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.placement.verification.closed_forms import Parts
from moeplace.placement.verification.replicated import most_together
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_problem, skewed_trace
from tests.placement.oracles import layer_rows
from tests.seeds import FIXED_AND_TODAY

SHAPES = [(5, [3, 3]), (5, [3, 3, 3]), (6, [4, 4]), (4, [2, 2, 2]), (5, [4, 2, 2]), (6, [3, 3, 1]), (6, [5, 2])]


def fewest_ranks(held: list[set[int]], kset: list[int]) -> int:
    """Least number of ranks that hold all experts of a k-set."""
    return next(
        number
        for number in range(1, len(held) + 1)
        if any(set(kset) <= set().union(*some) for some in itertools.combinations(held, number))
    )


def optimum(ids_TK: np.ndarray, experts: int, slots_R: list[int]) -> float:
    """Least mean number of ranks per token over all layouts."""
    trace = RoutingTrace(ids_TK[:, None, :], np.array([experts]))
    problem = Problem.from_trace(trace, Cluster.uniform(len(slots_R), slots_per_rank=slots_R))
    sets_UK, share_U = ksets_of(ids_TK)
    ends = np.cumsum(slots_R)
    best = np.inf
    for row in layer_rows(problem, 0, fill=True):
        held = [set(part.tolist()) - {-1} for part in np.split(row, ends[:-1])]
        best = min(best, sum(s * fewest_ranks(held, u[u >= 0].tolist()) for u, s in zip(sets_UK, share_U, strict=True)))
    return best


def layer(seed: int, experts: int) -> np.ndarray:
    """(T, K) tokens that all have an expert."""
    return skewed_trace(seed, layers=1, experts=experts, top_k=3, tokens=40).layer(0)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_bound_optimum_heuristic(seed: int, experts: int, slots: list[int]) -> None:
    """Closed forms and relaxations of both kinds <= best layout <= what is found."""
    ids_TK = layer(seed, experts)
    least = optimum(ids_TK, experts, slots)
    sets_UK, share_U = ksets_of(ids_TK)
    layout = Copies(experts, len(slots), max(slots), sum(slots), len(set(slots)) == 1)
    for make in (kset_slope, connectivity_slope):
        slope = make(sets_UK, share_U, experts, layout.capacity)
        for iterations in (1, 7, 60):
            assert solve_dual(layout, slope, iterations=iterations).bound <= least + 1e-9
    trace = RoutingTrace(ids_TK[:, None, :], np.array([experts]))
    problem = Problem.from_trace(trace, Cluster.uniform(len(slots), slots_per_rank=slots), objective="traffic")
    assert problem_bounds(problem, time_limit=0.3)["traffic"] <= least + 1e-9
    found = solve(problem, time_limit=0.3, seed=seed)
    assert least <= found.objective + 1e-9


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize(("experts", "slots"), SHAPES)
def test_any_multiplier_proves_a_bound(seed: int, experts: int, slots: list[int]) -> None:
    """Random K and v, of any size and sign, never say more than the best layout has."""
    rng = np.random.default_rng(seed)
    ids_TK = layer(seed, experts)
    least = optimum(ids_TK, experts, slots)
    layout = Copies(experts, len(slots), max(slots), sum(slots), len(set(slots)) == 1)
    slope = kset_slope(*ksets_of(ids_TK), experts, layout.capacity)
    for _ in range(200):
        constant, gain = slope(rng.random((experts, experts)))
        assert certify_copies(layout, constant, gain, *multipliers(rng, experts)) <= least + 1e-9


def multipliers(rng: np.random.Generator, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Random symmetric K and v, of any size and sign."""
    size = 10 ** rng.uniform(-3, 1)
    k = size * rng.standard_normal((experts, experts)) - size * rng.uniform(0, 3) * np.eye(experts)
    return (k + k.T) / 2, size * rng.uniform(-2, 2, experts)


@pytest.mark.parametrize("exact", [True, False])
def test_copies_close_most_of_the_gap_that_closed_forms_leave(exact: bool, dated_seed: int) -> None:
    """Blocks of experts that are always asked for together, and one that belongs to all: d = 1 with a copy of it each.

    With one slot fewer per rank than that takes, the bound says that no layout has d = 1.
    """
    rng = np.random.default_rng(dated_seed)
    ids_TK = np.stack([rng.permutation(np.append(3 * block + rng.permutation(3)[:2], 12)) for block in
                       rng.integers(0, 4, 500)])  # fmt: skip
    sets_UK, share_U = ksets_of(ids_TK)
    full, short = Copies(13, 4, 4, 16, exact), Copies(13, 4, 4, 14, False)
    bounds = [solve_dual(layout, kset_slope(sets_UK, share_U, 13, 4), iterations=300, step=8.0).bound
              for layout in (full, short)]  # fmt: skip
    assert 0.97 < bounds[0] <= 1 + 1e-9
    assert bounds[1] > 1.05
    assert ranks_per_token(ids_TK, 13, 4, 4, spare=3, exact=False, kappa=None) <= 1 + 1e-9


def test_more_slots_never_raise_the_bound_above_the_better_layout(dated_seed: int) -> None:
    """A layer with 64 experts: no replicas >= 72 slots >= 80 slots, each relaxed."""
    problem = skewed_problem(
        dated_seed, ranks=8, slots=8, trace={"experts": 64, "top_k": 6, "tokens": 800, "layers": 1}
    )
    bounds = []
    for slots in (8, 9, 10):
        cluster = Cluster.uniform(8, slots_per_rank=slots)
        bounds.append(problem_bounds(problem.replace(cluster=cluster), time_limit=30.0)["traffic"])
    assert bounds[0] > bounds[1] > bounds[2] > 1.0


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_rows_and_counts_are_as_they_must_be(seed: int) -> None:
    """After a few steps from where they were: counts from 1 to P that sum to S, rows of (C - 1) c, entries from 0."""
    rng = np.random.default_rng(seed)
    layout = Copies(24, 6, 5, 30, True)
    target = rng.random((24, 24))
    target = (target + target.T) / 2
    c, v, z = np.full(24, 30 / 24), np.zeros(24), np.zeros((24, 24))
    for _ in range(20):
        z, c, v = nearest_rows(layout, target, None, np.full((24, 24), 0.01), c, v)
    assert c.sum() == pytest.approx(30)
    assert c.min() >= 1 - 1e-12
    assert c.max() <= 6
    assert np.diag(z) == pytest.approx(c)
    assert z.min() >= 0
    assert z.sum(axis=1) == pytest.approx(5 * c, abs=0.05)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize(("experts", "slots"), [*SHAPES, (4, [6, 6]), (4, [4, 4]), (3, [5, 3]), (5, [9, 9, 9])])
def test_the_verifier_believes_no_multiplier(seed: int, experts: int, slots: list[int]) -> None:
    """Random ones, also where a part has room for all experts: never more than the best layout; and as much as ours."""
    rng = np.random.default_rng(seed)
    ids_TK = layer(seed, experts)
    least = optimum(ids_TK, experts, slots)
    parts = Parts(len(slots), max(slots), len(set(slots)) == 1, 1.0)
    layout = Copies(experts, len(slots), max(slots), sum(slots), parts.even)
    slope = kset_slope(*ksets_of(ids_TK), experts, layout.capacity)
    for _ in range(100):
        constant, gain = slope(rng.random((experts, experts)))
        k, v = multipliers(rng, experts)
        proven = constant - most_together(gain, k, v, parts, sum(slots) - experts)
        assert proven <= least + 1e-9
        if max(slots) < experts:
            assert proven == pytest.approx(certify_copies(layout, constant, gain, k, v))
