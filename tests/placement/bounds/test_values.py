"""Bounds on seconds worked out by hand: links cost next to nothing, or all but one term does."""

import os
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest

from moeplace.placement.bounds import layers
from moeplace.placement.bounds.layers import THREADS
from moeplace.placement.bounds.problem import problem_bounds
from moeplace.placement.bounds.relaxation import _cap_to_sum
from moeplace.placement.bounds.seconds import _most_at_home
from moeplace.placement.bounds.traffic import _complement_spectrum
from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.placement import index_order
from moeplace.placement.problem import Problem
from moeplace.profiling.traces.trace import RoutingTrace

FREE = Link(0.0, 1e30)
WORK = Calibration(FREE, FREE, ExpertTime(fixed=5.0, per_token=2.0, per_activated=1.0))


def expert_bound(ids: list[int], cluster: Cluster, experts: int, batch: int) -> float:
    """The bound of one layer whose experts alone take time."""
    trace = RoutingTrace(np.array(ids)[:, None, None], np.full(1, experts))
    problem = Problem.from_trace(trace, cluster, mode="allgather", shape=StepShape(batch=batch), calibration=WORK)
    return problem_bounds(problem, time_limit=1.0)["seconds"]


def test_each_step_has_its_own_slowest_rank() -> None:
    """Speeds 1/2 and 3/2; step 0 has one token for each of four experts, step 1 five tokens, all for expert 0.

    Step 0 is 4 x (2 + 1) = 12 of work on speed 2: 6, more than 3 on the fast rank. In step 1 it is 5 x 2 + 1 = 11 of
    one expert on the fast rank: 22/3, more than 11 on both. The mean step alone would say 11.5 / 2.
    """
    cluster = Cluster.uniform(2, slots_per_rank=2).replace(speed_of_rank=np.array([0.5, 1.5]))
    lanes = [0, 0, 1, 0, 2, 0, 3, 0]  # token lane * 2 + step
    first = expert_bound(lanes, cluster, 4, 4)
    assert first == pytest.approx(5 + (6 + (4 * 2 + 1) / 1.5) / 2)
    assert first > 5 + (12 + 9) / 2 / 2


def test_the_mean_step_has_a_busiest_rank() -> None:
    """Three equal experts on 2 + 1 slots: two meet, which no single expert and no sum of work tells."""
    cluster = Cluster.uniform(2, slots_per_rank=[2, 1])
    assert expert_bound([0, 1, 2], cluster, 3, 3) == pytest.approx(5 + 2 * (2 + 1))
    # A step of 6 tokens of which the trace has 3: each counts twice, the expert is activated once.
    assert expert_bound([0, 1, 2], cluster, 3, 6) == pytest.approx(5 + 2 * (2 * 2 + 1))


@pytest.mark.parametrize("batch", [1, 4])
def test_keys_and_values_of_a_topology_reach_every_rank(batch: int) -> None:
    """Three GPUs, two layers, every token owned in both: 2 x 2 copies, at a third of the best link's seconds each.

    Where all links are alike and owners are spread evenly the bound is what the placement costs.
    """
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from("abc", kind="gpu")
    for pair in ("ab", "bc", "ac"):
        graph.add_edge(*pair, bandwidth=100.0, latency=0.0)
    cluster = Cluster.from_graph(graph, slots_per_rank=1)
    trace = RoutingTrace(np.array([[[e], [e]] for e in (0, 1, 2)]), np.full(2, 3))
    shape = StepShape(batch=batch, hidden_size=1, dtype_bytes=2, kv_dim=10**6)
    free = Calibration(cluster.intra, cluster.inter, ExpertTime(0.0, 0.0, 0.0))
    problem = Problem.from_trace(trace, cluster, mode="coherent", shape=shape, calibration=free)
    bound = problem_bounds(problem, time_limit=1.0)["seconds"]
    assert bound == pytest.approx(2 * 2 * batch * 2e6 / 100 / 3, rel=1e-5)
    placed = problem.evaluate(index_order(np.full(2, 3), np.full(3, 1), np.zeros(3, int), mode="coherent"))
    assert placed.predicted_seconds == pytest.approx(bound, rel=1e-5)


def test_keys_and_values_cross_to_every_node() -> None:
    """Four GPUs on two nodes, one layer: of 3 copies per token one crosses, at the best pair's price each."""
    graph: nx.Graph[str] = nx.Graph()
    for gpu, node in zip("abcd", "xxyy", strict=True):
        graph.add_node(gpu, kind="gpu", node=node)
        graph.add_edge(gpu, node + "0", bandwidth=200.0, latency=0.0)
    graph.add_edge("x0", "y0", bandwidth=20.0, latency=0.0)
    cluster = Cluster.from_graph(graph, slots_per_rank=1)
    inside, across = 1 / 200 + 1 / 200, 1 / 200 + 1 / 20 + 1 / 200
    trace = RoutingTrace(np.array([[[e]] for e in range(4)]), np.full(1, 4))
    shape = StepShape(batch=1, hidden_size=1, dtype_bytes=1, kv_dim=10**7)
    free = Calibration(cluster.intra, cluster.inter, ExpertTime(0.0, 0.0, 0.0))
    problem = Problem.from_trace(trace, cluster, mode="coherent", shape=shape, calibration=free)
    bound = problem_bounds(problem, time_limit=1.0)["seconds"]
    assert bound == pytest.approx((2 * inside + across) * 1e7 / 4, rel=1e-5)
    placed = problem.evaluate(index_order(np.full(1, 4), np.full(4, 1), cluster.node_of_rank, mode="coherent"))
    assert placed.predicted_seconds >= bound


@pytest.mark.parametrize("size", [2, 5, 9])
def test_the_spectrum_beside_equal_entries(size: int) -> None:
    """Of a doubly centred matrix, on the vectors that sum to 0: all eigenvalues but the 0 of equal entries, falling."""
    rng = np.random.default_rng(size)
    matrix = rng.normal(size=(size, size))
    centre = np.eye(size) - 1 / size
    basis = np.linalg.qr(np.column_stack([np.ones(size), rng.normal(size=(size, size - 1))]))[0][:, 1:]
    expected = np.linalg.eigvalsh(basis.T @ (matrix + matrix.T) @ basis)[::-1]
    assert _complement_spectrum(centre @ (matrix + matrix.T) @ centre) == pytest.approx(expected)


@pytest.mark.parametrize(("slots", "share"), [(1, 0.5), ([1, 2], 0.75), (2, 1.0)])
def test_an_expert_is_at_home_on_one_rank_and_on_one_more_by_replica(slots: int | list[int], share: float) -> None:
    """Two experts, each asked for once from either rank."""
    trace = RoutingTrace(np.array([0, 0, 1, 1])[:, None, None], np.full(1, 2))
    assert _most_at_home(Problem.from_trace(trace, Cluster.uniform(2, slots_per_rank=slots)), trace, 0) == share


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_entries_within_limits_that_sum_to_so_much(seed: int) -> None:
    """All are lowered by the same, but for those that end at a limit."""
    rng = np.random.default_rng(seed)
    values, top = rng.normal(rng.integers(-3, 4), 2.0, 9), 1.5
    total = float(rng.uniform(1, 12))
    found = _cap_to_sum(values, top, total)
    assert found.sum() == pytest.approx(total)
    assert ((found >= 0) & (found <= top)).all()
    inside = (found > 1e-9) & (found < top - 1e-9)
    tau = float((values - found)[inside].mean())
    assert found == pytest.approx(np.clip(values - tau, 0, top))


def test_bounds_take_no_more_threads_than_cores() -> None:
    assert 1 <= THREADS <= (os.cpu_count() or 1)


@pytest.mark.parametrize("slowness", [0.2, 1.0, 4.0])
def test_a_busy_machine_gives_no_layer_nothing(slowness: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten layers, time for 200 iterations each: on a machine four times as slow all have some, within the time."""
    now, given = [0.0], []

    class Timed:
        relaxable, seconds_per_iteration = True, 0.01

        def relax(self, iterations: int, deadline: float) -> None:
            now[0] += 0.01 * slowness * iterations
            given.append(iterations)

    monkeypatch.setattr(layers, "THREADS", 1)
    monkeypatch.setattr(layers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    layers._relax([Timed() for _ in range(10)], 20.0)
    assert len(given) == 10
    assert min(given) >= layers.FEWEST_ITERATIONS
    assert now[0] <= 20.0 * 1.01
    assert max(given) > 200 or slowness >= 1
