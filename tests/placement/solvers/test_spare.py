"""Spare slots, bounds that contradict, and work that a time limit can pay for."""

from typing import Any

import numpy as np
import pytest

import moeplace.placement.problem as problem_module
import moeplace.placement.solve as solve_module
from moeplace.placement.bounds.problem import Proven
from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.placement import MODES
from moeplace.placement.problem import Problem
from moeplace.placement.solve import BoundError, solve
from moeplace.placement.solvers.auto import search
from moeplace.placement.solvers.judge import Judge
from moeplace.placement.solvers.spare import _fill, use_all_slots, widened, without_spare
from tests.placement.instances import skewed_problem, skewed_trace
from tests.placement.oracles import layer_rows
from tests.seeds import TODAY

WORK_PER_SECOND = 2e7
"""Experts of tokens in layers that may be replayed for each second of a limit: half of what a slow core manages."""
SEEDS = (3, TODAY)


@pytest.mark.usefixtures("still_clock")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("objective", ["traffic", "seconds"])
@pytest.mark.parametrize("mode", MODES)
def test_more_slots_never_plan_worse(mode: Any, objective: Any, seed: int) -> None:
    """A plan for fewer slots is a plan for more; no slot stays empty unasked, and what that costs is said."""
    trace = skewed_trace(seed, tokens=120, layers=2, experts=8, top_k=1 + seed % 2)
    values = []
    for slots in (2, 3, 5):
        cluster = Cluster.uniform(4, slots_per_rank=slots, ranks_per_node=2 if seed % 3 else None)
        problem = Problem.from_trace(trace, cluster, mode=mode, objective=objective)
        full = solve(problem, time_limit=0.04, seed=seed)
        assert mode == "coherent" or not (full.placement.slot_to_expert < 0).any()
        free = solve(problem.replace(leave_empty=True), time_limit=0.04, seed=seed)
        values.append(free.objective)
        # A full rank reads more weights, and the rule that splits a load need not split it evenly: then it is said.
        said = any("cost more than they save" in note for note in full.notes)
        assert full.objective <= free.objective * (1.006 if objective == "seconds" else 1 + 1e-9) or said
        assert not said or mode != "dispatch-combine" or objective == "seconds"
    same = 1.005 if objective == "seconds" else 1 + 1e-9  # what predicted times cannot tell apart
    assert values[1] <= values[0] * same
    assert values[2] <= values[0] * same


def test_a_bound_above_its_value_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised, on the objective and on what else is bounded, and never called optimal."""
    problem = skewed_problem(0, trace={"layers": 2})
    value = solve(problem, time_limit=0.3).values
    for name in ("traffic", "imbalance"):
        too_much = Proven({name: value[name] * 1.01}, [])
        monkeypatch.setattr(solve_module, "prove", lambda *_, proven=too_much, **__: proven)
        with pytest.raises(BoundError, match=f"bound on {name}"):
            solve(problem, time_limit=0.3)


@pytest.mark.parametrize("objective", ["traffic", "seconds"])
@pytest.mark.parametrize(("mode", "top_k", "options"), [
    ("dispatch-combine", 2, {}),
    ("dispatch-combine", 2, {"survive": 1}),
    ("coherent", 1, {}),
    ("coherent", 1, {"survive": 1, "max_imbalance": 1.3}),
    ("coherent", 2, {}),
    ("allgather", 2, {}),
])  # fmt: skip
def test_a_limit_pays_for_what_is_replayed(
    mode: Any, top_k: int, options: dict[str, Any], objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the trace: all of its tokens are replayed once or twice, else only as many as the limit allows."""
    replayed: list[int] = []
    evaluate = problem_module.evaluate

    def counting(trace: Any, *args: Any, **options: Any) -> Any:
        replayed.append(trace.num_tokens * trace.num_layers * trace.top_k)
        return evaluate(trace, *args, **options)

    monkeypatch.setattr(problem_module, "evaluate", counting)
    trace = skewed_trace(1, tokens=60_000, layers=4, experts=8, top_k=top_k)
    cluster = Cluster.uniform(4, slots_per_rank=5)
    solve(Problem.from_trace(trace, cluster, mode=mode, objective=objective, **options), time_limit=0.1)
    whole = trace.num_tokens * trace.num_layers * trace.top_k
    assert sum(count == whole for count in replayed) <= 2
    assert sum(count for count in replayed if count != whole) <= WORK_PER_SECOND * 0.1


def test_a_limit_pays_for_what_is_replayed_when_solving_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Staying and moving are compared on all tokens, everything else on a part."""
    trace = skewed_trace(1, tokens=60_000, layers=4, experts=8, top_k=2)
    cluster = Cluster.uniform(4, slots_per_rank=2)
    problem = Problem.from_trace(trace, cluster, objective="traffic", max_imbalance=1.5)
    first = solve(problem, solver="index-order", time_limit=0.1).placement
    replayed: list[int] = []
    evaluate = problem_module.evaluate
    monkeypatch.setattr(
        problem_module, "evaluate", lambda trace, *a, **o: replayed.append(trace.num_tokens) or evaluate(trace, *a, **o)
    )
    solve(problem.replace(previous=first, max_moves=2), time_limit=0.1)
    assert sum(count == trace.num_tokens for count in replayed) <= 3
    parts = np.sum([count for count in replayed if count < trace.num_tokens])
    assert parts * trace.num_layers * trace.top_k <= WORK_PER_SECOND * 0.1


@pytest.mark.usefixtures("still_clock")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("objective", ["traffic", "seconds"])
def test_layers_choose_between_plans_with_replicas_and_without(objective: Any, seed: int) -> None:
    """Whatever is minimised, one of the drafts has each layer's better row; where layers depend on each other none."""
    cluster = Cluster.uniform(4, slots_per_rank=3)
    trace = skewed_trace(seed, tokens=120, layers=3, experts=8, top_k=2)
    problem = Problem.from_trace(trace, cluster, objective=objective)
    drafts, _ = search(problem, Budget(0.04, seed), None, 1.0, None)
    value_DL = np.array([problem.evaluate(problem.placement(draft)).ranks_per_token_L for draft in drafts])
    assert value_DL[2].tolist() == pytest.approx(value_DL[:2].min(axis=0).tolist())
    chained = problem.replace(mode="coherent")
    assert len(search(chained, Budget(0.04, seed), None, 1.0, None)[0]) == 2


@pytest.mark.parametrize("seed", [*range(8), TODAY])
def test_a_few_tokens_do_not_say_that_a_cap_is_broken(seed: int) -> None:
    """What keeps the cap on all tokens fills the slots, though the tokens that drafts are compared on exceed it."""
    trace = skewed_trace(seed, tokens=6000, layers=3, experts=8, top_k=2)
    problem = Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=3), objective="traffic")
    narrow = without_spare(problem)
    assert narrow is not None
    sparse = widened(problem, narrow, np.tile(np.arange(8), (3, 1)))
    drafts = [sparse, *(_fill(problem, sparse, None, heaviest) for heaviest in (True, False))]
    caps_L = np.max([problem.evaluate(problem.placement(draft)).imbalance_L for draft in drafts], axis=0) + 1e-9
    judge = Judge(problem, None, caps_L, seconds=1e-6)
    assert judge.sampled
    slots_LS, note = use_all_slots(problem, [sparse], None, judge, judge.best, np.random.default_rng(seed))
    assert (slots_LS >= 0).all()
    assert "break a constraint" not in note


@pytest.mark.parametrize("seed", [*range(12), TODAY])
def test_a_tight_cap_leaves_no_slot_empty_that_can_be_used(seed: int) -> None:
    """A plan for fewer slots that keeps its cap is filled within it, if any layout of all slots keeps it.

    No clock is asked: a search that was cut short hands in plans that have had no replica yet.
    """
    rng = np.random.default_rng(seed)
    ranks, experts = ((2, 4), (3, 4), (2, 6))[seed % 3]
    slots = experts // ranks + 2 if experts % ranks else experts // ranks + 1
    trace = skewed_trace(seed, tokens=150, layers=2, experts=experts, top_k=2)
    problem = Problem.from_trace(trace, Cluster.uniform(ranks, slots_per_rank=slots), objective="traffic")
    narrow = without_spare(problem)
    assert narrow is not None
    rows = [rng.permutation(np.pad(np.arange(experts), (0, narrow.cluster.num_slots - experts), constant_values=-1))
            for _ in range(2)]  # fmt: skip
    sparse = widened(problem, narrow, np.array(rows, np.int32))
    caps_L = problem.evaluate(problem.placement(sparse)).imbalance_L + 1e-6
    problem = problem.replace(max_imbalance=float(caps_L.max()))
    judge = Judge(problem, None, caps_L)
    found, note = use_all_slots(problem, [sparse], None, judge, judge.best, rng)
    imbalance_L = problem.evaluate(problem.placement(found)).imbalance_L
    assert (imbalance_L <= caps_L + 1e-9).all()
    for layer in range(2):
        full = [np.stack([row if x == layer else found[x] for x in range(2)])
                for row in layer_rows(problem, layer, fill=True)]  # fmt: skip
        least = min(problem.evaluate(problem.placement(draft)).imbalance_L[layer] for draft in full)
        assert bool((found[layer] < 0).any()) == bool(least > caps_L[layer])
    assert ("break a constraint" in note) == bool((found < 0).any())


@pytest.mark.parametrize("seed", [0, 1, TODAY])
@pytest.mark.parametrize("objective", ["traffic", "seconds"])
@pytest.mark.clock(300)
def test_a_search_without_time_uses_every_slot(objective: Any, seed: int) -> None:
    """As on a machine that is busy with other things: the limit passes before the first round ends."""
    trace = skewed_trace(seed, tokens=1500, layers=4, experts=32, top_k=4)
    cluster = Cluster.uniform(8, slots_per_rank=5, ranks_per_node=4)
    problem = Problem.from_trace(trace, cluster, objective=objective, max_imbalance=1.1)
    result = solve(problem, time_limit=1.0, seed=seed)
    assert not (result.placement.slot_to_expert < 0).any()
