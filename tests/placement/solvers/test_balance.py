"""Loads alone: time is used until the bound is met, and nobody ends worse than where it began."""

import numpy as np
import pytest

from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.placement.search.annealing import seed_state
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.solve import solve
from moeplace.placement.solvers import balance
from moeplace.placement.solvers.replicas.even_split import anneal_even
from moeplace.placement.solvers.replicas.exact_search import Schedule
from moeplace.placement.solvers.replicas.seats import seat
from tests.seeds import TODAY


def imbalance(row: np.ndarray, load_E: np.ndarray, speed_R: np.ndarray) -> float:
    """Busiest over mean, counted from the slots."""
    per_rank = row.reshape(len(speed_R), -1)
    times = [
        sum(load_E[e] / (row == e).sum() for e in held if e >= 0) / speed
        for held, speed in zip(per_rank, speed_R, strict=True)
    ]
    return max(times) * speed_R.sum() / load_E.sum()


def two_heavy(seed: int) -> np.ndarray:
    """(1, 8) loads, two of which are 80 % of all."""
    print("seed", seed)
    share = np.random.default_rng(seed).uniform(0.2, 1.0, 8)
    share[:2] *= 0.8 / share[:2].sum()
    share[2:] *= 0.2 / share[2:].sum()
    return np.rint(share * 10_000)[None]


@pytest.mark.parametrize("seed", [0, 1, TODAY])
def test_few_heavy_experts_are_shared_out(seed):
    """8 ranks x 2 slots: as good as the exact program, and better than packing where that is far from the bound."""
    problem = Problem.from_load(two_heavy(seed), Cluster.uniform(8, slots_per_rank=2))
    auto, exact, packed = (solve(problem, solver=name, time_limit=2.0) for name in ("auto", "cp-sat", "lpt"))
    assert auto.objective <= exact.objective + 0.005
    assert auto.objective <= packed.objective + 1e-9
    assert exact.objective <= packed.objective + 1e-9
    if packed.objective > 1.15:
        assert auto.objective < packed.objective - 0.02


@pytest.mark.parametrize("seed", [0, TODAY])
@pytest.mark.parametrize(("experts", "ranks", "slots"), [(64, 32, 3), (20, 4, 6), (12, 6, 2)])
def test_no_solver_ends_worse_than_packing(seed, experts, ranks, slots):
    print("seed", seed)
    load_LE = np.random.default_rng(seed).zipf(1.4, (2, experts)).clip(0, 5000).astype(float)
    problem = Problem.from_load(load_LE, Cluster.uniform(ranks, slots_per_rank=slots))
    packed = solve(problem, solver="lpt", time_limit=0.5)
    for name in ("auto", "cp-sat"):
        found = solve(problem, solver=name, time_limit=0.5)
        assert found.objective <= packed.objective + 1e-9
        assert found.lower_bound <= found.objective + 1e-9


def test_the_bound_ends_the_search():
    """Equal loads meet it at once; the status says so."""
    result = solve(Problem.from_load(np.full((2, 16), 5.0), Cluster.uniform(4, slots_per_rank=4)), time_limit=30.0)
    assert result.status == "optimal"
    assert result.seconds < 20.0


@pytest.mark.parametrize("seed", [0, 1, 2, TODAY])
def test_the_kernel_says_what_the_slots_say(seed):
    """Unequal speeds: the value returned is the layout's, never above the start's; every expert keeps its replicas."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    cluster = Cluster.uniform(4, slots_per_rank=5).replace(speed_of_rank=np.array([1.0, 1.2, 0.8, 1.0]))
    problem = Problem.from_load(rng.integers(1, 100, (1, 12)).astype(float), cluster)
    row_S = pack_slots(problem, 0).astype(np.int32)
    before = imbalance(row_S, problem.load_LE[0], cluster.speed_of_rank)
    load_E = np.concatenate([problem.load_LE[0], np.zeros(8)])
    value = anneal_even(
        load_E, seat(row_S, cluster.first_slots, 20, 12), 1.0 / cluster.speed_of_rank, 1.0,
        Schedule(0.05, 1e-3, 20_000.0), np.zeros(1, np.uint8), seed_state(rng),
    )  # fmt: skip
    assert value == pytest.approx(imbalance(row_S, problem.load_LE[0], cluster.speed_of_rank))
    assert value <= before + 1e-9
    assert set(range(12)) <= set(row_S.tolist())
    assert all(len(set(held)) == len(held) for held in row_S.reshape(4, 5).tolist())


def test_planned_work_grows_with_time_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the cores or twice the time: twice the moves, shared by the layers that are left."""
    problem = Problem.from_load(two_heavy(0), Cluster.uniform(8, slots_per_rank=2))
    work: list[float] = []
    monkeypatch.setattr(balance, "_run", lambda *job: work.append(job[-1]) or (np.inf, job[4]))
    for cores, limit in ((1, 1.0), (2, 1.0), (1, 2.0)):
        monkeypatch.setattr(balance, "workers", lambda cores=cores: cores)
        balance.solve_balance(problem, Budget(limit))
    once, twice_cores, twice_time = np.split(np.array(work), 3)
    assert len(once) == balance.ROUNDS
    assert twice_cores == pytest.approx(2 * once)
    assert twice_time == pytest.approx(2 * once)
