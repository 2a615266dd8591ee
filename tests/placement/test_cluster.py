"""Cluster: from flags, TOML and graphs; at the limit it passes, one beyond it says why not."""

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from moeplace.placement.cluster import INTRA_NODE, Cluster, Link, even_slots
from moeplace.placement.cost.prices import LinkPrices
from moeplace.profiling.errors import FormatError, InputError


@pytest.mark.parametrize(("experts", "ranks", "slots"), [
    (8, 4, [2, 2, 2, 2]), (9, 4, [3, 2, 2, 2]), (3, 4, [1, 1, 1, 0]), (7, 3, [3, 2, 2]),
])  # fmt: skip
def test_slots_are_even(experts: int, ranks: int, slots: list[int]) -> None:
    """The first ranks take the rest."""
    assert even_slots(experts, ranks).tolist() == slots


@pytest.mark.parametrize(("fields", "message"), [
    ({"node_of_rank": []}, "at least one rank"),
    ({"node_of_rank": [1, 1]}, "consecutive blocks"),
    ({"node_of_rank": [0, 2]}, "consecutive blocks"),
    ({"node_of_rank": [0, 1, 0], "slots_of_rank": [1] * 3, "speed_of_rank": [1] * 3}, "consecutive blocks"),
    ({"slots_of_rank": [1]}, "slots per rank"),
    ({"slots_of_rank": [0, 0]}, "slots per rank"),
    ({"slots_of_rank": [2, -1]}, "slots per rank"),
    ({"speed_of_rank": [1.0, 0.0]}, "relative speeds"),
    ({"speed_of_rank": [1.0]}, "relative speeds"),
    ({"distance_RR": [[0, 1], [1, 1]]}, "zero diagonal"),
    ({"distance_RR": [[0, -1], [1, 0]]}, "non-negative"),
    ({"distance_RR": [[0.0]]}, "distances must be"),
])  # fmt: skip
def test_what_is_no_cluster(fields: dict[str, Any], message: str) -> None:
    """Every rule by its sentence."""
    valid: dict[str, Any] = {"node_of_rank": [0, 0], "slots_of_rank": [1, 0], "speed_of_rank": [1.0, 2.0]}
    assert Cluster(**{name: np.array(value) for name, value in valid.items()}).speed_of_rank.mean() == 1.0
    with pytest.raises(InputError, match=message):
        Cluster(**{name: np.array(value) for name, value in {**valid, **fields}.items()})


@pytest.mark.parametrize("values", [(-1e-9, 1.0), (0.0, 0.0), (0.0, 1.0, 0.0), (0.0, -1.0)])
def test_what_is_no_link(values: tuple[float, ...]) -> None:
    """Latency may be 0, bandwidth may not."""
    assert Link(0.0, 1e-9).node_bandwidth == np.inf
    with pytest.raises(InputError, match="link"):
        Link(*values)


def test_uniform_clusters() -> None:
    """Nodes of equal size; slots for all or one number each."""
    cluster = Cluster.uniform(6, slots_per_rank=[1, 2, 3, 1, 2, 3], ranks_per_node=3)
    assert cluster.node_of_rank.tolist() == [0, 0, 0, 1, 1, 1]
    assert (cluster.num_ranks, cluster.num_nodes, cluster.num_slots) == (6, 2, 12)
    assert cluster.rank_of_slot.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5]
    assert Cluster.uniform(1, slots_per_rank=1).num_nodes == 1
    for ranks, options, message in (
        (0, {"slots_per_rank": 1}, "at least 1"),
        (6, {"slots_per_rank": 1, "ranks_per_node": 4}, "multiple of ranks per node"),
        (6, {"slots_per_rank": 1, "ranks_per_node": 0}, "multiple of ranks per node"),
        (6, {"slots_per_rank": [1] * 5}, "lists 5 numbers"),
    ):
        with pytest.raises(InputError, match=message):
            Cluster.uniform(ranks, **options)  # type: ignore[arg-type]


def test_costs_of_two_tiers() -> None:
    """A byte between nodes costs what its rank's share of the node's link allows, in units of the cheapest pair."""
    cluster = Cluster(np.array([0, 0, 1]), np.ones(3), np.ones(3), Link(0, 100.0), Link(0, 50.0, 40.0))
    # Two ranks share 40 B/s: 20 each. One rank has 40.
    assert cluster.seconds_per_byte_RR == pytest.approx(
        np.array([[0, 1 / 100, 1 / 20], [1 / 100, 0, 1 / 20], [1 / 40, 1 / 40, 0]])
    )
    assert cluster.cost_RR[0].tolist() == pytest.approx([0, 1, 5])
    assert Cluster.uniform(1, slots_per_rank=1).cost_RR.tolist() == [[0.0]]


def test_toml(tmp_path: Path) -> None:
    """What the docstring shows; what is wrong is named."""
    path = tmp_path / "c.toml"
    text = "ranks_per_node = [2, 1]\nslots_per_rank = 3\nspeed = [1.0, 1.0, 2.0]\n"
    text += "[inter]\nlatency = 1e-3\nbandwidth = 5e9\n"
    path.write_text(text)
    cluster = Cluster.from_toml(path)
    assert cluster.node_of_rank.tolist() == [0, 0, 1]
    assert cluster.slots_of_rank.tolist() == [3, 3, 3]
    assert cluster.speed_of_rank.tolist() == [0.75, 0.75, 1.5]
    assert (cluster.intra, cluster.inter) == (INTRA_NODE, Link(1e-3, 5e9))
    for wrong, kind, message in (
        ("ranks_per_node = [", FormatError, "is not TOML"),
        (text + "[extra]\n", FormatError, "unknown key 'extra'"),
        ("slots_per_rank = 1\n", FormatError, "lacks the key 'ranks_per_node'"),
        (text.replace("5e9", "0"), InputError, "bandwidth"),
        (text.replace("slots_per_rank = 3", "slots_per_rank = [1, 2]"), FormatError, "not a cluster description"),
    ):
        path.write_text(wrong)
        with pytest.raises(kind, match=message):
            Cluster.from_toml(path)
    with pytest.raises(InputError):
        Cluster.from_toml(tmp_path / "absent.toml")


def two_servers() -> "nx.Graph[str]":
    """Servers of two GPUs and of one, unlike in everything."""
    graph: nx.Graph[str] = nx.Graph()
    graph.add_node("a0", kind="gpu", node="a", slots=4)
    graph.add_node("a1", kind="gpu", node="a", speed=2.0)
    graph.add_node("b0", kind="gpu", node="b")
    graph.add_edge("a0", "a1", bandwidth=100.0, latency=1.0)
    graph.add_edge("a0", "switch", bandwidth=50.0, latency=2.0)
    graph.add_edge("switch", "b0", bandwidth=25.0, latency=4.0)
    return graph


def test_graphs() -> None:
    """The route of least inverse bandwidths; the links are those of the farthest pairs."""
    cluster = Cluster.from_graph(two_servers(), slots_per_rank=[1, 2, 3])
    assert cluster.node_of_rank.tolist() == [0, 0, 1]
    assert cluster.slots_of_rank.tolist() == [4, 2, 3]
    assert cluster.speed_of_rank.tolist() == [0.75, 1.5, 0.75]
    assert cluster.seconds_per_byte_RR * 100 == pytest.approx(np.array([[0, 1, 6], [1, 0, 7], [6, 7, 0]]))
    assert (cluster.intra.latency, cluster.intra.bandwidth) == pytest.approx((1.0, 100.0))
    assert (cluster.inter.latency, cluster.inter.bandwidth) == pytest.approx((7.0, 100 / 7))
    prices = LinkPrices.of(cluster)  # in units of the copy between a0 and a1
    assert prices.rank_R == pytest.approx([1.0, 1.0, 1.0])
    assert prices.node_N == pytest.approx([6.5 - 1, 6.5 - 1])
    graph = two_servers()
    graph.add_edge("a1", "b0", bandwidth=100.0)
    prices = LinkPrices.of(Cluster.from_graph(graph, slots_per_rank=1))
    # To node a: from b0 to a0 2 (by a1), to a1 1. To node b: 2 and 1.
    assert prices.node_N == pytest.approx([0.5, 0.5])
    apart = nx.Graph(two_servers())
    apart.remove_edge("switch", "b0")
    for wrong, message in ((apart, "does not connect 'a0' and 'b0'"), (nx.Graph(), 'no vertex with kind="gpu"')):
        with pytest.raises(InputError, match=message):
            Cluster.from_graph(wrong, slots_per_rank=1)


def test_ranks_that_are_nodes_have_one_kind_of_link() -> None:
    """Where no two ranks share a node the mean pair is the unit, and nodes cost nothing beside their rank."""
    distance = np.array([[0, 1, 3], [1, 0, 2], [3, 2, 0.0]])
    cluster = Cluster(np.arange(3), np.ones(3), np.ones(3), distance_RR=distance)
    prices = LinkPrices.of(cluster)
    assert prices.node_N.tolist() == [0.0, 0.0, 0.0]
    assert prices.pair_RR == pytest.approx(distance / 2)
    assert prices.rank_R == pytest.approx([1.0, 0.75, 1.25])
    assert LinkPrices.of(Cluster.uniform(1, slots_per_rank=1)).rank_R.tolist() == [1.0]
