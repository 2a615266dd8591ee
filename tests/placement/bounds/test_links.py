"""Bounds against every placement, under links of all kinds: slower inside than between nodes too, and topologies."""

import itertools
from typing import Any

import networkx as nx
import numpy as np
import pytest

from moeplace.placement.bounds.problem import problem_bounds
from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration as Times
from moeplace.placement.cost.calibration import ExpertTime
from moeplace.placement.cost.replica_rule import get_rule
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.modes import MODES, Mode
from moeplace.placement.objective import measure
from moeplace.placement.problem import Problem
from tests.placement.instances import skewed_trace
from tests.placement.oracles import layer_rows
from tests.placement.random_placements import random_placement
from tests.seeds import FIXED_AND_TODAY

SLACK = 1e-9


def random_topology(rng: np.random.Generator, nodes: list[int]) -> "nx.Graph[Any]":
    """GPUs on a random tree of switches, with some further links."""
    graph: nx.Graph[Any] = nx.Graph()
    for rank, node in enumerate(nodes):
        graph.add_node(f"gpu{rank}", kind="gpu", node=node)
    graph.add_nodes_from(f"switch{node}" for node in set(nodes))
    for rank, node in enumerate(nodes):
        graph.add_edge(f"gpu{rank}", f"switch{node}", bandwidth=float(10 ** rng.uniform(8, 11)))
    for a, b in itertools.pairwise(sorted(set(nodes))):
        graph.add_edge(f"switch{a}", f"switch{b}", bandwidth=float(10 ** rng.uniform(8, 11)))
    for a, b in itertools.combinations(range(len(nodes)), 2):
        if rng.random() < 0.2:
            graph.add_edge(f"gpu{a}", f"gpu{b}", bandwidth=float(10 ** rng.uniform(8, 11)))
    return graph


def random_cluster(rng: np.random.Generator, slots: int) -> Cluster:
    """One to three nodes of unequal sizes, links of any order of magnitude, or a topology."""
    nodes = [[0, 0, 0], [0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 2], [0, 1, 2]][rng.integers(5)]
    sizes = np.full(len(nodes), slots)
    if rng.random() < 0.4:
        return Cluster.from_graph(random_topology(rng, nodes), slots_per_rank=sizes.tolist())
    intra, inter = (Link(1e-6, float(10 ** rng.uniform(8, 11))) for _ in range(2))
    if rng.random() < 0.5:
        inter = Link(2e-6, inter.bandwidth, float(inter.bandwidth * rng.uniform(0.6, 3)))
    return Cluster(np.array(nodes), sizes, rng.uniform(0.5, 1.5, len(nodes)), intra, inter)


def random_problem(rng: np.random.Generator) -> Problem:
    cluster = random_cluster(rng, int(rng.integers(2, 4)))
    experts = int(rng.integers(max(3, cluster.num_ranks), min(cluster.num_slots, 6) + 1))
    trace = skewed_trace(
        int(rng.integers(10**6)), tokens=24, layers=int(rng.integers(1, 3)), experts=experts,
        top_k=int(rng.integers(1, 4)), ragged=float(rng.choice([0.0, 0.4])),
    )  # fmt: skip
    return Problem.from_trace(
        trace, cluster, mode=MODES[rng.integers(3)], objective="traffic",
        shape=StepShape(batch=int(rng.choice([1, 6, 64])), hidden_size=256),
        calibration=Times(cluster.intra, cluster.inter, ExpertTime(1e-6, 1e-7, 1e-6)),
        replica_rule=get_rule(["moeplace", "balanced", "nearest-static", "random", "hash"][rng.integers(5)]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_no_placement_costs_less_than_its_bounds(seed: int) -> None:
    """Traffic, seconds and imbalance, every mode and replica rule, replicas or none."""
    rng = np.random.default_rng(seed)
    for number in range(25):
        problem = random_problem(rng)
        cluster = problem.cluster
        bounds = problem_bounds(problem, time_limit=0.05)
        for _ in range(30):
            placement = random_placement(
                rng, layers=problem.num_layers, experts=problem.num_experts,
                slots_of_rank=cluster.slots_of_rank.tolist(), node_of_rank=cluster.node_of_rank.tolist(),
                fill=float(rng.choice([0.0, 0.5, 1.0])),
            )  # fmt: skip
            values = measure(problem, placement)[2]
            for name, bound in bounds.items():
                assert values[name] >= bound - SLACK * max(1.0, abs(bound)), f"case {number}: {name}, {problem}"


def test_links_slower_inside_than_between_nodes() -> None:
    """8 experts, top-2, 2 x 2 ranks, 1e9 B/s inside and 1e10 between: none of 400 placements is below the bound."""
    cluster = Cluster.uniform(4, slots_per_rank=2, ranks_per_node=2, intra=Link(1e-6, 1e9), inter=Link(1e-6, 1e10))
    for mode in ("dispatch-combine", "coherent"):
        trace = skewed_trace(0, tokens=60, layers=1 if mode == "dispatch-combine" else 2, experts=8, top_k=2)
        problem = Problem.from_trace(trace, cluster, mode=mode, objective="traffic")  # type: ignore[arg-type]
        assert problem.node_weight == pytest.approx(-0.9)
        bound = problem_bounds(problem, time_limit=30.0)["traffic"]
        rng = np.random.default_rng(0)
        rows = layer_rows(problem, 0)
        chosen = [rows[i] for i in rng.integers(0, len(rows), 400)]
        best = min(measure(problem, problem.placement(np.stack([row] * problem.num_layers)))[1] for row in chosen)
        assert 0 < bound <= best + SLACK
        assert bound >= 0.2 * best


@pytest.mark.parametrize(("mode", "top_k", "per_node", "traffic", "seconds"), [
    ("dispatch-combine", 4, 4, 2.3913, 1.57e-4),
    ("dispatch-combine", 4, 2, 16.801, 1.136e-3),
    ("coherent", 1, 4, 0.5015, 1.21e-4),
    ("coherent", 1, 2, 3.2003, 5.32e-4),
    ("coherent", 3, 4, 2.0517, 1.36e-4),
])  # fmt: skip
def test_floors_under_the_bounds(mode: Mode, top_k: int, per_node: int, traffic: float, seconds: float) -> None:
    """What bounds prove on fixed instances of 16 experts on 4 ranks; a weaker bound is a loss."""
    trace = skewed_trace(1, tokens=400, layers=2, experts=16, top_k=top_k)
    cluster = Cluster.uniform(4, slots_per_rank=4, ranks_per_node=per_node)
    if per_node == 2:
        cluster = cluster.replace(intra=Link(1e-5, 1e10), inter=Link(2e-5, 1e9))
    problem = Problem.from_trace(trace, cluster, mode=mode, objective="traffic")
    bounds = problem_bounds(problem, time_limit=30.0)  # as many iterations as help, however busy the machine
    assert bounds["traffic"] >= 0.995 * traffic
    assert bounds["seconds"] >= 0.99 * seconds


@pytest.mark.parametrize(("mode", "top_k", "per_node", "cap", "traffic"), [
    ("dispatch-combine", 4, 4, None, 1.9781),
    ("dispatch-combine", 4, 2, None, 15.389),
    ("coherent", 1, 4, None, 0.3825),
    ("coherent", 1, 2, None, 1.575),
    ("coherent", 3, 4, None, 1.6737),
])  # fmt: skip
def test_floors_under_the_closed_forms(
    mode: Mode, top_k: int, per_node: int, cap: float | None, traffic: float
) -> None:
    """The same instances without any time: what is proven at once."""
    trace = skewed_trace(1, tokens=400, layers=2, experts=16, top_k=top_k)
    cluster = Cluster.uniform(4, slots_per_rank=4, ranks_per_node=per_node)
    if per_node == 2:
        cluster = cluster.replace(intra=Link(1e-5, 1e10), inter=Link(2e-5, 1e9))
    problem = Problem.from_trace(trace, cluster, mode=mode, objective="traffic", max_imbalance=cap)
    assert problem_bounds(problem, time_limit=0.0)["traffic"] >= 0.999 * traffic


@pytest.mark.parametrize(("mode", "top_k", "slots", "gaps"), [
    ("dispatch-combine", 2, 4, {"traffic": 0.001, "seconds": 0.005, "imbalance": 0.007}),
    ("dispatch-combine", 3, 4, {"traffic": 0.045, "seconds": 0.008, "imbalance": 0.0}),
    ("dispatch-combine", 2, 5, {"traffic": 0.058, "seconds": 0.095, "imbalance": 0.0}),
    ("coherent", 1, 4, {"traffic": 0.07, "seconds": 0.004, "imbalance": 0.007}),
])  # fmt: skip
def test_ceilings_over_the_gaps(mode: Mode, top_k: int, slots: int, gaps: dict[str, float]) -> None:
    """8 experts on 2 ranks, every placement tried: how far the bounds are from the optimum."""
    trace = skewed_trace(4, tokens=300, layers=2 if mode == "coherent" else 1, experts=8, top_k=top_k)
    problem = Problem.from_trace(trace, Cluster.uniform(2, slots_per_rank=slots), mode=mode, objective="traffic")
    rows = [layer_rows(problem, layer, fill=True) for layer in range(problem.num_layers)]
    rows[0] = [row for row in rows[0] if 0 in row[:slots]]  # ranks are alike
    bounds, best = problem_bounds(problem, time_limit=30.0), dict.fromkeys(gaps, np.inf)
    for chosen in itertools.product(*rows):
        values = measure(problem, problem.placement(np.stack(chosen)))[2]
        best = {name: min(best[name], values[name]) for name in best}
    for name, most in gaps.items():
        assert 0 <= 1 - bounds[name] / best[name] + SLACK <= most + 2 * SLACK, name
