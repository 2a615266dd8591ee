"""Replica choice on tensors is the rule that the evaluation uses."""

import numpy as np
import pytest
import torch

from moeplace.placement.cost.replica_choice import choose_ranks
from moeplace.runtime.exchange.replica_choice import choose_slots
from moeplace.runtime.exchange.slot_tables import SlotTables
from tests.runtime.placements import random_placement


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_kernel(seed: int) -> None:
    """Same ranks as the kernel: with and without replicas, one or more nodes, absent experts, unknown positions."""
    rng = np.random.default_rng(seed)
    ranks, experts, top_k = int(rng.integers(1, 7)), int(rng.integers(3, 13)), int(rng.integers(1, 4))
    nodes = 1 if ranks < 2 else int(rng.integers(1, 3))
    placement = random_placement(2, experts, ranks, seed=seed, extra_slots=int(rng.integers(0, 4)), nodes=nodes)
    ids_TK = np.argsort(rng.random((40, experts)), axis=1)[:, :top_k]
    ids_TK[rng.random(ids_TK.shape) < 0.1] = -1
    near_T, rotation_T = rng.integers(-1, ranks, 40), rng.integers(0, 99, 40)
    tables = SlotTables.from_placement(placement, rank=0)
    for layer in range(2):
        expected_TK = np.empty_like(ids_TK)
        choose_ranks(ids_TK, placement.copies_LER[layer], placement.node_of_rank, near_T, rotation_T, expected_TK)
        slots_TK = choose_slots(
            tables, layer, torch.as_tensor(ids_TK), near=torch.as_tensor(near_T), rotation=torch.as_tensor(rotation_T)
        ).numpy()
        np.testing.assert_array_equal(np.append(placement.rank_of_slot, -1)[slots_TK], expected_TK)
        served = slots_TK >= 0
        np.testing.assert_array_equal(placement.slot_to_expert[layer, slots_TK[served]], ids_TK[served])


def test_local_slots_are_those_of_the_rank() -> None:
    """Every global slot is local on exactly one rank."""
    placement = random_placement(1, 6, 3, seed=1)
    slots = torch.arange(-1, placement.num_slots)
    local = [SlotTables.from_placement(placement, rank=r).local_slots(slots) for r in range(3)]
    assert (sum((x >= 0).long() for x in local) == (slots >= 0)).all()
