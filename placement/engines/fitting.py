"""Placements changed so that an engine can load them: empty slots filled, layers added that no recording has.

Shape letters: L MoE layers, E experts per layer, R ranks, C slots per rank, S = R*C slots per layer.
"""

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.errors import InputError


def fill_empty_slots(placement: Placement) -> tuple[Placement, int]:
    """(placement, number of slots filled): every empty slot gets a replica that its rank lacks.

    Experts with the fewest replicas go first, those of lower number among equals; slots of ranks that hold every
    expert already stay empty.
    """
    table = placement.slot_to_expert.copy()
    copies_LER = placement.copies_LER.astype(np.int64)
    filled = 0
    for layer, slot in np.argwhere(table == EMPTY_SLOT).tolist():
        rank, experts = int(placement.rank_of_slot[slot]), int(placement.experts_per_layer[layer])
        replicas_E = copies_LER[layer, :experts].sum(axis=1)
        replicas_E[copies_LER[layer, :experts, rank] > 0] = np.iinfo(np.int64).max
        expert = int(replicas_E.argmin())
        if replicas_E[expert] == np.iinfo(np.int64).max:
            continue
        table[layer, slot] = expert
        copies_LER[layer, expert, rank] += 1
        filled += 1
    return placement.replace(slot_to_expert=table), filled


def add_layers(placement: Placement, layer_ids: tuple[int, ...]) -> Placement:
    """The placement with further decoder layers as MoE layers: slot `p` holds expert `p % E`, as engines start.

    Raises:
        InputError: a layer is there already, or is named twice; or ranks or layers differ in what they hold.
    """
    assert placement.layer_ids is not None
    own = placement.layer_ids.tolist()
    known = sorted(set(own) & set(layer_ids))
    if known or len(set(layer_ids)) < len(layer_ids):
        raise InputError(f"decoder layer {known[0] if known else layer_ids[0]} is there already: it cannot be added")
    experts, slots_R = placement.experts_per_layer, placement.slots_of_rank
    if (experts != experts[0]).any() or slots_R.max() > experts[0]:
        raise InputError(f"layers can be added where all have one number of experts, not {experts.tolist()}")
    row = np.arange(placement.num_slots) % experts[0]
    order = np.argsort([*own, *layer_ids])
    table = np.concatenate([placement.slot_to_expert, np.tile(row, (len(layer_ids), 1))])[order]
    every = np.array([*own, *layer_ids])[order]
    return Placement(
        table,
        slots_R,
        placement.node_of_rank,
        np.full(len(table), experts[0]),
        every,
        max(placement.num_hidden_layers, int(every[-1]) + 1),
        placement.mode,
    )
