"""`objective="seconds"`: the shortest predicted step, and of those as short the one with least traffic or regret."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import moeplace.placement.solvers.seconds as seconds_module
from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.objective import traffic
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.search.ties import ties_of
from moeplace.placement.solvers.index_order import solve_index_order
from moeplace.placement.solvers.judge import Judge
from moeplace.placement.solvers.lpt import solve_lpt
from moeplace.placement.solvers.seconds import AS_FAST, AS_FAST_ON_ASSUMED_LINKS, fastest
from moeplace.profiling.synthetic.traces import planted
from tests.placement.instances import skewed_problem
from tests.seeds import TODAY


def drafts_and_choice(mode: Any, seed: int, **links: Any) -> tuple[Problem, list[Placement], Placement]:
    """(problem, its drafts, the chosen one) where searches return random placements."""
    trace, _ = planted(
        num_tokens=512,
        num_layers=4,
        num_experts=16,
        top_k=1 if mode == "coherent" else 2,
        num_ranks=4,
        epsilon=0.2,
        seed=seed,
    )
    problem = Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=4, **links), mode=mode)
    rng = np.random.default_rng(seed)
    given = [np.stack([rng.permutation(16) for _ in range(4)]) for _ in range(4)]
    searched = iter(given)
    budget = Budget(1e9)
    chosen = fastest(problem, budget, lambda *_: ([next(searched)], False)).slot_to_expert
    rows = [*given, solve_lpt(problem, budget).slot_to_expert, solve_index_order(problem, budget).slot_to_expert]
    drafts = [problem.placement(row) for row in rows]
    return problem, [*mixtures_of(problem, drafts), *drafts], problem.placement(chosen)


def mixtures_of(problem: Problem, drafts: list[Placement]) -> list[Placement]:
    """On links of each speed, each layer's row of the draft that is the shortest where it is the only layer."""
    if problem.mode == "coherent":
        return []
    mixed = []
    for slowness in (1.0, 3.0, 10.0, 30.0, 100.0):
        alone = [[seconds_alone(problem, draft, layer, slowness) for draft in drafts] for layer in range(4)]
        chosen = [drafts[int(np.argmin(seconds))] for seconds in alone]
        mixed.append(problem.placement(np.stack([d.slot_to_expert[layer] for layer, d in enumerate(chosen)])))
    return mixed


def seconds_alone(problem: Problem, placement: Placement, layer: int, slowness: float = 1.0) -> float:
    """Of one layer, in a model that has no other."""
    one = {"experts_per_layer": np.full(1, 16), "layer_ids": np.arange(1), "num_hidden_layers": 1}
    assert problem.trace is not None
    trace = replace(problem.trace, topk_ids=problem.trace.topk_ids[:, [layer]], topk_weights=None, **one)
    part = placement.replace(slot_to_expert=placement.slot_to_expert[[layer]], **one)
    cluster = on_slower_links(problem, slowness).cluster
    return evaluate(trace, part, mode=problem.mode, cluster=cluster, shape=problem.shape).predicted_seconds


@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent", "allgather"])
def test_layers_take_what_a_step_takes(mode: Any) -> None:
    """Their seconds sum up to the step, but for an exchange of K/V; each is that of its layer alone if it is on its
    own."""
    problem, drafts, _ = drafts_and_choice("coherent" if mode == "coherent" else "dispatch-combine", 1)
    problem = problem.replace(mode=mode)
    for draft in drafts[:3]:
        found = problem.evaluate(draft)
        if mode == "coherent":
            assert 0 < found.seconds_L.sum() < found.predicted_seconds
            assert (found.seconds_L > 0).all()
        else:
            assert found.seconds_L.sum() == pytest.approx(found.predicted_seconds, rel=1e-12)
            alone = [seconds_alone(problem, draft, layer) for layer in range(4)]
            np.testing.assert_allclose(found.seconds_L, alone, rtol=1e-12)


@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent"])
@pytest.mark.parametrize("seed", range(4))
def test_equal_time_leaves_the_choice_to_traffic(mode: Any, seed: int) -> None:
    """Whatever the searches return: nothing much slower than the fastest, and nothing as fast has less traffic."""
    problem, drafts, choice = drafts_and_choice(mode, seed, intra=Link(1e-5, 1e11))
    others, chosen = [problem.evaluate(draft) for draft in drafts], problem.evaluate(choice)
    least = min(other.predicted_seconds for other in others)
    assert chosen.predicted_seconds <= least * (1 + AS_FAST)
    as_fast = [traffic(problem, other) for other in others if other.predicted_seconds <= least * (1 + AS_FAST)]
    assert traffic(problem, chosen) == pytest.approx(min(as_fast))


@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent"])
@pytest.mark.parametrize("seed", [*range(4), TODAY])
def test_links_that_are_not_known_leave_the_least_regret(mode: Any, seed: int) -> None:
    """Among the plans as short, none is as good on nominal links and on far slower ones, and better on some."""
    print("seed", seed)
    problem, drafts, choice = drafts_and_choice(mode, seed)

    def steps(plans: list[Placement], slowness: float = 1.0) -> np.ndarray:
        """Predicted seconds on links so many times as slow."""
        cluster, links = problem.cluster, {}
        for tier, link in {"intra": cluster.intra, "inter": cluster.inter}.items():
            links[tier] = Link(link.latency, link.bandwidth / slowness)
        slower = problem.replace(cluster=cluster.replace(**links), calibration=None)
        return np.array([slower.evaluate(plan).predicted_seconds for plan in plans])

    shortest = steps(drafts).min()
    longest = max(min(shortest * (1 + AS_FAST_ON_ASSUMED_LINKS), steps(drafts[-1:])[0]), shortest * (1 + AS_FAST))
    near = [draft for draft in drafts if steps([draft])[0] <= longest]
    assert steps([choice])[0] <= longest
    regret_C = np.max([steps(near, times) / steps(near, times).min() for times in (1.0, 10.0, 100.0)], axis=0)
    ours = max(steps([choice], times)[0] / steps(near, times).min() for times in (1.0, 10.0, 100.0))
    assert ours == pytest.approx(regret_C.min())
    for slowness in (3.0, 30.0, 1000.0):
        assert steps([choice], slowness)[0] <= steps(near, slowness).min() * ours * 1.01


def test_the_users_own_cap_competes() -> None:
    """The hardest cap allowed may well be the best one: it is searched for, with the tighter ones and no looser."""
    for hardest in (1.08, 1.15, 1.001, 2.0):
        problem = drafts_and_choice("dispatch-combine", 0)[0].replace(max_imbalance=hardest)
        row = solve_index_order(problem, Budget(1.0)).slot_to_expert
        asked: list[Any] = []

        def search(problem: Any, budget: Any, cap: Any, *rest: Any, row: Any = row, asked: Any = asked) -> Any:
            asked.append(cap)
            return [row], False

        fastest(problem, Budget(1e9), search)
        assert asked[-1] == hardest
        assert asked == sorted(set(asked))
        assert asked[:-1] == [cap for cap in (1.01, 1.05, 1.15) if cap < hardest]


@pytest.mark.parametrize("seed", [*range(3), TODAY])
@pytest.mark.parametrize("bound", [False, True])
def test_layers_of_different_plans_are_put_together(seed: int, bound: bool) -> None:
    """On links of every speed a mixture is as short as any draft, keeps what drafts keep, and the choice gains."""
    print("seed", seed)
    problem, drafts, _ = drafts_and_choice("dispatch-combine", seed)
    if bound:
        problem = problem.replace(previous=drafts[0], max_moves=9)
    ties = ties_of(problem)
    within = [d for d in drafts if not bound or moves(drafts[0], d) <= 9]
    judge, slow = (Judge(p, ties, None) for p in (problem, on_slower_links(problem, 100.0)))
    mixed = seconds_module._mixtures(judge, slow, [draft.slot_to_expert for draft in within])
    assert 1 <= len(mixed) <= len(seconds_module._MIXED_FOR)
    for slots_LS in mixed:
        for layer, row_S in enumerate(slots_LS):
            assert any(np.array_equal(row_S, draft.slot_to_expert[layer]) for draft in within)
        assert not bound or moves(drafts[0], problem.placement(slots_LS)) <= 9
    for slowness in (1.0, 3.0, 10.0, 30.0, 100.0):
        linked = on_slower_links(problem, slowness)
        best = min(linked.evaluate(problem.placement(slots_LS)).predicted_seconds for slots_LS in mixed)
        assert best <= min(linked.evaluate(draft).predicted_seconds for draft in within) * (1 + 1e-12)


def moves(before: Placement, after: Placement) -> int:
    """Most experts fetched in a layer."""
    return int((after.copies_LER & ~before.copies_LER).sum(axis=(1, 2)).max())


def on_slower_links(problem: Problem, times: float) -> Problem:
    """The same problem where links have so much less bandwidth."""
    cluster = problem.cluster
    links = {tier: Link(link.latency, link.bandwidth / times)
             for tier, link in {"intra": cluster.intra, "inter": cluster.inter}.items()}  # fmt: skip
    return problem.replace(cluster=cluster.replace(**links), calibration=None)


@pytest.mark.parametrize(("mode", "budget"), [("coherent", "per-layer"), ("dispatch-combine", "global")])
def test_layers_that_depend_on_each_other_are_not_mixed(
    mode: Any, budget: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coherent token stays where its experts of the layer before were; slots that layers share are used once."""
    problem, drafts, _ = drafts_and_choice("coherent", 0)
    problem = problem.replace(mode=mode, replica_budget=budget)
    given: list[Any] = []

    def use(problem: Any, found: Any, *rest: Any) -> Any:
        given.extend(found)
        return found[0], ""

    monkeypatch.setattr(seconds_module, "use_all_slots", use)
    fastest(problem, Budget(1e9), lambda *_: ([drafts[0].slot_to_expert], False))
    assert len(given) == len((*seconds_module._CAPS, "packing", "index order"))
    assert (Judge(problem, None, None).by_layer(given[0]) is None) == (mode == "coherent")


class Known:
    """A judge to whom drafts are numbers: places in a list of seconds."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def key(self, draft: Any) -> tuple[tuple[float, ...], float, float]:
        return (0.0,), self.seconds[draft], 0.0


@pytest.mark.parametrize(("longest", "chosen"), [(np.inf, 2), (1.015, 2), (1.008, 1), (1.0, 1), (0.9, 1)])
def test_what_slower_links_may_cost(longest: float, chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 %, but nothing longer than what is there already, except for what always counts as equal."""
    problem = drafts_and_choice("coherent", 0)[0]
    asked = SimpleNamespace(
        links_assumed=True, redundant_slots=np.zeros(1), placement=lambda draft: draft, trace=problem.trace
    )
    monkeypatch.setattr(seconds_module, "_regrets", lambda problem, trace, placements: -np.array(placements))
    judge = Known([1.0, 1.004, 1.012, 1.03])
    assert seconds_module._best(asked, problem.trace, judge, longest, [0, 1, 2, 3]) == chosen


@pytest.mark.parametrize("hardest", [None, 3.0])
def test_what_is_there_already(hardest: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index order, unless a cap may forbid it, and the placement in force."""
    problem, drafts, _ = drafts_and_choice("coherent", 0)
    given = []

    def best(problem: Any, trace: Any, judge: Any, longest: float, drafts: Any) -> Any:
        given.append(longest)
        return drafts[0]

    monkeypatch.setattr(seconds_module, "_best", best)
    seconds = [problem.evaluate(draft).predicted_seconds for draft in drafts]
    for previous in (None, *drafts[:4]):
        asked = problem.replace(previous=previous, max_imbalance=hardest)
        fastest(asked, Budget(1e9), lambda *_: ([drafts[0].slot_to_expert], False), ties_of(asked))
        staying = np.inf if previous is None else problem.evaluate(previous).predicted_seconds
        assert given[-1] == pytest.approx(min(staying, seconds[-1] if hardest is None else np.inf))


def test_a_price_in_seconds_is_one_in_traffic() -> None:
    """Searches see traffic alone: a second is worth the traffic that the placement in force has in one."""
    problem = skewed_problem(0, ranks=4, slots=1, objective="seconds", move_price=2e-6, trace={"tokens": 200})
    start = problem.placement(solve_index_order(problem, Budget(1.0)).slot_to_expert)
    tied = problem.replace(previous=start, expert_bytes=np.full((2, 4), 10.0))
    ties = ties_of(tied)
    priced = seconds_module._priced_in_traffic(tied, ties, 1e9)
    evaluation = problem.evaluate(start)
    per_second = evaluation.ranks_per_token / evaluation.predicted_seconds
    assert ties is not None
    assert priced is not None
    np.testing.assert_allclose(priced.price_LE, ties.price_LE * per_second)
    assert (priced.price_LE > 0).all()
    assert seconds_module._priced_in_traffic(tied, None, 1e9) is None
