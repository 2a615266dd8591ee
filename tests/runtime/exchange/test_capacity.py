"""Rooms of messages: both sides of a pair agree, what is expected fits, memory is bounded, the rest travels too."""

from typing import Any

import numpy as np
import pytest
import torch

from moeplace.runtime.counters import Counters
from moeplace.runtime.exchange.capacity import (
    ExpectedRows,
    HeldRows,
    HomeMeans,
    Means,
    NodeMeans,
    OwnerMeans,
    WholeBatch,
    owned_shares,
    use_of_ranks,
)
from moeplace.runtime.exchange.dispatcher import Step
from moeplace.runtime.exchange.factory import make_dispatcher
from moeplace.runtime.exchange.row_layout import RowLayout
from moeplace.runtime.exchange.slot_tables import SlotTables
from tests.rank_pool import RankContext, RankPool
from tests.runtime.placements import random_placement
from tests.runtime.toy_layers import ToyModel

LAYERS, EXPERTS, RANKS = 2, 12, 6
KINDS = ("home", "own in node", "foreign in node", "owner")


def means_of(kind: str, tables: SlotTables, top_k: int) -> Means:
    use_LR = use_of_ranks(tables, top_k)
    if kind == "home":
        return HomeMeans(use_LR)
    if kind.endswith("node"):
        return NodeMeans(use_LR, [2, 3, 5], foreign=kind.startswith("foreign"))
    return OwnerMeans(use_LR, owned_shares(tables))


def make_rules(kind: str, seed: int, top_k: int) -> list[ExpectedRows]:
    """One per rank, each from the tables of that rank alone."""
    placement = random_placement(LAYERS, EXPERTS, RANKS, seed=seed, extra_slots=seed % 3)
    ranks = 3 if kind.endswith("node") else RANKS
    tables = [SlotTables.from_placement(placement, rank=rank) for rank in range(RANKS)]
    return [
        ExpectedRows(rank, means_of(kind, tables[rank], top_k), num_layers=LAYERS, num_ranks=ranks)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_a_pair_agree(kind: str, dated_seed: int) -> None:
    """After any passes, the room that a source gives a message is the room that its target expects."""
    rng = np.random.default_rng(dated_seed)
    rules = make_rules(kind, dated_seed % 1000, top_k=int(rng.integers(1, 5)))
    ranks = len(rules)
    for _ in range(20):
        layer = int(rng.integers(LAYERS))
        step = Step(tuple(rng.integers(0, 60, RANKS).tolist()))
        capacities = [rule.capacity(layer, step) for rule in rules]
        to_RR = np.array([capacity.to_peer for capacity in capacities])
        np.testing.assert_array_equal(to_RR, np.array([capacity.from_peer for capacity in capacities]).T)
        most_RR = rules[0]._means.most(step)
        assert (to_RR <= most_RR).all()
        assert not to_RR.diagonal().any()
        sent_RR = rng.integers(0, most_RR + 1)
        for rank, rule in enumerate(rules):
            rule.observe(layer, step, sent_RR[rank].tolist(), sent_RR[:, rank].tolist())
        if ranks == RANKS:  # what was sent fits the next time
            again_RR = np.array([rule.capacity(layer, step).to_peer for rule in rules])
            assert (again_RR >= sent_RR).all()


def test_room_sinks_to_what_is_sent() -> None:
    """Messages that turn out to be small take little room after a while."""
    rules, step = make_rules("owner", 3, top_k=2), Step((200,) * RANKS)
    first = sum(rules[0].capacity(0, step).to_peer)
    for _ in range(200):
        rules[0].observe(0, step, [1] * RANKS, [1] * RANKS)
    assert max(rules[0].capacity(0, step).to_peer) <= 8
    assert sum(rules[0].capacity(0, step).to_peer) < first / 10
    assert rules[0].capacity(1, step).to_peer != rules[0].capacity(0, step).to_peer


def test_rows_that_a_rank_owns_are_at_most_all() -> None:
    """What is expected and some more, then what there was, also if that was more than there are tokens; all, at once,
    where room costs nothing."""
    step = Step((50, 50, 100, 0))
    held, whole = (HeldRows(0.25, 2, expected=expected) for expected in (True, False))
    assert 50 < held.rows(0, step) < 100
    for rule in (held, whole):
        rule.observe(0, step, 180)
        assert rule.rows(0, step) == 200
    assert 50 < held.rows(1, step) < 100
    assert whole.rows(1, step) == 200
    for _ in range(200):
        held.observe(0, step, 5)
    assert 5 < held.rows(0, step) < 30


@pytest.mark.parametrize("top_k", [1, 8])
def test_random_routing_fits(top_k: int, dated_seed: int) -> None:
    """Of messages of uniformly random routing fewer than one in a thousand exceeds its room."""
    rng = np.random.default_rng(dated_seed)
    experts, ranks, tokens = 64, 8, 40
    placement = random_placement(1, experts, ranks, seed=1, extra_slots=0)
    rank_of_expert = np.empty(experts, int)
    rank_of_expert[placement.slot_to_expert[0]] = placement.rank_of_slot
    tables = SlotTables.from_placement(placement, rank=0)
    rule = ExpectedRows(0, HomeMeans(use_of_ranks(tables, top_k)), num_layers=1, num_ranks=ranks)
    room_R = np.array(rule.capacity(0, Step((tokens,) * ranks)).to_peer)
    exceeded = 0
    for _ in range(1000):
        ids = rng.random((tokens, experts)).argsort(1)[:, :top_k]
        used_TR = np.zeros((tokens, ranks), bool)
        np.put_along_axis(used_TR, rank_of_expert[ids], True, 1)
        used_TR[:, 0] = False
        exceeded += int((used_TR.sum(0) > room_R).sum())
    assert exceeded <= 7


@pytest.mark.parametrize(
    ("experts", "top_k", "kind", "share"), [(64, 1, "owner", 200), (256, 8, "owner", 50), (256, 8, "home", 1.5)]
)
def test_memory_is_bounded(experts: int, top_k: int, kind: str, share: float) -> None:
    """32 ranks, 4,096 tokens of 7,168 numbers of 2 bytes: bytes of a layer's messages, against room for everything."""
    ranks, step = 32, Step((128,) * 32)
    placement = random_placement(1, experts, ranks, seed=1, extra_slots=0)
    tables = SlotTables.from_placement(placement, rank=5)
    means = means_of(kind, tables, top_k)
    row = RowLayout.of(slots=(torch.int32, top_k), weights=(torch.bfloat16, top_k), x=(torch.bfloat16, 7168)).row_bytes
    rules = (ExpectedRows(5, means, num_layers=1, num_ranks=ranks), WholeBatch(5, means))
    found, whole = (sum(rule.capacity(0, step).to_peer) * row for rule in rules)
    assert found * share <= whole
    assert found < 64e6


def run_padded(
    context: RankContext, model: ToyModel, homes: tuple[int, ...], form: str
) -> list[tuple[np.ndarray, np.ndarray, int, int]]:
    """Three passes whose messages have fixed sizes: tokens, rows, extra rounds so far, bytes sent so far."""
    placement = random_placement(model.num_layers, model.num_experts, context.size, seed=2, nodes=2)
    counters = Counters()
    group = context.group(placement.node_of_rank, counters=counters, short_messages=False)
    mode: Any = "coherent" if form == "coherent" else "dispatch-combine"
    runtime = model.runtime(placement, context.rank, counters)
    dispatcher = make_dispatcher(mode, runtime, group, node_aware=form == "node-aware")
    found = []
    for _ in range(3):
        rows = model.run(dispatcher, context.rank, Step(homes))
        sent = sum(counters.bytes_sent.values())
        found.append((rows.token.numpy(), rows.x.numpy(), counters.overflows, sent))
    return found


@pytest.mark.parametrize("form", ["coherent", "dispatch-combine", "node-aware"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_an_overflow_is_exact_and_does_not_come_again(pool: RankPool, form: str, top_k: int, dated_seed: int) -> None:
    """All tokens go to the same few experts, which nobody expects: one extra round, then there is room."""
    model = ToyModel.random(320, layers=3, experts=16, top_k=top_k, seed=dated_seed % 1000, single=True)
    results = pool.run(run_padded, model, (80, 200, 0, 40), form)
    expected = model.reference().numpy()
    for passed in range(3):
        tokens = np.concatenate([result[passed][0] for result in results])
        np.testing.assert_array_equal(np.sort(tokens), np.arange(320))
        values = np.concatenate([result[passed][1] for result in results])
        np.testing.assert_allclose(values, expected[tokens], rtol=1e-12, atol=1e-12)
    for result in results:
        assert result[1][2] == result[2][2]
    assert max(result[0][2] for result in results) > 0


def test_padded_messages_cost_little(pool: RankPool) -> None:
    """Of random routing, bytes of messages of fixed size are less than twice those that are as short as can be."""
    model = ToyModel.random(640, layers=2, experts=16, top_k=2, seed=5)
    results = pool.run(run_padded, model, (160,) * 4, "coherent")
    whole = 2 * 640 * 3 * 80  # layers, rows for each of three others, bytes of a row
    for result in results:
        assert result[0][3] < whole / 2


def test_use_of_ranks_is_the_share_of_random_tokens(dated_seed: int) -> None:
    """Against drawing experts, without replicas."""
    rng = np.random.default_rng(dated_seed)
    placement = random_placement(1, 12, 4, seed=dated_seed % 100, extra_slots=0)
    tables = SlotTables.from_placement(placement, rank=0)
    for top_k in (1, 2, 5, 12):
        ids = rng.random((4000, 12)).argsort(1)[:, :top_k]
        rank_E = (tables.slot_on_rank[0] >= 0).numpy().argmax(1)
        used_TR = np.zeros((4000, 4), bool)
        np.put_along_axis(used_TR, rank_E[ids], True, 1)
        np.testing.assert_allclose(use_of_ranks(tables, top_k)[0], used_TR.mean(0), atol=0.05)
