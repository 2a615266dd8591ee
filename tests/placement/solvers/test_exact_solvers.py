"""Viterbi, ExFlow's and MoETuner's programs and CP-SAT against brute force and against each other."""

import itertools
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.placement.bounds.problem import problem_bounds
from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import ExpertTime
from moeplace.placement.cost.evaluation import Evaluation
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.solvers.exact import cpsat, moetuner, optimizers
from moeplace.placement.solvers.exact.cpsat import solve_cpsat
from moeplace.placement.solvers.exact.exflow import greedy_chain, solve_exflow
from moeplace.placement.solvers.exact.moetuner import balance_clusters, mapping_cost, solve_moetuner
from moeplace.placement.solvers.exact.viterbi import count_states, enumerate_states, fits, solve_viterbi
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_problem, skewed_trace
from tests.placement.oracles import all_placements, best_traffic, traffic_of

CHAIN = {"mode": "coherent", "trace": {"top_k": 1, "layers": 3, "tokens": 60}}
SOLVERS = (solve_exflow, solve_moetuner, solve_cpsat)


def judge(problem: Problem, draft: Draft) -> Evaluation:
    """The evaluation of a draft, which must be a valid placement."""
    return problem.evaluate(problem.placement(draft.slot_to_expert))


def caps_of(problem: Problem) -> np.ndarray:
    """(L,) the larger of the cap and the least imbalance any placement of the layer has."""
    states_ME = enumerate_states(problem.cluster.slots_of_rank)
    on_MRE = states_ME[:, None, :] == np.arange(problem.num_ranks)[:, None]
    load_LMR = np.einsum("mre,le->lmr", on_MRE, problem.load_LE)
    return np.maximum((load_LMR.max(axis=2) / load_LMR.mean(axis=2)).min(axis=1), problem.max_imbalance)


@pytest.mark.parametrize(
    "options",
    [
        CHAIN,
        {**CHAIN, "max_imbalance": 1.1},
        {**CHAIN, "ranks_per_node": 1},
        {"trace": {"layers": 2, "top_k": 2}},
        {"trace": {"layers": 2, "top_k": 3}, "max_imbalance": 1.05},
        {"trace": {"layers": 1, "top_k": 2, "experts": 4}, "ranks": 4, "slots": 1, "ranks_per_node": 2},
    ],
)
@given(seed=st.integers(0, 999))
@settings(max_examples=4, deadline=None)
def test_viterbi_equals_brute_force(options, seed) -> None:  # type: ignore[no-untyped-def]
    """Proven value = evaluated value = least over all placements under the cap, and no bound exceeds it."""
    problem = skewed_problem(seed, **options)
    draft = solve_viterbi(problem, Budget(10.0))
    caps_L = None if problem.max_imbalance is None else caps_of(problem)
    evaluation = judge(problem, draft)
    best = best_traffic(problem, caps_L)
    assert draft.status == "optimal"
    assert draft.lower_bound == pytest.approx(best)
    assert traffic_of(problem, evaluation) == pytest.approx(best)
    assert problem_bounds(problem, time_limit=0.1)["traffic"] <= best + 1e-9


def test_viterbi_solves_a_mixtral_sized_chain() -> None:
    """32 layers x 8 experts on 4 ranks, load and traffic together: proven in seconds, below the greedy chain."""
    problem = skewed_problem(
        0, ranks=4, mode="coherent", trace={"layers": 32, "experts": 8, "top_k": 1, "tokens": 2000}, max_imbalance=1.2
    )
    started = time.monotonic()
    draft = solve_viterbi(problem, Budget(30.0))
    assert time.monotonic() - started < 30
    evaluation = judge(problem, draft)
    assert draft.lower_bound == pytest.approx(evaluation.copies_per_token)
    assert problem_bounds(problem, time_limit=1.0)["traffic"] <= evaluation.copies_per_token
    priced = solve_viterbi(problem, Budget(30.0), load_price=0.5)
    assert priced.lower_bound is None
    assert judge(problem, priced).imbalance_mean <= evaluation.imbalance_mean


def test_viterbi_fits_only_what_it_can_prove() -> None:
    """2,520 states for Mixtral's layer; replicas, other objectives and large layers are refused by name."""
    assert count_states(np.full(4, 2)) == len(enumerate_states(np.full(4, 2))) == 2520
    assert fits(skewed_problem(0, **CHAIN))
    assert not fits(skewed_problem(0, slots=3, **CHAIN))
    assert not fits(skewed_problem(0, mode="coherent"))
    assert not fits(skewed_problem(0, objective="seconds"))
    with pytest.raises(InputError, match="viterbi needs"):
        solve_viterbi(skewed_problem(0, ranks=4, slots=4, trace={"experts": 16}), Budget(1.0))


@given(seed=st.integers(0, 999), formulation=st.sampled_from(["change", "stay"]))
@settings(max_examples=3, deadline=None)
def test_exflow_program_is_optimal_on_one_node(seed: int, formulation: str) -> None:
    """Both formulations reach the proven optimum of the chain, and say so."""
    problem = skewed_problem(seed, **CHAIN)
    draft = solve_exflow(problem, Budget(20.0), formulation=formulation)
    assert draft.status == "optimal"
    assert traffic_of(problem, judge(problem, draft)) == pytest.approx(best_traffic(problem))


def test_exflow_stages_and_windows() -> None:
    """Nodes first: the node stay rate is optimal. A large program is cut into windows and never worsens the start."""
    problem = skewed_problem(1, ranks=4, slots=1, ranks_per_node=2, **CHAIN)
    evaluation = judge(problem, solve_exflow(problem, Budget(20.0)))
    as_nodes = Problem.from_trace(
        skewed_trace(1, **CHAIN["trace"]), Cluster.uniform(2, slots_per_rank=2), mode="coherent"
    )
    optimum = solve_viterbi(as_nodes.replace(objective="traffic"), Budget(5.0)).lower_bound
    assert 1 - evaluation.node_stay_rate == pytest.approx(optimum)
    large = skewed_problem(
        2, ranks=4, slots=4, mode="coherent", trace={"layers": 6, "experts": 16, "top_k": 1, "tokens": 500}
    )
    draft = solve_exflow(large, Budget(3.0))
    start_LE = greedy_chain(large.transitions_LEE.astype(float), np.ones((6, 16), bool), np.full(4, 4))
    same = start_LE[:-1, :, None] == start_LE[1:, None, :]
    start_stay = (large.transitions_LEE * same).sum() / large.transitions_LEE.sum()
    assert judge(large, draft).stay_rate >= start_stay - 1e-12
    with pytest.raises(InputError, match="formulation"):
        solve_exflow(problem, Budget(1.0), formulation="other")
    with pytest.raises(InputError, match="must be cbc or one of"):
        solve_exflow(problem, Budget(1.0), solver="none")


def test_identity_path_stays_everywhere() -> None:
    """Tokens that keep one expert id through all layers: stay rate 1, whatever the labels per layer."""
    rng = np.random.default_rng(0)
    names_LE = np.stack([rng.permutation(8) for _ in range(4)])
    ids_TLK = names_LE.T[rng.integers(0, 8, 200)][:, :, None]
    problem = Problem.from_trace(
        RoutingTrace(ids_TLK, np.full(4, 8)), Cluster.uniform(4, slots_per_rank=2), mode="coherent", objective="traffic"
    )
    assert judge(problem, solve_viterbi(problem, Budget(10.0))).stay_rate == 1.0
    assert judge(problem, solve_exflow(problem, Budget(5.0))).stay_rate == 1.0


@given(seed=st.integers(0, 999))
@settings(max_examples=4, deadline=None)
def test_balance_programs_of_moetuner(seed: int) -> None:
    """min-max of time equals brute force, also where ranks differ in speed; L1 on its own objective does too."""
    load_E = np.random.default_rng(seed).integers(1, 100, 6).astype(float)
    sizes_R, start_E = np.full(3, 2), np.repeat(np.arange(3), 2)
    states_ME = enumerate_states(sizes_R)
    load_MR = np.stack([(states_ME == rank) @ load_E for rank in range(3)], axis=1)
    for speed_R in (np.ones(3), np.array([1.0, 0.5, 2.0])):
        fair_R = load_E.sum() * speed_R / speed_R.sum()
        for balance, best in (
            ("max", (load_MR / speed_R).max(axis=1).min()),
            ("l1", np.abs(load_MR - fair_R).sum(axis=1).min()),
        ):
            answer_E = balance_clusters(load_E, sizes_R, speed_R, start_E, 10.0, balance=balance, gap=0.0)
            assert answer_E is not None
            load_R = np.bincount(answer_E, load_E)
            value = (load_R / speed_R).max() if balance == "max" else np.abs(load_R - fair_R).sum()
            assert value == pytest.approx(best)


def test_a_mapping_program_that_is_too_large_is_not_begun() -> None:
    """16 ranks, two layers: more constraints than a second can write."""
    cost_RR = Cluster.uniform(16, slots_per_rank=1, ranks_per_node=8).cost_RR
    rank_LR, note = moetuner._map_clusters(np.ones((1, 16, 16)), cost_RR, Budget(1.0), "cbc", "max", 0.0)
    assert "too large" in note
    assert np.sort(rank_LR, axis=1).tolist() == [list(range(16))] * 2


@given(seed=st.integers(0, 999), objective=st.sampled_from(["max", "sum"]))
@settings(max_examples=4, deadline=None)
def test_cluster_mapping_of_moetuner(seed: int, objective: str) -> None:
    """Uniform links: the closed solution equals brute force over all permutations; two nodes: the program does."""
    rng = np.random.default_rng(seed)
    traffic_LRR = rng.integers(0, 50, (2, 4, 4)).astype(float)
    permutations = enumerate_states(np.ones(4, np.int64)).astype(int)
    for ranks_per_node in (None, 2):
        cost_RR = Cluster.uniform(4, slots_per_rank=1, ranks_per_node=ranks_per_node).cost_RR
        pairs = itertools.product(permutations, permutations)
        best = min(mapping_cost(traffic_LRR[:1], cost_RR, np.stack(pair), objective) for pair in pairs)
        rank_LR, note = moetuner._map_clusters(traffic_LRR[:1], cost_RR, Budget(15.0), "cbc", objective, 0.0)
        assert not note
        assert mapping_cost(traffic_LRR[:1], cost_RR, rank_LR, objective) == pytest.approx(best)


@pytest.mark.parametrize(
    "options",
    [
        {"trace": {"layers": 2, "top_k": 2}},
        {"trace": {"layers": 2, "top_k": 2}, "max_imbalance": 1.1},
        {"trace": {"layers": 1, "top_k": 3, "experts": 4}, "ranks": 4, "slots": 1, "ranks_per_node": 2},
        {"trace": {"layers": 2, "top_k": 2, "ragged": 0.3}, "slots": [3, 1]},
    ],
)
def test_cpsat_connectivity_equals_brute_force(options) -> None:  # type: ignore[no-untyped-def]
    """One layer at a time is exact for `dispatch-combine`."""
    problem = skewed_problem(7, **options)
    draft = solve_cpsat(problem, Budget(20.0))
    caps_L = None if problem.max_imbalance is None else caps_of(problem)
    assert draft.status == "optimal"
    assert traffic_of(problem, judge(problem, draft)) == pytest.approx(best_traffic(problem, caps_L))


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("copies_per_token", [0.2, 1.0, 4.0])
def test_cpsat_weighs_balance_against_copies_as_seconds_do(copies_per_token: float, nodes: int) -> None:
    """The busiest rank's token costs `per_token`, a copy its bytes there and back, shared by the ranks."""
    problem = skewed_problem(
        4, ranks=2, slots=4, objective="seconds", ranks_per_node=2 // nodes,
        trace={"experts": 8, "layers": 1, "top_k": 2, "tokens": 60},
    )  # fmt: skip
    link = problem.calibration.inter if nodes > 1 else problem.calibration.intra
    per_copy = 2 * problem.shape.hidden_size * problem.shape.dtype_bytes / link.bandwidth / problem.num_ranks
    calibration = replace(problem.calibration, expert=ExpertTime(0.0, copies_per_token * per_copy, 0.0))
    problem = problem.replace(calibration=calibration)

    def seconds(placement: Placement) -> float:
        evaluation = problem.evaluate(placement)
        copies = 60 * (evaluation.ranks_per_token + problem.node_weight * evaluation.nodes_per_token)
        return float(per_copy * (copies + copies_per_token * evaluation.load_LR.max()))

    draft = solve_cpsat(problem, Budget(20.0))
    best = min(seconds(placement) for placement in all_placements(problem))
    assert seconds(problem.placement(draft.slot_to_expert)) == pytest.approx(best, rel=0.002)


def test_cpsat_load_with_replicas_reaches_the_bound() -> None:
    """One expert with half of the load, two ranks, one spare slot: the two replicas balance it."""
    problem = Problem.from_load(np.array([[6.0, 2, 2, 2]]), Cluster.uniform(2, slots_per_rank=3))
    placement = problem.placement(solve_cpsat(problem, Budget(5.0)).slot_to_expert)
    load_R = placement.copies_LER[0].T @ (problem.load_LE[0] / placement.replica_counts[0])
    assert load_R.max() / load_R.mean() <= 7 / 6


def test_cpsat_stays_near_the_previous_placement() -> None:
    """No moves allowed: the previous placement; a prohibitive price: the same; a cap on moves: kept."""
    problem = skewed_problem(3, ranks=2, slots=4, trace={"experts": 8, "layers": 2, "top_k": 2})
    previous = problem.placement(np.tile(np.arange(8), (2, 1)))
    for change in ({"max_moves": 0}, {"move_price": 1e3}):
        draft = solve_cpsat(problem.replace(previous=previous, **change), Budget(10.0))
        assert (problem.placement(draft.slot_to_expert).copies_LER == previous.copies_LER).all()
    draft = solve_cpsat(problem.replace(previous=previous, max_moves=2), Budget(10.0))
    new_LER = (problem.placement(draft.slot_to_expert).copies_LER > previous.copies_LER).sum(axis=(1, 2))
    assert (new_LER <= 2).all()


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 4, "slots": 4, "trace": {"experts": 16, "top_k": 4, "tokens": 300, "layers": 3}},
        {"ranks": 4, "slots": [6, 4, 4, 3], "trace": {"experts": 15, "top_k": 2, "layers": 3}, "mode": "coherent"},
        {"ranks": 4, "slots": 5, "ranks_per_node": 2, "trace": {"experts": 16, "top_k": 1}, "mode": "coherent"},
    ],
)
def test_every_solver_is_valid_within_its_limit(solve, options) -> None:  # type: ignore[no-untyped-def]
    """Replicas, unequal slots, nodes: a valid placement in time, and the same one for the same seed where it ended."""
    problem = skewed_problem(0, **options)
    started = time.monotonic()
    draft = solve(problem, Budget(2.0))
    assert time.monotonic() - started < 3.5
    assert traffic_of(problem, judge(problem, draft)) >= problem_bounds(problem, time_limit=0.2)["traffic"] - 1e-9


@pytest.mark.parametrize("first", ["moeplace.placement.solvers.exact.optimizers", "ortools.sat.python.cp_model"])
def test_optimizers_import_in_either_order(first: str) -> None:
    """OR-tools and PuLP live in one process whichever module comes first, and PuLP's CBC answers."""
    program = (
        f"import {first}\nfrom moeplace.placement.solvers.exact.optimizers import cp_model, pulp, solve_program\n"
        "program = pulp.LpProblem('p', pulp.LpMaximize)\nx = program.add_variable('x', 0, 5, cat='Integer')\n"
        "program.setObjective(2 * x)\nprogram += 3 * x <= 10\n"
        "assert solve_program(program, time_limit=10) == 'optimal' and x.value() == 3\n"
        "model = cp_model.CpModel()\ny = model.new_int_var(0, 4, 'y')\nmodel.maximize(y)\n"
        "assert cp_model.CpSolver().solve(model) == cp_model.OPTIMAL\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_solver_that_fails_finds_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not a traceback: the published models go on with what they have."""
    broken = tmp_path / "cbc"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(optimizers, "pulp_cbc_path", str(broken))
    start_E = np.array([0, 0, 1, 1])
    load_E = np.arange(4.0)
    assert balance_clusters(load_E, np.full(2, 2), np.ones(2), start_E, 10.0) is None
    problem = skewed_problem(0, **CHAIN)
    assert judge(problem, solve_exflow(problem, Budget(2.0))).stay_rate >= 0


def test_cpsat_searches_in_what_writing_the_program_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which every look at it takes a second: no search is given more than its time less that."""
    ticks, given = itertools.count(), []

    class Engine(cpsat.cp_model.CpSolver):
        def solve(self, model):  # type: ignore[no-untyped-def]
            given.append(self.parameters.max_time_in_seconds)
            return super().solve(model)

    monkeypatch.setattr(cpsat, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(cpsat.cp_model, "CpSolver", Engine)
    solve_cpsat(skewed_problem(7, trace={"layers": 1, "top_k": 2}), Budget(20.0))
    assert given
    assert max(given) <= 19.0
