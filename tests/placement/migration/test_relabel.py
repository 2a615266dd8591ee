"""Relabelling against brute force over permutations; bounds against brute force over placements."""

import itertools

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.placement.cluster import Cluster
from moeplace.placement.migration.relabel import least_bytes, moved_bytes, moves, relabel_to
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError
from tests.placement.random_placements import random_placement

seeds = st.integers(0, 2**20)


def bins_of(slots_LS: np.ndarray, ranks: int) -> list[list[frozenset[int]]]:
    """Sets of experts per layer and rank, for equal slots per rank."""
    return [[frozenset(row[row >= 0]) for row in layer.reshape(ranks, -1)] for layer in slots_LS]


@given(seeds, st.sampled_from([1, 2]), st.booleans())
def test_no_allowed_permutation_keeps_more(seed: int, nodes: int, per_layer: bool) -> None:
    """Brute force over ranks within nodes and nodes as blocks never moves fewer bytes; bins stay bins."""
    rng = np.random.default_rng(seed)
    ranks, per_node = 4, 4 // nodes
    cluster = Cluster.uniform(ranks, slots_per_rank=3, ranks_per_node=per_node)
    node_of_rank = cluster.node_of_rank.tolist()
    old, new = (
        random_placement(rng, layers=2, experts=6, slots_of_rank=[3] * ranks, node_of_rank=node_of_rank, fill=0.7)
        for _ in range(2)
    )
    size_LE = rng.integers(1, 9, (2, 6))
    slots = relabel_to(old, new.slot_to_expert, cluster, per_layer=per_layer, expert_bytes=size_LE)
    got = moved_bytes(old, new.replace(slot_to_expert=slots), expert_bytes=size_LE)
    orders = [
        [rank for block in blocks for rank in block]
        for order in itertools.permutations(range(nodes))
        for blocks in itertools.product(
            *(itertools.permutations(range(n * per_node, (n + 1) * per_node)) for n in order)
        )
    ]
    cost_LO = np.array(
        [
            [_missing_bytes(old_bins, [new_bins[b] for b in order], size_E) for order in orders]
            for old_bins, new_bins, size_E in zip(
                bins_of(old.slot_to_expert, ranks), bins_of(new.slot_to_expert, ranks), size_LE, strict=True
            )
        ]
    )
    assert got == (cost_LO.min(axis=1).sum() if per_layer else cost_LO.sum(axis=0).min())
    for before, after in zip(bins_of(new.slot_to_expert, ranks), bins_of(slots, ranks), strict=True):
        assert sorted(map(sorted, before)) == sorted(map(sorted, after))


def _missing_bytes(old: list[frozenset[int]], new: list[frozenset[int]], size_E: np.ndarray) -> int:
    return sum(int(size_E[e]) for held, wanted in zip(old, new, strict=True) for e in wanted - held)


@given(seeds)
def test_a_shuffled_placement_is_put_back(seed: int) -> None:
    """Ranks permuted and slots shuffled inside ranks: relabelling returns the placement itself, slot by slot."""
    rng = np.random.default_rng(seed)
    old = random_placement(rng, layers=3, experts=8, slots_of_rank=[3] * 4)
    cluster = Cluster.uniform(4, slots_per_rank=3)
    shuffled = old.slot_to_expert.reshape(3, 4, 3)[:, rng.permutation(4)]
    shuffled = rng.permuted(shuffled, axis=2).reshape(3, 12)
    for per_layer in (True, False):
        assert np.array_equal(relabel_to(old, shuffled, cluster, per_layer=per_layer), old.slot_to_expert)


def test_a_tie_changes_no_number() -> None:
    """Where no relabelling keeps anything, bins keep their ranks."""
    old = Placement(np.array([[0, 1, 2, 3]]), np.full(4, 1), np.zeros(4, int), np.array([4]))
    cluster = Cluster.uniform(4, slots_per_rank=1)
    slots = relabel_to(old, np.array([[0, 1, 2, 3]]), cluster, per_layer=True, origin=np.full(4, -1))
    assert slots.tolist() == [[0, 1, 2, 3]]


def test_unequal_ranks_keep_their_bins() -> None:
    """Ranks of other slots, speed or distance are not exchanged."""
    old = Placement(np.array([[0, 1, 2, 3]]), np.full(2, 2), np.zeros(2, int), np.array([4]))
    swapped = np.array([[2, 3, 0, 1]])
    equal = Cluster.uniform(2, slots_per_rank=2)
    assert relabel_to(old, swapped, equal, per_layer=True).tolist() == [[0, 1, 2, 3]]
    uneven = equal.replace(speed_of_rank=np.array([1.0, 2.0]))
    assert relabel_to(old, swapped, uneven, per_layer=True).tolist() == [[2, 3, 0, 1]]
    line = nx.path_graph(3)
    nx.set_node_attributes(line, "gpu", "kind")
    nx.set_edge_attributes(line, 1e9, "bandwidth")
    middle = Placement(np.array([[0, 1, 2]]), np.full(3, 1), np.zeros(3, int), np.array([3]))
    slots = relabel_to(middle, np.array([[1, 2, 0]]), Cluster.from_graph(line, slots_per_rank=1), per_layer=True)
    assert slots.tolist() == [[0, 2, 1]]  # the ends may change places, the middle may not


@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_least_bytes_bounds_every_placement(seed: int, old_ranks: int, new_ranks: int) -> None:
    """No random placement of the new shape fetches less than the bound for as many filled slots."""
    rng = np.random.default_rng(seed)
    old = random_placement(rng, layers=2, experts=5, slots_of_rank=[6 // old_ranks + 1] * old_ranks, fill=0.5)
    slots = (rng.integers(0, 2, new_ranks) + 5 // new_ranks + 1).tolist()
    new = random_placement(rng, layers=2, experts=5, slots_of_rank=slots, fill=0.5)
    cluster = Cluster(new.node_of_rank, new.slots_of_rank, np.ones(new_ranks))
    size_LE = rng.integers(1, 9, (2, 5))
    filled_L = (new.slot_to_expert >= 0).sum(axis=1)
    assert moved_bytes(old, new, expert_bytes=size_LE) >= least_bytes(
        old, cluster, expert_bytes=size_LE, filled=filled_L
    )


@pytest.mark.parametrize(
    ("new_slots", "least"),
    [
        ([2, 2, 2], 0),  # the same cluster
        ([2, 2, 2, 2], 2),  # a rank joins: its two slots
        ([3, 3], 2),  # rank 2 leaves: expert 4 and a sixth slot... or a replica less, both two copies
        ([5], 3),  # only rank 0 stays
    ],
)
def test_least_bytes_by_hand(new_slots: list[int], least: int) -> None:
    """Experts 0,1 | 2,3 | 4,0 on three ranks of two slots."""
    old = Placement(np.array([[0, 1, 2, 3, 4, 0]]), np.full(3, 2), np.zeros(3, int), np.array([5]))
    cluster = Cluster(np.zeros(len(new_slots), int), np.array(new_slots), np.ones(len(new_slots)))
    assert least_bytes(old, cluster) == least


def test_lost_experts_must_be_fetched() -> None:
    """Rank 2 is replaced: only expert 4 has no other copy; both of its slots must be filled."""
    old = Placement(np.array([[0, 1, 2, 3, 4, 0]]), np.full(3, 2), np.zeros(3, int), np.array([5]))
    cluster = Cluster.uniform(3, slots_per_rank=2)
    origin = np.array([0, 1, -1])
    assert least_bytes(old, cluster, origin=origin, filled=np.array([5])) == 1
    assert least_bytes(old, cluster, origin=origin) == 2
    assert moves(old, old, origin=origin).tolist() == [2]
    assert moved_bytes(old, old, expert_bytes=7, origin=origin) == 14


def test_bad_arguments_are_named() -> None:
    """Shapes, origins and sizes that do not fit."""
    old = Placement(np.array([[0, 1, 2, 3]]), np.full(2, 2), np.zeros(2, int), np.array([4]))
    cluster = Cluster.uniform(2, slots_per_rank=2)
    with pytest.raises(InputError, match=r"\(1, 3\) must be \(layers, slots\) \(1, 4\)"):
        relabel_to(old, np.zeros((1, 3), int), cluster, per_layer=True)
    with pytest.raises(InputError, match=r"origin \[0, 0\] must name 2 different ranks of 0..1"):
        relabel_to(old, old.slot_to_expert, cluster, per_layer=True, origin=np.array([0, 0]))
    with pytest.raises(InputError, match=r"expert bytes \(0\) must be positive"):
        moved_bytes(old, old, expert_bytes=0)
    with pytest.raises(InputError, match="different models"):
        moves(old, Placement(np.array([[0, 1]]), np.full(2, 1), np.zeros(2, int), np.array([2])))
