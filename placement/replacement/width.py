"""Placements for other ranks: ranks that join, leave or are lost, with as little moved as possible.

    joined = with_ranks(placement, [0, 1, 2, None])         rank 3 has no slots yet
    goal = rebalance(joined, holders=[0, 1, 2, 3])          the fewest experts move
    wide = with_slots(joined, np.maximum(joined.slots_of_rank, goal.slots_of_rank))     the same, with empty slots
    ... migrate from `wide` to `with_slots(goal, wide.slots_of_rank)`, then narrow to `goal`

Pure functions of their arguments, so that all ranks come to the same placement.

Shape letters: L MoE layers, E experts per layer, R ranks, C slots of a rank, S slots per layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.errors import InputError


@dataclass(frozen=True, eq=False)
class Adoption:
    """What survivors serve after a loss.

    Attributes:
        placement: theirs.
        adopted: (layer, expert, rank) of experts that no survivor held: the rank must read them from the checkpoint.
    """

    placement: Placement
    adopted: tuple[tuple[int, int, int], ...]


def with_ranks(
    placement: Placement, ranks: Sequence[int | None], *, node_of_rank: np.ndarray | None = None
) -> Placement:
    """The same experts on ranks that are numbered anew; None = a rank that joins, without slots.

    Args:
        ranks: per new rank, the old one; old ranks that are not named must hold nothing.
        node_of_rank: (R',) None = all in one node.

    Raises:
        InputError: an expert would have no slot.
    """
    parts = [placement.slot_to_expert[:, placement.slots_on(rank)] for rank in ranks if rank is not None]
    sizes = [0 if rank is None else int(placement.slots_of_rank[rank]) for rank in ranks]
    nodes = np.zeros(len(sizes), np.int64) if node_of_rank is None else node_of_rank
    return placement.replace(slot_to_expert=np.hstack(parts), slots_of_rank=np.array(sizes), node_of_rank=nodes)


def rebalance(placement: Placement, *, holders: Sequence[int], load: np.ndarray | None = None) -> Placement:
    """The experts on `holders` alone, as evenly as they divide, with the fewest fetched.

    Each layer keeps its number of filled slots (as far as different ranks can hold copies of an expert). An expert
    moves only from a rank that has too many to one that has too few; which one is chosen by load.

    Args:
        placement: in force.
        holders: ranks that hold experts afterwards.
        load: (L, E) routed assignments per expert; None = all alike.

    Raises:
        InputError: no rank is to hold anything.
    """
    if not holders:
        raise InputError("at least one rank must hold experts")
    load_LE = np.ones((placement.num_layers, placement.num_experts)) if load is None else np.asarray(load, float) + 1
    ranks = range(placement.num_ranks)
    held_LR = [[_experts_on(placement, layer, rank) for rank in ranks] for layer in range(placement.num_layers)]
    room_R = _room(placement, held_LR, holders)
    rows = []
    for layer, held_R in enumerate(held_LR):
        share_E = load_LE[layer] / np.maximum(placement.replica_counts[layer], 1)
        _even_out(held_R, _layer_room(held_R, room_R, int(placement.experts_per_layer[layer])), share_E)
        rows.append(np.concatenate([_seat(placement, layer, r, held_R[r], room_R[r]) for r in ranks]))
    return placement.replace(slot_to_expert=np.stack(rows), slots_of_rank=np.array(room_R))


def adopt(
    slots_of_survivors: Sequence[np.ndarray], experts_per_layer: np.ndarray, node_of_rank: np.ndarray, **fields: Any
) -> Adoption:
    """The placement of survivors: what each holds stays; what none holds goes to those that hold the least.

    Args:
        slots_of_survivors: per new rank (L, C) the experts of its slots; a joined rank has C = 0.
        experts_per_layer: (L,).
        node_of_rank: (R,).
        fields: of the placement.
    """
    ranks = len(slots_of_survivors)
    adopted: list[tuple[int, int, int]] = []
    taken: list[list[list[int]]] = []  # [layer][rank] experts to add
    for layer, count in enumerate(np.asarray(experts_per_layer).tolist()):
        held_R = [set(slots[layer].tolist()) - {EMPTY_SLOT} for slots in slots_of_survivors]
        added_R: list[list[int]] = [[] for _ in range(ranks)]
        for expert in sorted(set(range(count)) - set().union(*held_R)):
            rank = min(range(ranks), key=lambda r: (len(held_R[r]), r))
            held_R[rank].add(expert)
            added_R[rank].append(expert)
            adopted.append((layer, expert, rank))
        taken.append(added_R)
    columns = []
    for rank, slots in enumerate(slots_of_survivors):
        free = [int((row == EMPTY_SLOT).sum()) for row in slots]
        more = max(max(len(taken[layer][rank]) - free[layer], 0) for layer in range(len(free)))
        own = np.hstack([slots, np.full((len(slots), more), EMPTY_SLOT)]).astype(np.int32)
        for layer, row in enumerate(own):
            row[np.flatnonzero(row == EMPTY_SLOT)[: len(taken[layer][rank])]] = taken[layer][rank]
        columns.append(own)
    slots = np.array([own.shape[1] for own in columns])
    return Adoption(Placement(np.hstack(columns), slots, node_of_rank, experts_per_layer, **fields), tuple(adopted))


def _experts_on(placement: Placement, layer: int, rank: int) -> set[int]:
    return set(placement.slot_to_expert[layer, placement.slots_on(rank)].tolist()) - {EMPTY_SLOT}


def _room(placement: Placement, held_LR: list[list[set[int]]], holders: Sequence[int]) -> list[int]:
    """Slots of each rank afterwards: even, the odd ones where most is held already."""
    filled = max(
        min(sum(map(len, held_R)), int(count) * len(holders))
        for held_R, count in zip(held_LR, placement.experts_per_layer, strict=True)
    )
    held = {rank: sum(len(held_R[rank]) for held_R in held_LR) for rank in holders}
    room_R = [0] * placement.num_ranks
    for index, rank in enumerate(sorted(holders, key=lambda r: (-held[r], r))):
        room_R[rank] = filled // len(holders) + (index < filled % len(holders))
    return room_R


def _layer_room(held_R: list[set[int]], room_R: list[int], experts: int) -> list[int]:
    """Filled slots of each rank in a layer that may have fewer than others: even, and never an expert twice."""
    filled = min(sum(map(len, held_R)), sum(min(room, experts) for room in room_R))
    taken_R = [0] * len(room_R)
    for _ in range(filled):
        open_ranks = [rank for rank, room in enumerate(room_R) if taken_R[rank] < min(room, experts)]
        # A slot goes where it is filled already; else where the fewest are.
        taken_R[min(open_ranks, key=lambda r: (taken_R[r], -len(held_R[r]), r))] += 1
    return taken_R


def _even_out(held_R: list[set[int]], room_R: list[int], share_E: np.ndarray) -> None:
    """Move experts from ranks with too many to ranks with too few; in place."""
    mean = float(sum(share_E[e] for held in held_R for e in held)) / max(sum(room > 0 for room in room_R), 1)
    ranks = range(len(held_R))
    while short := [rank for rank in ranks if len(held_R[rank]) < room_R[rank]]:
        load_R = [float(sum(share_E[e] for e in sorted(held))) for held in held_R]
        receiver = min(short, key=lambda r: (load_R[r] - mean) / (room_R[r] - len(held_R[r])))
        wanted = (mean - load_R[receiver]) / (room_R[receiver] - len(held_R[receiver]))
        donors = [rank for rank in ranks if len(held_R[rank]) > room_R[rank]]
        choices = [(rank, expert) for rank in donors for expert in sorted(held_R[rank] - held_R[receiver])]
        if choices:
            donor, expert = min(choices, key=lambda c: (abs(float(share_E[c[1]]) - wanted), c))
            held_R[donor].remove(expert)
            held_R[receiver].add(expert)
            continue
        # All that is too much elsewhere is here already: one of those copies goes, and another expert gets a copy.
        copies = {e: sum(e in held for held in held_R) for held in held_R for e in held}
        held_R[receiver].add(min(set(copies) - held_R[receiver], key=lambda e: (copies[e], -share_E[e], e)))
        if donors:
            held_R[donors[0]].remove(max(held_R[donors[0]], key=lambda e: (copies[e], -e)))
    for rank in ranks:  # more copies than ranks to hold them: drop those that exist elsewhere
        while len(held_R[rank]) > room_R[rank]:
            copies = {e: sum(e in held for held in held_R) for e in held_R[rank]}
            held_R[rank].remove(max(held_R[rank], key=lambda e: (copies[e], -share_E[e], -e)))


def _seat(placement: Placement, layer: int, rank: int, held: set[int], room: int) -> np.ndarray:
    """(room,) the experts of a rank in its slots; those that stay keep theirs where it still exists."""
    row = np.full(room, EMPTY_SLOT, np.int32)
    before = placement.slot_to_expert[layer, placement.slots_on(rank)][:room].tolist()
    for slot, expert in enumerate(before):
        if expert in held:
            row[slot] = expert
    others = sorted(held - set(row.tolist()))
    row[np.flatnonzero(row == EMPTY_SLOT)[: len(others)]] = others
    return row
