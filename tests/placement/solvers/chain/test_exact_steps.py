"""Exact steps on chains: one layer is brute force's, and what is left after them cannot be improved layer by layer."""

import itertools
from typing import Any

import numpy as np
import pytest

from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.placement.search.annealing import COOLING_STEPS
from moeplace.placement.search.layout import packed_start
from moeplace.placement.solvers.chain import driver
from moeplace.placement.solvers.chain.capped import assign_capped, repaired
from moeplace.placement.solvers.chain.driver import _chain_of
from moeplace.placement.solvers.chain.polish import keeps, layer_costs, moved_tokens, polish, refined
from moeplace.placement.solvers.chain.search import Chain
from moeplace.profiling.synthetic.traces import topics
from tests.seeds import FIXED_AND_TODAY


def assignments(slots_R: list[int]) -> list[np.ndarray]:
    """All ways to put entries on ranks with so many slots."""
    labels = [rank for rank, size in enumerate(slots_R) for _ in range(size)]
    return [np.array(each) for each in sorted(set(itertools.permutations(labels)))]


def least(cost_SR: np.ndarray, load_S: np.ndarray, limit_R: np.ndarray, slots_R: list[int]) -> float:
    """Brute force; infinite where nothing keeps the limits."""
    entries, best = np.arange(len(load_S)), np.inf
    for rank_S in assignments(slots_R):
        if (np.bincount(rank_S, load_S, minlength=len(limit_R)) <= limit_R + 1e-9).all():
            best = min(best, float(cost_SR[entries, rank_S].sum()))
    return best


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize("slots_R", [[3, 3], [2, 2, 2], [3, 2, 1]])
def test_one_layer_is_brute_forces(seed: int, slots_R: list[int]) -> None:
    """Tight and loose limits, starts inside and outside of them; the bound never exceeds the optimum."""
    rng = np.random.default_rng(seed)
    for tightness in (1.0, 1.05, 1.2, 3.0):
        cost_SR = rng.integers(0, 50, (6, len(slots_R))).astype(float)
        load_S = rng.integers(1, 30, 6).astype(float)
        fair_R = np.array(slots_R) / 6 * load_S.sum()
        limit_R, start_S = np.ceil(tightness * fair_R), rng.permutation(np.repeat(np.arange(len(slots_R)), slots_R))
        optimum = least(cost_SR, load_S, limit_R, slots_R)
        for close in (False, True):
            found = assign_capped(cost_SR, load_S, limit_R, start_S, close=close)
            assert np.bincount(found.rank_S, minlength=len(slots_R)).tolist() == slots_R
            assert found.cost == pytest.approx(float(cost_SR[np.arange(6), found.rank_S].sum()))
            assert found.bound <= optimum + 1e-6
            over = (np.bincount(found.rank_S, load_S, minlength=len(slots_R)) > limit_R + 1e-9).any()
            if np.isinf(optimum):
                assert (found.rank_S == start_S).all() or over
            elif close:
                assert not over
                assert found.cost == pytest.approx(optimum)
            if found.proven and not over:
                assert found.cost == pytest.approx(optimum)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_swaps_cannot_reach_is_left_to_the_program(seed: int) -> None:
    """Loads that fill three ranks exactly in few ways: without the program the start stays, and nothing is proven."""
    rng, found_none = np.random.default_rng(seed), 0
    for _ in range(8):
        parts = rng.integers(1000, 3000, (3, 3)).astype(float)
        load_S = np.concatenate([parts.ravel(), 10_000 - parts.sum(axis=0)])
        cost_SR, start_S = rng.integers(0, 50, (12, 3)).astype(float), np.repeat(np.arange(3), 4)
        plain, closed = (
            assign_capped(cost_SR, load_S, np.full(3, 1e4), start_S, close=close) for close in (False, True)
        )
        if np.bincount(plain.rank_S, load_S).max() > 1e4:
            assert plain.rank_S.tolist() == start_S.tolist()
            assert plain.bound == -np.inf
            assert np.bincount(closed.rank_S, load_S).tolist() == [1e4] * 3
            found_none += 1
    assert found_none


def test_repairing_takes_load_off() -> None:
    """One swap is enough here, and the cheapest one is taken."""
    load_S, limit_R = np.array([5.0, 4.0, 1.0, 2.0]), np.array([6.0, 6.0])
    cost_SR = np.array([[0.0, 9], [0, 1], [0, 0], [0, 0]])
    rank_S = repaired(np.array([0, 0, 1, 1]), cost_SR, load_S, limit_R)
    assert rank_S is not None
    assert rank_S.tolist() == [0, 1, 0, 1]
    assert repaired(np.array([0, 0, 1, 1]), cost_SR, load_S, np.array([5.0, 5.0])) is None


def small_chain(seed: int, cap: float) -> tuple[Problem, Chain, np.ndarray]:
    """(problem, chain, packed plan): 4 layers, 6 experts on 2 ranks."""
    trace = topics(num_tokens=600, num_layers=4, num_experts=6, top_k=1, num_topics=4, contrast=1.5, seed=seed)
    problem = Problem.from_trace(
        trace, Cluster.uniform(2, slots_per_rank=3), mode="coherent", objective="traffic", max_imbalance=cap
    )
    starts = [packed_start(problem, layer) for layer in range(4)]
    return problem, _chain_of(problem, starts, cap, None), np.stack(starts)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize("cap", [1.02, 1.3])
def test_nothing_is_left_to_gain(seed: int, cap: float) -> None:
    """After `polish` no layer has a better row under its limits, by brute force; nothing got worse on the way."""
    _, chain, rank_LS = small_chain(seed, cap)
    before = moved_tokens(rank_LS, chain)
    assert polish(rank_LS, chain, lambda: False) == 0
    assert moved_tokens(rank_LS, chain) <= before
    assert keeps(rank_LS, chain)
    for layer in range(4):
        cost_SR = layer_costs(rank_LS, chain, layer)
        now = float(cost_SR[np.arange(6), rank_LS[layer]].sum())
        assert now == pytest.approx(least(cost_SR, chain.load_LS[layer], chain.limit_LR[layer], [3, 3]))


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_refining_keeps_caps_and_is_never_worse(seed: int) -> None:
    _, chain, rank_LS = small_chain(seed, 1.05)
    steps = rank_LS.copy()
    polish(steps, chain, lambda: False)
    best = refined(rank_LS, chain, np.random.default_rng(seed), 5, lambda: False)
    assert keeps(best, chain)
    assert moved_tokens(best, chain) <= moved_tokens(steps, chain)
    left = best.copy()
    assert polish(left, chain, lambda: False) == 0
    assert moved_tokens(left, chain) == moved_tokens(best, chain)


def test_time_that_is_up_ends_the_steps() -> None:
    """The plan stays what it is."""
    _, chain, rank_LS = small_chain(0, 1.05)
    same = rank_LS.copy()
    assert polish(same, chain, lambda: True) == 4
    assert (refined(rank_LS, chain, np.random.default_rng(0), 9, lambda: True) == rank_LS).all()


@pytest.mark.parametrize("options", [{}, {"speed": [1.0, 2.0, 1.0]}, {"ranks_per_node": 1}])
def test_refined_plans_are_at_their_best(options: dict[str, Any]) -> None:
    """Unequal ranks and prices of links: caps are kept, and no layer can gain, given its neighbours."""
    trace = topics(num_tokens=800, num_layers=5, num_experts=12, top_k=1, num_topics=6, contrast=1.5, seed=5)
    cluster = Cluster.uniform(3, slots_per_rank=4, ranks_per_node=options.get("ranks_per_node"))
    if "speed" in options:
        cluster = cluster.replace(speed_of_rank=np.array(options["speed"]))
    problem = Problem.from_trace(trace, cluster, mode="coherent", objective="traffic", max_imbalance=1.1)
    starts = [packed_start(problem, layer) for layer in range(5)]
    chain = _chain_of(problem, starts, 1.1, None)
    best = refined(np.stack(starts), chain, np.random.default_rng(0), 3, lambda: False)
    before = moved_tokens(best, chain)
    assert before < moved_tokens(np.stack(starts), chain)
    assert keeps(best, chain)
    assert polish(best, chain, lambda: False) == 0
    assert moved_tokens(best, chain) == pytest.approx(before)


def test_every_temperature_is_passed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a run follow each other from the hottest step to the closing descent."""
    _, chain, rank_LS = small_chain(0, 1.3)
    pieces: list[tuple[int, int]] = []
    monkeypatch.setattr(driver, "anneal_chain", lambda _, __, ___, cooling, *____: pieces.append(cooling[2:4]))
    assert not driver._one_run(rank_LS, chain, 1.0, 1000, 1e9, 0, Budget(1e9), np.zeros(1, np.uint8))
    assert pieces[0][0] == 0
    assert all(until == first for (_, until), (first, _) in itertools.pairwise(pieces))
    assert pieces[-1][1] == COOLING_STEPS + 1
