"""How a migration plan is cut: into groups of rounds that are committed together, and these into pieces, one per step.

Pure functions of (placement, plan, budgets), so that all ranks cut alike without asking each other.

Shape letters: R ranks, L MoE layers, S slots per layer.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moeplace.placement.migration import MigrationPlan, apply_plan, replay
from moeplace.placement.migration_copies import CHECKPOINT
from moeplace.placement.placement import Placement
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
        placement: in force afterwards.
    """

    end: int
    arrivals: tuple[Arrival, ...]
    placement: Placement


def list_commits(
    old: Placement, plan: MigrationPlan, *, staging_rows: int, expert_bytes: Callable[[int], int]
) -> list[Commit]:
    """The plan as commits, each with as many rounds as the staging rows hold; none when nothing changes.

    Args:
        old: placement in force.
        staging_rows: experts of a layer that a rank can hold beyond its slots.
        expert_bytes: bytes of an expert of a layer.

    Raises:
        InputError: the plan starts from another placement, changes ranks or slots, or stages more than there is room.
    """
    _check_membership(old, plan)
    if plan.new_digest == plan.old_digest and plan.is_empty:
        return []
    arrivals = [_arrivals(plan, index, expert_bytes) for index in range(len(plan.rounds))]
    ends = _ends(plan, staging_rows)
    states = {index: slots_LS for index, slots_LS in enumerate(replay(old, plan)) if index in ends[:-1]}
    placements = [old.replace(slot_to_expert=states[end]) for end in ends[:-1]] + [apply_plan(old, plan)]
    return [
        Commit(end, tuple(arrival for found in arrivals[start:end] for arrival in found), placement)
        for start, end, placement in zip([0, *ends], ends, placements, strict=False)
    ]


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


def _arrivals(plan: MigrationPlan, index: int, expert_bytes: Callable[[int], int]) -> list[Arrival]:
    """What ranks get in a round; a move inside a rank only renames a row."""
    found = []
    for transfer in plan.rounds[index]:
        sender, receiver = plan.members(transfer)
        if sender != receiver:
            size = expert_bytes(transfer.layer)
            found.append(Arrival(transfer.layer, transfer.expert, sender, receiver, size, index))
    return found


def _ends(plan: MigrationPlan, staging_rows: int) -> list[int]:
    """Index after the last round of each commit: a new one begins where some rank would run out of rows."""
    ends: list[int] = []
    staged: list[tuple[int, tuple[int, int]]] = []  # round of landing, (rank, layer)
    for index, transfers in enumerate(plan.rounds):
        coming = []
        for transfer in transfers:
            sender, receiver = plan.members(transfer)
            if sender != receiver:
                coming.append((transfer.lands, (receiver, transfer.layer)))
        if _most(staged + coming)[1] > staging_rows:
            staged = [item for item in staged if item[0] >= index]
            ends.append(index)
            (rank, layer), count = _most(staged + coming)
            if index == 0 or count > staging_rows:
                raise InputError(
                    f"the plan stages {count} experts of MoE layer {layer} on rank {rank} at a time, but there are "
                    f"{staging_rows} staging rows; plan with a smaller staging budget or give more rows"
                )
        staged += coming
    return [*ends, len(plan.rounds)]


def _most(staged: Sequence[tuple[int, tuple[int, int]]]) -> tuple[tuple[int, int], int]:
    """The (rank, layer) with the most experts staged, and their number."""
    return max(Counter(place for _, place in staged).most_common(1), default=((0, 0), 0))
