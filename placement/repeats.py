"""Empty slots of a placement as engines take them: each repeats an expert of its rank, which changes nothing.

Shape letters: L MoE layers, E experts per layer, S slots per layer.
"""

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, Placement


def without_bare_ranks(placement: Placement) -> Placement:
    """The placement with one replica on each rank that holds no expert of a layer: expert 0, as good as any."""
    table = placement.slot_to_expert.copy()
    for layer, rank in np.argwhere(~(placement.copies_LER > 0).any(axis=1)).tolist():
        table[layer, placement.slots_on(rank).start] = 0
    return placement.replace(slot_to_expert=table)


def repeat_experts(placement: Placement) -> tuple[np.ndarray, int]:
    """((L, S) expert of every slot, number of slots filled): an empty slot repeats an expert that its rank holds.

    An engine that chooses among slots of an expert finds them all on one rank, where the expert has no replica: this
    changes neither traffic nor load. Where a rank holds none such it repeats one with replicas. No rank may be bare.
    """
    table = placement.slot_to_expert.copy()
    empty = np.argwhere(table == EMPTY_SLOT)
    for layer, slot in empty.tolist():
        held_E = placement.copies_LER[layer, :, placement.rank_of_slot[slot]] > 0
        single_E = held_E & (placement.replica_counts[layer] == 1)
        table[layer, slot] = int((single_E if single_E.any() else held_E).argmax())
    return table, len(empty)
