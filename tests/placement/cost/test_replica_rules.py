"""Replica rules of engines: word for word where the engine is deterministic, in distribution where it draws."""

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.replica_choice import NUM_ORDERS, preference_orders
from moeplace.placement.cost.replica_rule import KNUTH_MULTIPLIER, REPLICA_RULES, get_rule, nearest_static_slots
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.profiling.errors import InputError
from tests.placement.cost.reference import static_maps
from tests.placement.instances import skewed_trace
from tests.placement.random_placements import random_placement
from tests.seeds import FIXED_AND_TODAY


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_static_maps_are_those_of_the_engine(seed: int) -> None:
    """Every rank's map, on one node and on several, as each rank works it out."""
    rng = np.random.default_rng(seed)
    for nodes in ([0] * 8, [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2]):
        placement = random_placement(
            rng, layers=3, experts=12, slots_of_rank=[4] * len(nodes), node_of_rank=nodes, fill=1.0
        )
        maps = static_maps(placement.slot_to_expert.tolist(), placement.rank_of_slot.tolist(), nodes, 12)
        table_RLE = nearest_static_slots(placement)
        for rank, layers in enumerate(maps):
            for layer, row in enumerate(layers):
                assert table_RLE[rank, layer].tolist() == [row[e] for e in range(12)]


def two_replicas() -> Placement:
    """Expert 0 on all four ranks, experts 1 to 4 on one rank each."""
    return Placement(np.array([[0, 1, 0, 2, 0, 3, 0, 4]]), np.full(4, 2), np.zeros(4, int), np.full(1, 5))


def served(name: str, tokens: int) -> np.ndarray:
    """(T,) rank that serves expert 0 of each token."""
    placement = two_replicas()
    rank_TK = np.empty((tokens, 2), np.int32)
    ids_TK = np.tile(np.array([0, -1], np.int16), (tokens, 1))
    get_rule(name).on(placement, 8)(0, ids_TK, (np.arange(tokens) % 4).astype(np.int32), rank_TK)
    assert (rank_TK[:, 1] == -1).all()
    return rank_TK[:, 0]


def test_each_rule_chooses_as_its_engine() -> None:
    """The home's own slot; a draw from all; a hash of the row on the home rank."""
    tokens = 4000
    assert (served("moeplace", tokens) == np.arange(tokens) % 4).all()
    assert (served("nearest-static", tokens) == np.arange(tokens) % 4).all()
    drawn = np.bincount(served("random", tokens), minlength=4)
    assert (abs(drawn - tokens / 4) < 5 * np.sqrt(tokens * 3 / 16)).all()
    rows = np.arange(tokens) // 4
    assert served("hash", tokens).tolist() == [(int(row) * KNUTH_MULTIPLIER % 2**32) % 4 for row in rows]
    hashed = np.bincount(served("hash", tokens) * 4 + np.arange(tokens) % 4, minlength=16)
    assert (abs(hashed - tokens / 16) < tokens / 64).all()  # every home uses every replica alike


@pytest.mark.parametrize("name", REPLICA_RULES)
def test_placements_without_replicas_are_served_alike(name: str) -> None:
    """Where every expert has one slot, rules differ in their name only."""
    trace = skewed_trace(4, tokens=60, layers=2, experts=6, top_k=2, ragged=0.3)
    placement = random_placement(np.random.default_rng(0), layers=2, experts=6, slots_of_rank=[2, 3, 2], fill=0.0)
    ours = evaluate(trace, placement, rule=get_rule(name)).summary()
    assert ours.pop("replica_rule") == name
    plain = evaluate(trace, placement).summary()
    del plain["replica_rule"]
    assert ours == plain


def test_rules_of_engines_need_more_ranks() -> None:
    """Replicas that moeplace's rule uses to save ranks save less under rules that look at one expert at a time."""
    trace = skewed_trace(7, tokens=600, layers=2, experts=16, top_k=4)
    problem = Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=6), objective="traffic")
    placement = random_placement(np.random.default_rng(1), layers=2, experts=16, slots_of_rank=[6] * 4)
    cost = {
        name: problem.replace(replica_rule=rule).evaluate(placement).ranks_per_token
        for name, rule in REPLICA_RULES.items()
    }
    assert cost["moeplace"] < min(cost["nearest-static"], cost["random"], cost["hash"])


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(
        InputError, match="replica rule 'best' must be one of moeplace, balanced, nearest-static, random, hash"
    ):
        get_rule("best")


def finalised(key: int) -> int:
    """The finaliser of MurmurHash3 on 64 bits, in Python's integers."""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        key = (key ^ key >> 33) * multiplier % 2**64
    return key ^ key >> 33


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_every_machine_prefers_ranks_alike(ranks: int) -> None:
    """Whoever serves and whoever predicts has the same table: numbers from 1 on, hashed; odd rows are reversed."""
    assert finalised(1) == 0xB456BCFC34C2CB2C  # published for the finaliser
    orders_PR = preference_orders(ranks)
    assert orders_PR.shape == (NUM_ORDERS, ranks)
    for row in range(0, len(orders_PR), 2):
        keys = [finalised(row // 2 * ranks + rank + 1) for rank in range(ranks)]
        order = sorted(range(ranks), key=keys.__getitem__)
        assert orders_PR[row].tolist() == order
        assert orders_PR[row + 1].tolist() == order[::-1]
