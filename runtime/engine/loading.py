"""Reading this rank's share of a checkpoint."""

import numpy as np

from moeplace.placement.placement import Placement
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.weights import ExpertWeights
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.decoder import Decoder


def load_experts(
    checkpoint: Checkpoint, decoder: Decoder, placement: Placement, rank: int, *, staging_rows: int
) -> ExpertStore:
    """Read the experts that `placement` gives to a rank, and no others."""
    here = placement.slots_on(rank)
    slots = here.stop - here.start
    hidden, expert_hidden = checkpoint.expert_shape()
    bias = "gate_up_bias" in checkpoint.expert(0, 0)

    def room(rows: int) -> ExpertWeights:
        return ExpertWeights.empty(rows, hidden, expert_hidden, bias=bias, dtype=decoder.dtype, device=decoder.device)

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
