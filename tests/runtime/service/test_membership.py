"""Membership: the next step towards the ranks that are wanted, from any state of theirs."""

import numpy as np
import pytest

from moeplace.placement.placement import Placement, index_order
from moeplace.profiling.errors import InputError
from moeplace.runtime.service.coordinator.membership import Membership, MemberState, NextStep
from moeplace.runtime.service.generation import Generation


def membership(slots: list[int], *, joining: int = 0, ready: int = 0, leaving: tuple[int, ...] = ()) -> Membership:
    """Members 0.. with so many slots each are active; behind them come some that join, the first of them ready."""
    placement: Placement = index_order(np.full(1, sum(slots)), np.array(slots), np.zeros(len(slots), np.int64))
    active = Generation.of(3, dict.fromkeys(range(len(slots)), 0))
    states = {
        member: MemberState(0, ready=member < len(slots) + ready, leaving=member in leaving)
        for member in range(len(slots) + joining)
    }
    return Membership(placement, len(states) - len(leaving), states, active)


def test_nothing_is_to_be_done() -> None:
    """All wanted ranks hold experts, nobody else does."""
    members = membership([2, 2, 2])
    assert members.next_step() == NextStep("none")
    assert members.routable == (0, 1, 2)


def test_newcomers_wait_for_each_other() -> None:
    """They become ranks together, then get experts."""
    assert membership([2, 2], joining=2, ready=1).next_step() == NextStep("none")
    assert membership([2, 2], joining=2, ready=2).next_step() == NextStep("regroup", (0, 1, 2, 3))
    assert membership([2, 2, 0]).next_step() == NextStep("rebalance", (0, 1, 2))


def test_a_rank_leaves_without_experts() -> None:
    """First its experts go, then it does; whoever joins meanwhile comes with the same generation."""
    assert membership([2, 2, 2], leaving=(0,)).next_step() == NextStep("rebalance", (1, 2))
    assert membership([0, 3, 3], leaving=(0,)).next_step() == NextStep("regroup", (1, 2))
    both = membership([0, 3, 3], leaving=(0,), joining=1, ready=1)
    assert both.next_step() == NextStep("regroup", (1, 2, 3))


def test_who_leaves() -> None:
    """Newcomers first, then the highest numbers; or those that are named, if they are there and few enough."""
    members = membership([2, 2, 2], joining=1)
    assert members.choose_leaving(2, None) == [3, 2]
    assert members.choose_leaving(3, [1]) == [1]
    with pytest.raises(InputError, match="member 9 cannot leave"):
        members.choose_leaving(3, [9])
    with pytest.raises(InputError, match="when 1 of 4 ranks leave, 3 stay, which must be at most the 2"):
        members.choose_leaving(2, [1])


def test_who_is_kept_after_all() -> None:
    """Of those that were to leave: ranks first, then the lowest numbers; who is being ended cannot stay."""
    members = membership([2, 2, 2], joining=1, leaving=(0, 1, 2, 3))
    members.members[1].doomed = "it was told to"
    members.keep(1)
    assert members.wanted == [0]
    members.keep(2)
    assert members.wanted == [0, 2, 3]
    members.keep(9)
    assert members.members[1].leaving


def test_ranks_follow_nodes() -> None:
    """Ranks are sorted by node, then by member; nodes are numbered anew."""
    generation = Generation.of(1, {4: 7, 5: 2, 6: 7, 0: 7})
    assert generation.members == (5, 0, 4, 6)
    assert generation.nodes == (0, 1, 1, 1)
    assert Generation.from_json(generation.to_json()) == generation
