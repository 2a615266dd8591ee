"""How a migration plan is cut: into groups of rounds that are committed together, and these into pieces, one per step.

Pure functions of (placement, plan, budgets), so that all ranks cut alike without asking each other.

Shape letters: R ranks, L MoE layers, S slots per layer.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moeplace.placement.migration.copies import CHECKPOINT
from moeplace.placement.migration.plan import MigrationPlan, apply_plan, replay
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.errors import InputError


class Arrival(NamedTuple):
    """An expert that a rank gets into a staging row."""

    layer: int
    expert: int
    sender: int
    """Rank, or CHECKPOINT."""
    receiver: int
    size: int
    """Bytes."""
    round: int
    """Round of the plan."""


class Piece(NamedTuple):
    """Bytes [start, stop) of an arrival: what travels of it in one step."""

    arrival: Arrival
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Commit:
    """Rounds that become visible together.

    Attributes:
        end: index after the last of its rounds.
        arrivals: what must have come before; arrivals of a cycle may land in a later commit.
        before: placement at the start of the migration.
        slots: (L, S) experts in force afterwards.
        tier: (L, S) memory of the slots afterwards; None = experts keep the tier that they have.
    """

    end: int
    arrivals: tuple[Arrival, ...]
    before: Placement
    slots: np.ndarray
    tier: np.ndarray | None = None

    @cached_property
    def placement(self) -> Placement:
        """In force afterwards; made when it is needed, because a plan may have many commits."""
        stated = {} if self.tier is None else {"tier": self.tier}
        return self.before.replace(slot_to_expert=self.slots, **stated)


def list_commits(
    old: Placement, plan: MigrationPlan, *, staging_rows: int, expert_bytes: Callable[[int, int], int]
) -> list[Commit]:
    """The plan as commits, each with as many rounds as the ranks have room for; none when nothing changes.

    Args:
        old: placement in force.
        staging_rows: experts, of whatever layers, that a rank can hold beyond its slots.
        expert_bytes: (layer, expert) -> its bytes.

    Raises:
        InputError: the plan starts from another placement, changes ranks or slots, or stages more than there is room.
    """
    _check_membership(old, plan)
    if plan.new_digest == plan.old_digest and plan.is_empty:
        return []
    served = replay(old, plan)
    state, commits = next(served), list[Commit]()
    arrivals: list[Arrival] = []
    room = _Room(state, plan, staging_rows, [])
    for index, after in enumerate(served):
        coming = _arrivals(plan, index, expert_bytes)
        room.add(index, coming)
        if room.is_exceeded:
            commits.append(Commit(index, tuple(arrivals), old, state))
            carried = [item for item in room.items if index <= item.lands and item.arrival.round < index]
            arrivals, room = [], _Room(state, plan, staging_rows, carried)
            room.add(index, coming)
            room.check()
        arrivals += coming
        state = after
    final = apply_plan(old, plan)
    tier = np.zeros_like(final.slot_to_expert) if final.tier is None else final.tier
    return [*commits, Commit(len(plan.rounds), tuple(arrivals), old, final.slot_to_expert, tier)]


def cut_pieces(arrivals: Sequence[Arrival], *, num_ranks: int, bytes_per_step: int) -> Iterator[list[Piece]]:
    """Pieces of one step after another: no rank sends or receives more than `bytes_per_step` in a step.

    Earlier arrivals go first. What comes from the checkpoint is read whole, in a step in which its rank receives
    nothing else unless it fits.
    """
    left = [(arrival, 0) for arrival in arrivals]
    while left:
        out_R, in_R = [bytes_per_step] * num_ranks, [bytes_per_step] * num_ranks
        pieces: list[Piece] = []
        kept: list[tuple[Arrival, int]] = []
        for index, (arrival, start) in enumerate(left):
            stop = start + _fitting(arrival, start, out_R, in_R, bytes_per_step)
            if stop < arrival.size:
                kept.append((arrival, stop))
            if stop > start:
                pieces.append(Piece(arrival, start, stop))
                if not any(in_R):  # nobody can receive more
                    kept += left[index + 1 :]
                    break
        left = kept
        yield pieces


def _fitting(arrival: Arrival, start: int, out_R: list[int], in_R: list[int], budget: int) -> int:
    """Bytes of the arrival that this step still has room for; takes them from the room of both ranks."""
    wanted, room = arrival.size - start, in_R[arrival.receiver]
    if arrival.sender == CHECKPOINT:
        taken = wanted if wanted <= room or room == budget else 0
    else:
        taken = min(wanted, room, out_R[arrival.sender])
        out_R[arrival.sender] -= taken
    in_R[arrival.receiver] = max(room - taken, 0)
    return taken


def _check_membership(old: Placement, plan: MigrationPlan) -> None:
    layout = plan.layout
    same_slots = np.array_equal(layout.old_slots_of_rank, layout.new_slots_of_rank)
    if not same_slots or layout.lost_ranks or not np.array_equal(layout.origin, np.arange(old.num_ranks)):
        raise InputError("the plan changes the ranks or their slots; a live migration keeps both")
    if not np.array_equal(plan.node_of_rank, old.node_of_rank):
        raise InputError("the plan moves ranks to other nodes; a live migration keeps them")
    if plan.old_digest != old.digest:
        raise InputError(f"the plan starts from the placement {plan.old_digest}, in force is {old.digest}")


def _arrivals(plan: MigrationPlan, index: int, expert_bytes: Callable[[int, int], int]) -> list[Arrival]:
    """What ranks get in a round; a move inside a rank only renames a row."""
    found = []
    for transfer in plan.rounds[index]:
        sender, receiver = plan.members(transfer)
        if sender != receiver:
            size = expert_bytes(transfer.layer, transfer.expert)
            found.append(Arrival(transfer.layer, transfer.expert, sender, receiver, size, index))
    return found


class _Staged(NamedTuple):
    """An arrival that has not landed."""

    arrival: Arrival
    lands: int


class _Room:
    """What ranks hold beside the experts in force, between two commits.

    Attributes:
        items: arrivals since the commit before, and those from earlier that have not landed.
    """

    def __init__(self, served_LS: np.ndarray, plan: MigrationPlan, rows: int, items: list[_Staged]) -> None:
        """`served_LS`: experts in force."""
        self.items = list(items)
        self._plan, self._rows = plan, rows
        empty_LR = np.zeros((len(served_LS), len(plan.layout.old_slots_of_rank)), np.int64)
        layer, slot = np.nonzero(served_LS == EMPTY_SLOT)
        np.add.at(empty_LR, (layer, plan.layout.member_of_place[slot]), 1)
        self._empty_LR = empty_LR
        self._left: Counter[tuple[int, int]] = Counter()  # (layer, rank) -> arrivals into rows of empty slots
        self.staged: Counter[int] = Counter()  # rank -> arrivals into staging rows
        for item in items:
            self._take(item.arrival)

    def add(self, index: int, arrivals: Sequence[Arrival]) -> None:
        """Take what arrives in a round."""
        lands = {(t.layer, t.expert, self._plan.members(t)[1]): t.lands for t in self._plan.rounds[index]}
        for arrival in arrivals:
            key = (arrival.layer, arrival.expert, arrival.receiver)
            self.items.append(_Staged(arrival, lands[key]))
            self._take(arrival)

    @property
    def is_exceeded(self) -> bool:
        """Whether some rank would hold more than it has rows."""
        return any(count > self._rows for count in self.staged.values())

    def check(self) -> None:
        """Raises InputError where a single round is too much already."""
        if self.is_exceeded:
            rank, count = self.staged.most_common(1)[0]
            raise InputError(
                f"the plan stages {count} experts on rank {rank} at a time, but there are {self._rows} staging rows; "
                "plan with a smaller staging budget or give more rows"
            )

    def _take(self, arrival: Arrival) -> None:
        place = (arrival.layer, arrival.receiver)
        if self._left[place] < self._empty_LR[place]:
            self._left[place] += 1
        else:
            self.staged[arrival.receiver] += 1
