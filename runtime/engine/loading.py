"""Reading this rank's share of a checkpoint."""

import numpy as np
import torch

from moeplace.placement.placement import Placement
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.weights import ExpertWeights
from moeplace.runtime.models.checkpoint import Checkpoint


def load_experts(
    checkpoint: Checkpoint,
    placement: Placement,
    rank: int,
    staging_rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> ExpertStore:
    """Read the experts that `placement` gives to a rank, and no others."""
    here = placement.slots_on(rank)
    slots, shapes = here.stop - here.start, checkpoint.family.forms[0].shapes

    def room(rows: int) -> ExpertWeights:
        return ExpertWeights.of_shapes(rows, shapes, dtype=dtype, device=device)

    store = ExpertStore(
        [room(slots) for _ in range(checkpoint.num_layers)],
        slots=slots,
        staging=room(staging_rows),
    )
    for layer, experts in enumerate(np.asarray(placement.slot_to_expert)[:, here]):
        for slot, expert in enumerate(experts):
            if expert >= 0:
                store.load(layer, slot, int(expert), checkpoint.expert(layer, int(expert)))
    return store
