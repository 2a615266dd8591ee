"""Replicas where experts do not fit: a replica in fast memory takes the row of another expert.

It can only help where computing, not loading, is what a step waits for: its tokens are shared by two ranks. A replica
that is backed helps nobody, because a rank that is sent tokens has to load it.

Shape letters: L MoE layers, E experts per layer, R ranks, S slots per layer.
"""

import numpy as np

from moeplace.placement.memory import HOST, RESIDENT
from moeplace.placement.placement import EMPTY_SLOT, Placement


def without_replicas(placement: Placement, asked_LE: np.ndarray) -> Placement:
    """Every expert in one of its slots, the most wanted first, on the rank that is asked for least so far.

    Args:
        placement: with replicas, without tiers.
        asked_LE: (L, E) how often each expert is asked for.
    """
    slots = placement.slot_to_expert.copy()
    for layer, row_S in enumerate(slots):
        asked_R = np.zeros(placement.num_ranks)
        for expert in np.argsort(-asked_LE[layer], kind="stable"):
            here = np.flatnonzero(row_S == expert)
            if len(here):
                kept = here[asked_R[placement.rank_of_slot[here]].argmin()]
                asked_R[placement.rank_of_slot[kept]] += asked_LE[layer, expert]
                row_S[here[here != kept]] = EMPTY_SLOT
    return placement.replace(slot_to_expert=slots)


def with_replicas(placement: Placement, asked_LE: np.ndarray, room_R: np.ndarray, count: int) -> Placement | None:
    """A second slot, in fast memory, for the `count` most wanted experts of every layer; None where none has room.

    Each goes to the rank, of those with an empty slot and without the expert, that has a row left or whose residents
    are wanted least; there the least wanted resident of all layers gives up its row.

    Args:
        placement: with tiers, experts in one slot each.
        asked_LE: (L, E) how often each expert is asked for.
        room_R: (R,) residents that each rank has room for, over all layers.
        count: replicas of a layer.
    """
    slots = placement.slot_to_expert.copy()
    tier = np.zeros(slots.shape, np.int8) if placement.tier is None else placement.tier.copy()
    added = 0
    for layer in range(placement.num_layers):
        for expert in np.argsort(-asked_LE[layer], kind="stable")[:count].tolist():
            added += _add(placement, slots, tier, asked_LE, room_R, layer, expert)
    return placement.replace(slot_to_expert=slots, tier=tier) if added else None


def _add(
    placement: Placement,
    slots_LS: np.ndarray,
    tier_LS: np.ndarray,
    asked_LE: np.ndarray,
    room_R: np.ndarray,
    layer: int,
    expert: int,
) -> bool:
    """Give an expert a further slot, if there is a rank for it."""
    rank_S = placement.rank_of_slot
    free_R = np.bincount(rank_S[slots_LS[layer] == EMPTY_SLOT], minlength=placement.num_ranks) > 0
    free_R[rank_S[slots_LS[layer] == expert]] = False
    resident_LS = (tier_LS == RESIDENT) & (slots_LS != EMPTY_SLOT)
    wanted_LS = np.where(resident_LS, np.take_along_axis(asked_LE, slots_LS.clip(0), axis=1), np.inf)
    least_R = np.array([wanted_LS[:, placement.slots_on(rank)].min() for rank in range(placement.num_ranks)])
    least_R[np.bincount(rank_S, resident_LS.sum(axis=0), placement.num_ranks) < room_R] = -1.0
    least_R[~free_R] = np.inf
    rank = int(least_R.argmin())
    if least_R[rank] >= asked_LE[layer, expert]:
        return False
    here = placement.slots_on(rank)
    if least_R[rank] >= 0:
        gone_layer, gone = np.unravel_index(wanted_LS[:, here].argmin(), wanted_LS[:, here].shape)
        tier_LS[gone_layer, here.start + gone] = HOST
    slot = here.start + int(np.flatnonzero(slots_LS[layer, here] == EMPTY_SLOT)[0])
    slots_LS[layer, slot], tier_LS[layer, slot] = expert, RESIDENT
    return True
