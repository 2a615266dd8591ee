"""Placements for other ranks: nothing is lost, nothing moves that need not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ortools.sat.python import cp_model

from moeplace.placement.cluster import Cluster, even_slots
from moeplace.placement.migration.plan import apply_plan
from moeplace.placement.migration.relabel import least_bytes, moves
from moeplace.placement.placement import EMPTY_SLOT, Placement, index_order, with_slots
from moeplace.placement.problem import Problem
from moeplace.placement.replacement.width import adopt, rebalance, with_ranks
from moeplace.placement.replacement.width_plan import plan_width
from moeplace.profiling.errors import InputError
from tests.runtime.placements import random_placement

RANDOM = {
    "experts": st.integers(1, 12),
    "ranks": st.integers(1, 5),
    "seed": st.integers(0, 10_000),
    "extra": st.integers(0, 2),
}


def filled(placement: Placement) -> np.ndarray:
    """(L, R) experts of each rank."""
    return placement.copies_LER.sum(axis=1)


@settings(max_examples=60, deadline=None)
@given(**RANDOM)
def test_ranks_may_be_numbered_anew(experts: int, ranks: int, seed: int, extra: int) -> None:
    """Rank r of the new numbering holds what it held; a rank that joins has no slots."""
    old = random_placement(2, experts, ranks, seed=seed, extra_slots=extra)
    order: list[int | None] = [*np.random.default_rng(seed).permutation(ranks).tolist(), None]
    new = with_ranks(old, order)
    assert new.slots_of_rank[-1] == 0
    for rank, before in enumerate(order[:-1]):
        assert before is not None
        np.testing.assert_array_equal(
            new.slot_to_expert[:, new.slots_on(rank)], old.slot_to_expert[:, old.slots_on(before)]
        )


@settings(max_examples=60, deadline=None)
@given(**RANDOM)
def test_rebalanced_placements_are_even(experts: int, ranks: int, seed: int, extra: int) -> None:
    """Holders hold all, evenly; the others nothing; as many slots are filled as before, where that many fit."""
    rng = np.random.default_rng(seed)
    old = with_ranks(random_placement(2, experts, ranks, seed=seed, extra_slots=extra), [*range(ranks), None])
    holders = sorted(rng.choice(ranks + 1, rng.integers(1, ranks + 2), replace=False).tolist())
    new = rebalance(old, holders=holders, load=rng.integers(0, 9, (2, experts)))
    on_rank = filled(new)
    assert not np.delete(on_rank, holders, axis=1).any()
    assert (on_rank[:, holders].max(axis=1) - on_rank[:, holders].min(axis=1) <= 1).all()
    np.testing.assert_array_equal(on_rank.sum(1), np.minimum(filled(old).sum(1), experts * len(holders)))


@settings(max_examples=60, deadline=None)
@given(experts=st.integers(2, 16), ranks=st.integers(1, 5), seed=st.integers(0, 10_000), joins=st.booleans())
def test_a_change_of_width_moves_the_proven_least(experts: int, ranks: int, seed: int, joins: bool) -> None:
    """One rank more or less, without replicas: as many bytes as the bound says, whoever it is and whatever the load."""
    rng = np.random.default_rng(seed)
    width = ranks if joins else ranks + 1
    old = index_order(np.full(2, experts), even_slots(experts, width), np.zeros(width, np.int64))
    if joins:
        old, holders = with_ranks(old, [*range(width), None]), list(range(width + 1))
    else:
        holders = np.delete(np.arange(width), rng.integers(width)).tolist()
    goal = rebalance(old, holders=holders, load=rng.integers(0, 9, (2, experts)))
    made = plan_width(old, goal, expert_bytes=10, staging_bytes=10)
    assert made.plan.bytes == made.least_bytes == 10 * moves(old, goal).sum()
    wide = with_slots(old, np.maximum(old.slots_of_rank, goal.slots_of_rank))
    assert with_slots(apply_plan(wide, made.plan), goal.slots_of_rank).equals(goal)


def least_fetched(old: Placement, goal: Placement) -> int:
    """What ranks must fetch at least for a placement with the slots of a goal, as many of them filled, and on all ranks
    with slots as many but for one: by an integer program."""
    total, holders = 0, np.flatnonzero(goal.slots_of_rank).tolist()
    for layer, count in enumerate(old.experts_per_layer.tolist()):
        model, filled_slots = cp_model.CpModel(), int((goal.slot_to_expert[layer] != EMPTY_SLOT).sum())
        has = {(e, r): model.new_bool_var("") for e in range(count) for r in range(old.num_ranks)}
        on_rank = [sum(has[e, r] for e in range(count)) for r in range(old.num_ranks)]
        for rank in range(old.num_ranks):
            model.add(on_rank[rank] <= int(goal.slots_of_rank[rank]))
        for rank in holders:
            model.add(on_rank[rank] >= filled_slots // len(holders))
            model.add(on_rank[rank] <= -(-filled_slots // len(holders)))
        for expert in range(count):
            model.add_at_least_one(has[expert, r] for r in range(old.num_ranks))
        model.add(sum(has.values()) == filled_slots)
        model.minimize(sum(var for (e, r), var in has.items() if not old.copies_LER[layer, e, r]))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        assert solver.solve(model) == cp_model.OPTIMAL
        total += round(solver.objective_value)
    return total


@settings(max_examples=25, deadline=None)
@given(**RANDOM, joins=st.integers(0, 2))
def test_with_replicas_too_a_change_of_width_moves_the_least(
    experts: int, ranks: int, seed: int, extra: int, joins: int
) -> None:
    """Ranks come and go at once, and a layer has more copies than another, as after a loss during a re-placement: the
    plan costs what the bound says, and no placement as even costs less."""
    rng = np.random.default_rng(seed)
    old = with_ranks(
        random_placement(2, experts, ranks, seed=seed, extra_slots=extra), [*range(ranks), *[None] * joins]
    )
    emptied = old.slot_to_expert.copy()
    for layer, row in enumerate(emptied):
        for slot in rng.permutation(len(row))[: rng.integers(3)].tolist():
            if old.replica_counts[layer][row[slot]] > 1 and (row == row[slot]).sum() > 1:
                row[slot] = EMPTY_SLOT
    old = old.replace(slot_to_expert=emptied)
    holders = sorted(rng.choice(ranks + joins, rng.integers(1, ranks + joins + 1), replace=False).tolist())
    goal = rebalance(old, holders=holders, load=rng.integers(0, 9, (2, experts)))
    made = plan_width(old, goal, expert_bytes=10, staging_bytes=10)
    assert made.plan.bytes == made.least_bytes == 10 * least_fetched(old, goal)


def test_a_goal_that_is_not_even_is_bound_by_its_slots_alone() -> None:
    """Worked by hand, two ranks with 3 slots: what is as uneven as before costs nothing, what is even does."""
    old = Placement(np.array([[0, 1, 2, 3, -1, -1]]), np.full(2, 3), np.zeros(2, np.int64), np.full(1, 4))
    goal = old.replace(slot_to_expert=np.array([[0, 1, 2, 3, -1, -1]]))
    assert plan_width(old, goal, expert_bytes=10, staging_bytes=10).least_bytes == 0
    even = old.replace(slot_to_expert=np.array([[0, 1, -1, 3, 2, -1]]))
    assert plan_width(old, even, expert_bytes=10, staging_bytes=10).least_bytes == 10


def test_five_ranks_take_the_fifth_of_four() -> None:
    """Worked by hand: 20 experts on 4 ranks are 5 each; a fifth rank gets 4, one from each other."""
    old = with_ranks(index_order(np.full(1, 20), even_slots(20, 4), np.zeros(4, np.int64)), [0, 1, 2, 3, None])
    goal = rebalance(old, holders=range(5))
    assert filled(goal).tolist() == [[4, 4, 4, 4, 4]]
    assert moves(old, goal).tolist() == [4]
    cluster = Cluster(goal.node_of_rank, goal.slots_of_rank, np.ones(5))
    assert least_bytes(old, cluster, filled=np.array([20])) == 4


def test_a_further_copy_is_of_the_rarest_expert_then_the_heaviest() -> None:
    """Rank 1 leaves with expert 0, which rank 0 has already; rank 0 has room for 2 (twice there), 3 or 4 (once)."""
    row = [0, 1, -1, 0, -1, -1, 0, 2, 3, 1, 2, 4]
    old = Placement(np.array([row]), np.full(4, 3), np.zeros(4, np.int64), np.full(1, 5))
    for load, rarest in (([9, 9, 9, 1, 2], 4), ([9, 9, 9, 2, 1], 3)):
        goal = rebalance(old, holders=[0, 2, 3], load=np.array([load]))
        held = [set(goal.slot_to_expert[0, goal.slots_on(rank)].tolist()) for rank in range(4)]
        assert held == [{0, 1, rarest}, set(), {0, 2, 3}, {1, 2, 4}]


@settings(max_examples=60, deadline=None)
@given(**RANDOM)
def test_survivors_adopt_what_nobody_holds(experts: int, ranks: int, seed: int, extra: int) -> None:
    """What survivors held stays where it was; every expert that only lost ranks held is adopted, exactly once."""
    rng = np.random.default_rng(seed)
    old = random_placement(2, experts, ranks, seed=seed, extra_slots=extra)
    survivors = sorted(rng.choice(ranks, rng.integers(1, ranks + 1), replace=False).tolist())
    held = [old.slot_to_expert[:, old.slots_on(rank)] for rank in survivors]
    adoption = adopt(held, old.experts_per_layer, np.zeros(len(survivors), np.int64))
    new = adoption.placement
    for rank, before in enumerate(held):
        own = new.slot_to_expert[:, new.slots_on(rank)][:, : before.shape[1]]
        assert (own[before != EMPTY_SLOT] == before[before != EMPTY_SLOT]).all()
    orphans = set(map(tuple, np.argwhere(old.copies_LER[:, :, survivors].sum(2) == 0).tolist()))
    assert {(layer, expert) for layer, expert, _ in adoption.adopted} == orphans
    assert len(adoption.adopted) == len(orphans)
    assert filled(new).sum() == sum((own != EMPTY_SLOT).sum() for own in held) + len(orphans)


def test_wrong_widths_are_refused() -> None:
    """Slots with experts cannot be cut off, and somebody must hold the experts."""
    placement = index_order(np.full(1, 4), even_slots(4, 2), np.zeros(2, np.int64))
    with pytest.raises(InputError, match="rank 1 has experts beyond its first 1 slots"):
        with_slots(placement, np.array([2, 1]))
    with pytest.raises(InputError, match="at least one rank must hold experts"):
        rebalance(placement, holders=[])
    with pytest.raises(InputError, match="has no slot"):
        with_ranks(placement, [0])
    with pytest.raises(InputError, match="numbers from 0, not all 0"):
        Cluster.uniform(2, slots_per_rank=0)
    with pytest.raises(InputError, match=r"every rank must have slots to be placed on, not \[4, 0\]"):
        Problem.from_load(np.ones((1, 4)), Cluster.uniform(2, slots_per_rank=[4, 0]))
