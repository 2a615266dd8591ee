"""`objective="seconds"`: the shortest predicted step, and of those as short the one with least traffic or regret."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import moeplace.placement.solvers.seconds as seconds_module
from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.objective import traffic
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.search.ties import ties_of
from moeplace.placement.solvers.index_order import solve_index_order
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
    drafts = [*given, solve_lpt(problem, budget).slot_to_expert, solve_index_order(problem, budget).slot_to_expert]
    return problem, [problem.placement(draft) for draft in drafts], problem.placement(chosen)


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
