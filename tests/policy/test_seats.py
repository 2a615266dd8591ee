"""Rows as items and back: what ranks hold, what may be repeated, what stays in its slot."""

from collections import Counter

import numpy as np
import pytest

from moeplace.placement.policy.seats import BLANK, kept_items, needed_slots, row_of
from tests.seeds import TODAY


def test_slots_that_are_needed() -> None:
    """So many that none takes more than the most, of those there are; one at least."""
    load_E, count_E = np.array([10.0, 4.0, 0.0, 9.0]), np.array([5, 1, 2, 2])
    assert needed_slots(load_E, count_E, 4.0).tolist() == [3, 1, 1, 2]
    assert needed_slots(load_E, count_E, 10.0).tolist() == [1, 1, 1, 1]


def test_items_that_are_kept() -> None:
    """Those of the first slots; the others hold nothing."""
    row_S = np.array([0, 1, 2, 0, 0, 2], np.int32)
    assert kept_items(row_S, np.array([2, 1, 1])).tolist() == [0, 1, 2, 0, BLANK, BLANK]
    assert kept_items(row_S, np.array([3, 3, 3])).tolist() == row_S.tolist()


@pytest.mark.parametrize("seed", [0, 1, TODAY])
def test_rows_hold_their_items_and_little_moves(seed: int) -> None:
    """Every rank its experts; a blank repeats one that is nowhere else; what its rank still has stays in its slot."""
    print("seed", seed)
    rng, none, made = np.random.default_rng(seed), 0, 0
    for _ in range(400):
        ranks, per_rank, experts = int(rng.integers(1, 5)), int(rng.integers(1, 5)), int(rng.integers(1, 9))
        near_S = rng.integers(0, experts, ranks * per_rank)
        expert_I = np.where(rng.random(ranks * per_rank) < 0.3, BLANK, rng.integers(0, experts, ranks * per_rank))
        rank_I = rng.permutation(np.repeat(np.arange(ranks), per_rank))
        held = [Counter(expert_I[(rank_I == rank) & (expert_I >= 0)].tolist()) for rank in range(ranks)]
        alone = [{e for e in here if all(e not in there for there in held if there is not here)} for here in held]
        row_S = row_of(expert_I, rank_I, near_S, ranks)
        if any(here.total() < per_rank and not own for here, own in zip(held, alone, strict=True)):
            assert row_S is None
            none += 1
            continue
        assert row_S is not None
        made += 1
        for here, own, row, near in zip(
            held, alone, row_S.reshape(ranks, -1).tolist(), near_S.reshape(ranks, -1).tolist(), strict=True
        ):
            extra = Counter(row) - here
            assert here <= Counter(row)
            assert set(extra) <= own
            before = Counter(near)
            may_stay = sum(min(here[e], before[e]) for e in here)
            further = sum(max(before[e] - here[e], 0) for e in own)
            assert sum(map(int.__eq__, row, near)) >= may_stay + min(per_rank - here.total(), further)
    assert none > 20
    assert made > 100
