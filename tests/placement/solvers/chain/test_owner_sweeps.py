"""Sweeps for several experts per token: a swap's price is the evaluator's, caps hold, and no plan gets worse."""

import numpy as np
import pytest

from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.objective import measure
from moeplace.placement.problem import Problem
from moeplace.placement.search.annealing import seed_state
from moeplace.placement.solvers import get_solver
from moeplace.placement.solvers.chain import owner_sweeps
from moeplace.placement.solvers.chain.owner_sweeps import _planned, _Sweep, applies, sweep_owners
from moeplace.placement.solvers.chain.owners import follow_owners, swap_owned
from moeplace.placement.solvers.index_order import solve_index_order
from moeplace.profiling.synthetic.traces import ragged, topics
from moeplace.profiling.traces.trace import RoutingTrace
from tests.seeds import FIXED_AND_TODAY


def tokens(seed: int, layers: int, share: float = 0.0) -> RoutingTrace:
    """Of 16 experts, top-3, ragged or not."""
    trace = topics(num_tokens=500, num_layers=layers, num_experts=16, top_k=3, num_topics=6, contrast=1.5, seed=seed)
    return ragged(trace, share, seed=seed) if share else trace


def coherent(trace: RoutingTrace, per_node: int = 4, cap: float | None = None) -> Problem:
    cluster = Cluster.uniform(4, slots_per_rank=4, ranks_per_node=per_node)
    return Problem.from_trace(trace, cluster, mode="coherent", objective="traffic", max_imbalance=cap)


def value(problem: Problem, slots_LS: np.ndarray) -> float:
    return measure(problem, problem.placement(slots_LS))[1]


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize("per_node", [4, 2, 1])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_what_swaps_save_is_what_the_evaluator_sees(seed: int, per_node: int, share: float) -> None:
    """Three layers, the first without experts, so that all exchanges of the others count: each price is exact.

    But for one thing: a tie for the next layer's owner is broken by the present one, which matters where pairs of ranks
    have different prices and there is a next layer.
    """
    trace = tokens(seed, 3, share)
    ids_TLK = trace.topk_ids.copy()
    ids_TLK[:, 0] = -1
    problem = coherent(trace.replace(topk_ids=ids_TLK), per_node)
    slots_LS = solve_index_order(problem, Budget(1.0)).slot_to_expert
    before_T = np.full(500, -1, np.int32)
    for layer in (1, 2):
        sweep = _Sweep.of(problem, slots_LS, None, 1)
        state, stop = seed_state(np.random.default_rng(seed)), np.zeros(1, np.uint8)
        saved = swap_owned(sweep.rank_LS[layer], sweep.layer(layer, before_T), -1, 0.0, stop, state)
        gained = value(problem, slots_LS) - value(problem, sweep.slots(problem))
        assert saved > 0
        if layer == 2 or per_node != 2:
            assert gained * 500 * 2 == pytest.approx(saved, rel=1e-4)
        before_T = follow_owners(sweep.ids[1], _Sweep.of(problem, slots_LS, None, 1).rank_LS[1], before_T, 4)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_owners_follow_the_definition(seed: int) -> None:
    """The rank with most of a token's experts; ties: where it is, else the lowest; without experts it stays."""
    rng = np.random.default_rng(seed)
    ids_TK, rank_E = np.argsort(rng.random((200, 8)), axis=1)[:, :4].astype(np.int16), rng.integers(0, 3, 8)
    ids_TK[rng.random((200, 4)) < 0.3] = -1
    before_T = rng.integers(-1, 3, 200).astype(np.int32)
    after_T = follow_owners(ids_TK, rank_E, before_T, 3)
    for ids, before, after in zip(ids_TK, before_T, after_T, strict=True):
        held = [int(rank_E[e]) for e in ids if e >= 0]
        expected = max(sorted(set(held)), key=lambda r: (held.count(r), r == before, -r)) if held else before
        assert after == expected


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_sweeps_save_copies_and_keep_caps(seed: int) -> None:
    problem = coherent(tokens(seed, 5), cap=1.1)
    start_LS = get_solver("lpt")(problem, Budget(1.0)).slot_to_expert
    swept_LS = sweep_owners(problem, Budget(20.0, seed), start_LS, 1.1, 10.0)
    assert value(problem, swept_LS) < value(problem, start_LS)
    caps_L = np.maximum(1.1, problem.evaluate(problem.placement(start_LS)).imbalance_L)
    assert (problem.evaluate(problem.placement(swept_LS)).imbalance_L <= caps_L + 1e-9).all()
    again_LS = sweep_owners(problem, Budget(20.0, seed), start_LS, 1.1, 10.0)
    assert (again_LS == swept_LS).all(), "a seed decides"


def test_where_sweeps_apply() -> None:
    """Several experts per token, a slot each, more than one layer, tokens that move."""
    assert applies(coherent(tokens(0, 2)))
    assert not applies(coherent(tokens(0, 1)))
    assert not applies(coherent(tokens(0, 2).primary()))
    assert not applies(coherent(tokens(0, 2)).replace(mode="dispatch-combine"))
    assert not applies(coherent(tokens(0, 2)).replace(cluster=Cluster.uniform(4, slots_per_rank=5)))


def test_planned_sweeps_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes x pairs of slots x what a swap costs is what one core does in the time, less a reserve."""
    monkeypatch.setattr(owner_sweeps, "workers", lambda: 1)
    problem = coherent(tokens(0, 3))  # 3 layers of 16 slots: 360 pairs; 500 tokens, each with 3 of 16 experts
    for seconds in (0.001, 0.002):
        plan = _planned(problem, seconds, 1.0)
        swap = 2 * 500 * 3 / 16 * 3 * owner_sweeps._SECONDS_PER_TOKEN / plan.stride
        assert plan.share < 1
        assert plan.passes * plan.share * 360 * swap == pytest.approx(owner_sweeps._FILL * seconds)
