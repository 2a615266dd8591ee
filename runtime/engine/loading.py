"""Reading this rank's share of a checkpoint."""

import numpy as np
import torch

from moeplace.placement.placement import Placement
from moeplace.runtime.experts.store import ExpertStore
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
    slots = here.stop - here.start
    store = ExpertStore(
        [checkpoint.room(slots, dtype=dtype, device=device) for _ in range(checkpoint.num_layers)],
        slots=slots,
        staging=checkpoint.room(staging_rows, dtype=dtype, device=device),
    )
    for layer, experts in enumerate(np.asarray(placement.slot_to_expert)[:, here]):
        for slot, expert in enumerate(experts):
            if expert >= 0:
                store.load(layer, slot, int(expert), checkpoint.expert(layer, int(expert)))
    return store
