"""Survival on several nodes: feasible exactly when some way is found by trying all; layers are what they must be."""

import itertools

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.search.spreading import fill_and_balance, held_on_nodes
from moeplace.profiling.errors import InfeasibleError
from tests.seeds import TODAY


def some_way(experts: int, replicas: int, slots: list[int], nodes: list[int]) -> bool:
    """Whether experts can be placed one after another, every set of ranks tried."""
    wanted = min(replicas, nodes[-1] + 1)
    sets = [
        ranks
        for ranks in itertools.combinations(range(len(slots)), replicas)
        if len({nodes[r] for r in ranks}) >= wanted
    ]

    def place(left: int, room: tuple[int, ...], first: int) -> bool:
        if not left:
            return True
        for number in range(first, len(sets)):  # experts are alike: sets in rising order
            if all(room[r] for r in sets[number]):
                less = tuple(count - (r in sets[number]) for r, count in enumerate(room))
                if place(left - 1, less, number):
                    return True
        return False

    return place(experts, tuple(slots), 0)


def shape(seed: int) -> tuple[int, int, list[int], list[int]]:
    """Few experts, ranks with unequal slots, nodes of unequal size; about as many slots as are needed."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    experts, replicas, ranks = int(rng.integers(2, 6)), int(rng.integers(2, 4)), int(rng.integers(3, 7))
    nodes = np.sort(rng.integers(0, 3, ranks))
    slots = rng.integers(1, experts + 1, ranks)
    while slots.sum() < experts * replicas:
        slots[int(slots.argmin())] += 1
    return experts, replicas, np.minimum(slots, experts).tolist(), np.unique(nodes, return_inverse=True)[1].tolist()


@pytest.mark.parametrize("seed", [*range(150), TODAY])
def test_feasible_exactly_when_some_way_is(seed):
    experts, replicas, slots, nodes = shape(seed)
    possible = sum(slots) >= experts * replicas and some_way(experts, replicas, slots, nodes)
    held_ER = held_on_nodes(experts, replicas, np.array(slots), np.array(nodes))
    assert (held_ER is not None) == possible
    if held_ER is None:
        return
    assert (held_ER.sum(axis=1) == replicas).all()
    assert (held_ER.sum(axis=0) <= slots).all()
    load_E = np.random.default_rng(seed).random(experts)
    row_S = fill_and_balance(held_ER, load_E, np.array(slots), np.array(nodes))
    check_row(row_S, experts, replicas, slots, nodes)


def check_row(row_S: np.ndarray, experts: int, replicas: int, slots: list[int], nodes: list[int]) -> None:
    rank_S = np.repeat(np.arange(len(slots)), slots)
    for e in range(experts):
        ranks = rank_S[row_S == e].tolist()
        assert len(ranks) == len(set(ranks)) >= replicas
        assert len({nodes[r] for r in ranks}) >= min(replicas, nodes[-1] + 1)


@pytest.mark.parametrize("seed", [*range(40), TODAY])
def test_packing_finds_what_there_is(seed):
    """`pack_slots` refuses exactly what is infeasible, in one sentence."""
    experts, replicas, slots, nodes = shape(seed)
    load = np.random.default_rng(seed).integers(1, 50, (1, experts)).astype(float)
    cluster = Cluster(np.array(nodes), np.array(slots), np.ones(len(slots)))
    possible = some_way(experts, replicas, slots, nodes)
    try:
        problem = Problem.from_load(load, cluster, survive=replicas - 1)
        row_S = pack_slots(problem, 0)
    except InfeasibleError:
        assert not possible
        return
    assert possible
    check_row(row_S, experts, replicas, slots, nodes)


def test_the_layer_that_swaps_could_not_mend():
    """Five experts on two nodes each, ranks of 3, 3, 2, 4 and 1 slots on nodes 0, 0, 1, 2, 2."""
    cluster = Cluster(np.array([0, 0, 1, 2, 2]), np.array([3, 3, 2, 4, 1]), np.ones(5))
    problem = Problem.from_load(np.array([[9.0, 5.0, 3.0, 2.0, 1.0]]), cluster, survive=1)
    check_row(pack_slots(problem, 0), 5, 2, [3, 3, 2, 4, 1], [0, 0, 1, 2, 2])
