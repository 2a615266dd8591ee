"""Layers searched elsewhere: the placement is the one that a search here finds."""

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from moeplace.placement.budget import Budget
from moeplace.placement.cost.replica_rule import get_rule
from moeplace.placement.solve import solve
from moeplace.placement.solvers.schedule import search_layers
from tests.placement.instances import skewed_problem
from tests.placement.random_placements import random_placement
from tests.seeds import TODAY

TRACE = {"tokens": 200, "layers": 3, "experts": 16, "top_k": 2}


class Elsewhere:
    """Pickles what it is given, and takes the items in another order."""

    def __init__(self, slow: Callable[[], None] = lambda: None) -> None:
        self.items: list[Any] = []
        self.slow = slow

    def __call__(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any], report: Callable[[float], None]
    ) -> list[Any]:
        answers = {}
        for item in reversed(items):
            there, its_shared, its_item = pickle.loads(pickle.dumps((function, shared, item)))
            answers[item] = pickle.loads(pickle.dumps(there(its_shared, its_item)))
        self.items += items
        self.slow()
        report(1.0)
        return [answers[item] for item in items]


def options(name: str, seed: int) -> dict[str, Any]:
    """A kind of problem whose layers are searched one by one."""
    previous = random_placement(
        np.random.default_rng(seed), layers=3, experts=16, slots_of_rank=[4] * 4, node_of_rank=[0, 0, 1, 1]
    )
    return {
        "plain": {},
        "capped": {"max_imbalance": 1.1},
        "replicas": {"slots": 5},
        "drawn": {"slots": 5, "replica_rule": get_rule("nearest-static"), "max_imbalance": 1.2},
        "global": {"slots": 5, "replica_budget": "global"},
        "previous": {"previous": previous, "max_moves": 2},
        "seconds": {"objective": "seconds"},
        "coherent": {"mode": "coherent"},
    }[name]


@pytest.mark.usefixtures("still_clock")
@pytest.mark.parametrize("seed", [0, TODAY])
@pytest.mark.parametrize("name", ["plain", "capped", "replicas", "drawn", "global", "previous", "seconds", "coherent"])
def test_what_is_found_elsewhere_is_what_is_found_here(name: str, seed: int) -> None:
    """Whatever is solved, in whatever order layers are searched, on whatever number of workers."""
    problem = skewed_problem(
        seed, **{"ranks": 4, "slots": 4, "ranks_per_node": 2, "trace": TRACE, **options(name, seed)}
    )
    elsewhere = Elsewhere()
    here = solve(problem, time_limit=0.05, seed=seed)
    there = solve(problem, time_limit=0.05, seed=seed, spread=elsewhere)
    assert set(elsewhere.items) == {0, 1, 2}
    assert there.placement.slot_to_expert.tolist() == here.placement.slot_to_expert.tolist()
    assert (there.objective, there.status, there.notes) == (here.objective, here.status, here.notes)


def test_the_wait_for_workers_does_not_count() -> None:
    """What a cluster takes beyond the share of the search is not taken from what comes after it."""
    now = [0.0]

    class Clocked(Budget):
        @property
        def elapsed(self) -> float:
            return now[0] - sum(self.waited)

    def wait() -> None:
        now[0] += 100.0

    problem = skewed_problem(0, ranks=4, slots=4, trace=TRACE)
    budget = Clocked(1.0, spread=Elsewhere(wait))
    search_layers(problem, budget, None, 0.6)
    assert budget.elapsed == pytest.approx(0.6)
    assert not budget.expired
