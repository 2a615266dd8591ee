"""Predicted seconds and traffic worked out by hand: one example per mode, two nodes, unequal speeds, a topology."""

import networkx as nx
import numpy as np
import pytest

from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.gateways import gateways
from moeplace.placement.cost.prices import LinkPrices
from moeplace.placement.cost.seconds import transfer_seconds
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.objective import traffic
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.problem import Problem
from moeplace.profiling.traces.trace import RoutingTrace

NODES = np.array([0, 0, 1, 1])
CLUSTER = Cluster(NODES, np.full(4, 1), np.array([1.0, 1.0, 1.0, 0.5]), Link(1.0, 100.0), Link(3.0, 10.0))
SPEED = np.array([1.0, 1.0, 1.0, 0.5]) / 0.875
TIMES = Calibration(CLUSTER.intra, CLUSTER.inter, ExpertTime(fixed=5.0, per_token=2.0, per_activated=7.0), 11.0)
ROW = StepShape(batch=4, hidden_size=5, dtype_bytes=2, kv_dim=3)  # 4 x 5 x 2 = 40 bytes per copy per token, K/V 24
ONE_EACH = index_order(np.full(2, 4), np.full(4, 1), NODES)


def trace(*tokens: list[list[int]]) -> RoutingTrace:
    return RoutingTrace(np.array(tokens), np.full(len(tokens[0]), 4))


def test_dispatch_on_two_nodes() -> None:
    """Four tokens, top-2; experts e on rank e; home uniform.

    Layer 0: tokens {0,1} twice, {0,2}, {3,2}. Served by rank: 3, 2, 2, 1; by node: 3, 2 tokens of 4.
    Inside: rank 0 gets from its mate 3/4 tokens x 1/4 homes from rank 1 itself, and from homes 3 (whose gateway is 1)
    1/4: 2 x 1/4 x 3/4 = 3/8. Between: rank 0 is the gateway of home 2: 1/4 x 3/4 = 3/16 arrive.
    """
    tokens = trace([[0, 1]] * 2, [[0, 1]] * 2, [[0, 2]] * 2, [[3, 2]] * 2)
    result = evaluate(tokens, ONE_EACH, mode="dispatch-combine", cluster=CLUSTER, shape=ROW, calibration=TIMES)
    assert result.ranks_per_token == 2.0
    assert result.nodes_per_token == 1.25
    assert result.copies_per_token == pytest.approx(2 * 2 * 0.75)
    assert result.node_copies_per_token == pytest.approx(2 * 1.25 / 2)  # half of the homes are on the other node
    # Receiving inside nodes: 3, 2, 2, 1 tokens of 4 from half of the homes: rank 0 gets 3/8, the most; its mate sends
    # that. Between: gateways of node 0 get 3/4 x 1/4 each, of node 1 2/4 x 1/4; each rank sends what its own homes
    # want: ranks 2, 3 to node 0 3/16, the most.
    there = 3 / 8 * 40 / 100 + 3 / 16 * 40 / 10
    expert = 5.0 + max(3 * 2 + 7, 2 * 2 + 7, 2 * 2 + 7, (1 * 2 + 7) * 2) * 0.875
    assert result.predicted_seconds == pytest.approx(2 * (11.0 + 2 * 3.0 + 2 * there + expert))


def test_dispatch_with_replicas_counts_from_homes() -> None:
    """Token t is at home on rank t mod 2: where both ranks hold everything, nothing travels and each computes half."""
    both = Placement(np.array([[0, 1, 0, 1]]), np.full(2, 2), np.zeros(2, int), np.full(1, 2))
    tokens = RoutingTrace(np.array([[[0, 1]], [[1, 0]], [[0, 1]], [[1, 0]]]), np.full(1, 2))
    result = evaluate(tokens, both)
    assert (result.copies_per_token, result.node_copies_per_token, result.imbalance_mean) == (0.0, 0.0, 1.0)
    assert result.load_LR.tolist() == [[4, 4]]
    # Expert 1 on rank 1 only: the tokens of rank 0 (two of four) take it along.
    some = Placement(np.array([[0, -1, 0, 1]]), np.full(2, 2), np.zeros(2, int), np.full(1, 2))
    result = evaluate(tokens, some)
    assert result.copies_per_token == pytest.approx(2 * 2 / 4)
    assert result.ranks_per_token == 1.0


def test_coherent_moves_owners() -> None:
    """Two layers, top-1: token 0 goes 0 -> 1 (same node), 1 goes 0 -> 2 (other node), 2 and 3 stay on 3.

    First layer: the owner is uniform, so rank 0 gets half of the tokens from three others: 1/8 each. Boundary: 1/4 of
    the tokens from 0 to 1 and from 0 to 2. K/V: attended shares are 1/4 each, then 1/2, 0, 0, 1/2.
    """
    tokens = trace([[0], [1]], [[0], [2]], [[3], [3]], [[3], [3]])
    result = evaluate(tokens, ONE_EACH, mode="coherent", cluster=CLUSTER, shape=ROW, calibration=TIMES)
    assert (result.stay_rate, result.node_stay_rate) == (0.5, 0.75)
    assert (result.copies_per_token, result.node_copies_per_token) == (0.5, 0.25)
    assert result.collectives_per_layer == 1.0
    arrive = 1 / 8 * 40 / 100 + 2 / 8 * 40 / 10  # rank 0 (and 3): from the mate, from two ranks of the other node
    boundary = 1 / 4 * 40 / 100 + 1 / 4 * 40 / 10
    first = 5.0 + max(2 * 2 + 7, (2 * 2 + 7) * 2) * 0.875
    second = 5.0 + (2 * 2 + 7) * 2 * 0.875
    # Rows of K/V that ranks attend: 3/4, 1/4, 1/4, 3/4. Between nodes each goes to its gateway; inside, rank 0 passes
    # on its own 3/4 and the 1/4 that came from rank 2.
    kv = (3 / 4 + 1 / 4) * 24 / 100 + 3 / 4 * 24 / 10
    assert result.kv_bytes_per_token == 3 * 2 * 6
    seconds = 2 * 11.0 + 2 * 3.0 + arrive + boundary + first + second + 3.0 + kv
    assert result.predicted_seconds == pytest.approx(seconds)


def test_coherent_with_several_experts_returns_partial_sums() -> None:
    """Layer 0 {0,1}: owner 0 (lowest of equals), one partial sum. Layer 1 {1,2}: 0 sends to both, 1 is the owner."""
    result = evaluate(trace([[0, 1], [1, 2]]), ONE_EACH, mode="coherent", cluster=CLUSTER, shape=ROW, calibration=TIMES)
    assert result.copies_per_token == 3.0
    assert result.node_copies_per_token == 2.0  # to rank 2 and back
    assert result.collectives_per_layer == 2.0


def test_allgather_depends_on_balance_alone() -> None:
    """Every rank gets 3/4 of the batch, 1/4 from its mate and 2/4 from the other node, and gives as much back."""
    tokens = trace([[0], [0]], [[0], [1]])
    shape = StepShape(batch=6, hidden_size=5, dtype_bytes=2)
    result = evaluate(tokens, ONE_EACH, mode="allgather", cluster=CLUSTER, shape=shape, calibration=TIMES)
    assert result.copies_per_token == 2 * 3
    there = 1 / 4 * 60 / 100 + 2 / 4 * 60 / 10
    # The step has 6 tokens, the trace 2: tokens count threefold, activated experts do not.
    experts = 2 * 5.0 + (6 * 2 + 7) * 0.875 + (3 * 2 + 7) * 0.875
    assert result.predicted_seconds == pytest.approx(2 * (11.0 + 2 * 3.0 + 2 * there) + experts)


def test_the_busiest_direction_counts() -> None:
    """One rank that sends to all is as slow as one that receives from all; a node's shared link may be slower yet."""
    fan_out = np.zeros((4, 4))
    fan_out[0, 1:] = 1.0
    seconds = 1 / 100 + 2 / 10
    assert transfer_seconds(fan_out, CLUSTER, 1.0) == pytest.approx(seconds)
    assert transfer_seconds(fan_out.T, CLUSTER, 1.0) == pytest.approx(seconds)
    shared = CLUSTER.replace(inter=Link(3.0, 10.0, 4.0))
    assert transfer_seconds(fan_out, shared, 1.0) == pytest.approx(1 / 100 + 2 / 4)
    assert transfer_seconds(fan_out.T, shared, 1.0) == pytest.approx(1 / 100 + 2 / 4)


def test_gateways_take_turns() -> None:
    """Nodes of 3 and 2 ranks: place i of a node enters the other at place i modulo its ranks."""
    assert gateways(np.array([0, 0, 0, 1, 1])).tolist() == [[0, 3], [1, 4], [2, 3], [0, 3], [1, 4]]


def test_a_node_costs_what_crossing_costs_beyond_a_rank() -> None:
    """100 B/s inside and 10 between: a node costs 10 - 1 ranks; the other way round 1/10 - 1; one node nothing."""
    prices = LinkPrices.of(CLUSTER)
    assert prices.node_N == pytest.approx([9.0, 9.0])
    assert prices.rank_R.tolist() == [1.0] * 4
    assert prices.pair_RR[0] == pytest.approx([0, 1, 10, 10])
    swapped = CLUSTER.replace(intra=CLUSTER.inter, inter=CLUSTER.intra)
    assert LinkPrices.of(swapped).node_N == pytest.approx([-0.9, -0.9])
    assert LinkPrices.of(Cluster.uniform(4, slots_per_rank=1)).node_N.tolist() == [0.0]
    tokens = trace([[0, 1]] * 2, [[0, 2]] * 2)
    problem = Problem.from_trace(tokens, CLUSTER, objective="traffic")
    assert traffic(problem, problem.evaluate(ONE_EACH)) == pytest.approx(2 + 9 * 1.5)


def line() -> "nx.Graph[str]":
    """Three GPUs in a row: 0 - 1 fast, 1 - 2 at a tenth of it."""
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(["a", "b", "c"], kind="gpu")
    graph.add_edge("a", "b", bandwidth=100.0, latency=1.0)
    graph.add_edge("b", "c", bandwidth=10.0, latency=1.0)
    return graph


def test_distances_of_a_topology_steer_every_cost() -> None:
    """Seconds per byte: a-b 0.01, b-c 0.1, a-c 0.11. The pair b-c costs ten times a-b, wherever it is counted."""
    cluster = Cluster.from_graph(line(), slots_per_rank=1)
    assert cluster.seconds_per_byte_RR == pytest.approx(np.array([[0, 1, 11], [1, 0, 10], [11, 10, 0]]) / 100)
    assert cluster.cost_RR == pytest.approx(np.array([[0, 1, 11], [1, 0, 10], [11, 10, 0]]))
    copies = np.array([[0, 2, 0], [0, 0, 3], [1, 0, 0]])
    # Sent: 2 x .01, 3 x .1, 1 x .11. Received: 1 x .11, 2 x .01, 3 x .1.
    assert transfer_seconds(copies, cluster, 7.0) == pytest.approx(0.3 * 7)
    near, far = (trace_of([0], [1]), trace_of([0], [2]))
    placement = index_order(np.full(2, 3), np.full(3, 1), np.zeros(3, int), mode="coherent")
    shape = StepShape(batch=1, hidden_size=1, dtype_bytes=1, kv_dim=0)
    seconds, paid = [], []
    for tokens in (near, far):
        problem = Problem.from_trace(tokens, cluster, mode="coherent", objective="traffic", shape=shape)
        result = problem.evaluate(placement)
        seconds.append(result.predicted_seconds)
        paid.append(traffic(problem, result))
    assert seconds[1] - seconds[0] == pytest.approx(0.11 - 0.01)  # nothing but the boundary differs
    assert paid[1] / paid[0] == pytest.approx(11.0)
    measured = Calibration(Link(0.0, 20.0)).apply(cluster)  # the farthest pair at 20 B/s instead of 9.09
    assert measured.seconds_per_byte_RR[0, 2] == pytest.approx(1 / 20)
    assert measured.seconds_per_byte_RR[0, 1] == pytest.approx(1 / 220)
    served = Problem.from_trace(far, cluster, objective="traffic").prices.rank_R
    mean = (1 + 11 + 10) / 3
    assert served == pytest.approx(np.array([(1 + 11) / 2, (1 + 10) / 2, (11 + 10) / 2]) / mean)


def trace_of(*layers: list[int]) -> RoutingTrace:
    return RoutingTrace(np.array([[[e] for e in column] for column in zip(*layers, strict=True)]), np.full(2, 3))


def test_uniform_topologies_cost_what_two_tiers_cost() -> None:
    """A star of equal links is one tier: every figure as with flags."""
    graph: nx.Graph[str] = nx.Graph()
    for node in "xy":
        for rank in "12":
            graph.add_node(node + rank, kind="gpu", node=node)
            graph.add_edge(node + rank, node, bandwidth=200.0, latency=0.5)
    graph.add_edge("x", "y", bandwidth=1 / (1 / 10 - 1 / 100), latency=2.0)
    drawn = Cluster.from_graph(graph, slots_per_rank=1)
    flags = CLUSTER.replace(speed_of_rank=np.ones(4))
    tokens = trace([[0, 1], [1, 2]], [[3, 1], [0, 2]])
    for mode in ("dispatch-combine", "coherent", "allgather"):
        ours, theirs = (
            Problem.from_trace(tokens, cluster, mode=mode, objective="traffic") for cluster in (drawn, flags)
        )
        one, other = ours.evaluate(ONE_EACH), theirs.evaluate(ONE_EACH)
        assert one.predicted_seconds == pytest.approx(other.predicted_seconds)
        assert traffic(ours, one) == pytest.approx(traffic(theirs, other))


def test_a_rank_alone_on_its_node_costs_what_entering_the_node_costs() -> None:
    """a and b share a node, c is alone on another: seconds per byte .01 inside, .1 and .11 across, unit .01.

    The node of a and b is entered at 11 or 10, that of c at 11 or 10 as well: 10.5 each in the mean, of which the rank
    behind pays 1.
    """
    graph = line()
    for gpu, node in (("a", "x"), ("b", "x"), ("c", "y")):
        graph.nodes[gpu]["node"] = node
    prices = LinkPrices.of(Cluster.from_graph(graph, slots_per_rank=1))
    assert prices.pair_RR == pytest.approx(np.array([[0, 1, 11], [1, 0, 10], [11, 10, 0]]))
    assert prices.rank_R.tolist() == [1.0, 1.0, 1.0]
    assert prices.node_N == pytest.approx([9.5, 9.5])
