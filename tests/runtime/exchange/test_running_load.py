"""Replica choice by the load so far on tensors is the rule that the evaluation uses, and that its text describes."""

import numpy as np
import pytest
import torch

from moeplace.placement.cost.replica_rule import BALANCED
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.runtime.counters import Counters
from moeplace.runtime.exchange.dispatcher import Step
from moeplace.runtime.exchange.factory import make_dispatcher
from moeplace.runtime.exchange.replica_choice import choose_slots
from moeplace.runtime.exchange.running_load import RunningLoad
from moeplace.runtime.exchange.slot_tables import SlotTables
from tests.placement.cost.balanced_reference import Sender
from tests.rank_pool import RankContext, RankPool
from tests.runtime.placements import random_placement
from tests.runtime.toy_layers import ToyModel
from tests.seeds import FIXED_AND_TODAY, TODAY

FORMS = (("dispatch-combine", False), ("dispatch-combine", True), ("coherent", False), ("allgather", False))


def instance(seed: int) -> tuple[Placement, np.random.Generator]:
    """A placement on up to seven ranks and two nodes."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(2, 8))
    extra, nodes = int(rng.integers(0, 4)), int(rng.integers(1, 3))
    return random_placement(2, int(rng.integers(4, 13)), ranks, seed=seed, extra_slots=extra, nodes=nodes), rng


def draw_ids(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """(T, K) distinct experts, some absent."""
    ids_TK = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k]
    ids_TK[rng.random(ids_TK.shape) < 0.1] = -1
    return ids_TK


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_equals_the_evaluation_on_the_same_batches(seed: int) -> None:
    """Every rank, step by step, with the tokens that the evaluation takes for its batches."""
    placement, rng = instance(seed)
    ranks, batch, steps = placement.num_ranks, int(rng.integers(1, 50)), 5
    tokens = batch * steps
    ids_TK = draw_ids(rng, tokens, placement.num_experts, int(rng.integers(1, 5)))
    home_T = np.arange(tokens) % ranks
    expected_TK = np.empty(ids_TK.shape, np.int32)
    choose = BALANCED.on(placement, batch)
    tables = [SlotTables.from_placement(placement, rank=rank) for rank in range(ranks)]
    running = [RunningLoad.none(each) for each in tables]
    for layer in range(2):
        choose(layer, ids_TK, home_T.astype(np.int32), expected_TK)
        for step in range(steps):
            for rank in range(ranks):
                mine = np.flatnonzero((np.arange(tokens) % steps == step) & (home_T == rank))
                slots_TK = choose_slots(
                    tables[rank], layer, torch.as_tensor(ids_TK[mine]),
                    near=rank, rotation=torch.as_tensor(mine // steps), running=running[rank],
                ).numpy()  # fmt: skip
                served = np.append(placement.rank_of_slot, -1)[slots_TK]
                np.testing.assert_array_equal(served, expected_TK[mine])
                used = slots_TK >= 0
                np.testing.assert_array_equal(placement.slot_to_expert[layer, slots_TK[used]], ids_TK[mine][used])


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_equals_the_text(seed: int) -> None:
    """Passes of any sizes, none included, with tokens in any order and at unknown places, as plain Python has them."""
    placement, rng = instance(seed)
    layer, top_k = 1, int(rng.integers(1, 5))
    holders = {e: np.flatnonzero(row).tolist() for e, row in enumerate(placement.copies_LER[layer])}
    sender = Sender(holders, placement.node_of_rank.tolist(), top_k)
    tables = SlotTables.from_placement(placement, rank=0)
    running = RunningLoad.none(tables)
    for size in rng.integers(0, 40, 8):
        ids_TK = draw_ids(rng, int(size), placement.num_experts, top_k)
        near_T, number_T = rng.integers(-1, placement.num_ranks, size), rng.permutation(1000)[:size]
        rows = [(int(n), int(r), ids.tolist()) for n, r, ids in zip(number_T, near_T, ids_TK, strict=True)]
        expected = np.array(sender.send(rows), dtype=np.int64).reshape(ids_TK.shape)
        slots_TK = choose_slots(
            tables, layer, torch.as_tensor(ids_TK), near=torch.as_tensor(near_T),
            rotation=torch.as_tensor(number_T), running=running,
        ).numpy()  # fmt: skip
        np.testing.assert_array_equal(np.append(placement.rank_of_slot, -1)[slots_TK], expected)
    if tables.replicated[layer]:
        assert running.carried_LR[layer].tolist() == list(sender.so_far.values())
    assert not running.carried_LR[0].any()


def run_steps(
    context: RankContext, model: ToyModel, homes: tuple[int, ...], forms: tuple[tuple[Mode, bool], ...]
) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Tokens and rows of this rank after the second of two steps, and experts computed in both, per form."""
    placement = random_placement(model.num_layers, model.num_experts, context.size, seed=5, extra_slots=2, nodes=2)
    counters = Counters()
    group = context.group(placement.node_of_rank, counters=counters)
    results = []
    for mode, node_aware in forms:
        runtime = model.runtime(placement, context.rank, counters, replica_rule="balanced")
        counters.reset()
        dispatcher = make_dispatcher(mode, runtime, group, node_aware=node_aware)
        model.run(dispatcher, context.rank, Step(homes))
        rows = model.run(dispatcher, context.rank, Step(homes))
        results.append((rows.token.numpy(), rows.x.numpy(), counters.snapshot()["tokens_computed"]))
    return results


def test_every_mode_equals_the_reference(pool: RankPool) -> None:
    """Whoever serves, every token ends with the value of the reference; no expert is computed twice or never."""
    model = ToyModel.random(40, layers=3, experts=7, top_k=3, seed=TODAY, absent=0.1)
    results = pool.run(run_steps, model, (13, 0, 20, 7), FORMS)
    expected = model.reference().numpy()
    for form, parts in zip(FORMS, zip(*results, strict=True), strict=True):
        tokens, values = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        np.testing.assert_array_equal(np.sort(tokens), np.arange(len(expected)), err_msg=str(form))
        np.testing.assert_allclose(values, expected[tokens], rtol=1e-12, atol=1e-12, err_msg=str(form))
        assert sum(part[2] for part in parts) == 2 * (model.ids >= 0).sum(), form
