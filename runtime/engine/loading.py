"""Reading this rank's share of a checkpoint."""

import numpy as np
import torch

from moeplace.placement.placement import Placement
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.experts.tiered_store import TieredStore
from moeplace.runtime.experts.weights import LayerWeights
from moeplace.runtime.models.checkpoint import Checkpoint


def load_experts(
    checkpoint: Checkpoint,
    placement: Placement,
    rank: int,
    limits: EngineLimits,
    dtype: torch.dtype,
    device: torch.device,
) -> ExpertStore:
    """Read the experts that `placement` gives to a rank, and no others.

    Raises:
        InputError: fast memory holds no expert beside those in transit.
    """
    here = placement.slots_on(rank)
    slots = here.stop - here.start
    if limits.tiers is None:
        store = ExpertStore(
            [checkpoint.room(slots, dtype=dtype, device=device, layer=layer) for layer in range(checkpoint.num_layers)],
            slots=slots,
            staging=checkpoint.room(limits.staging_rows, dtype=dtype, device=device),
        )
    else:
        store = _tiered_store(checkpoint, slots, limits.tiers, limits.staging_rows, dtype, device)
    for layer, experts in enumerate(np.asarray(placement.slot_to_expert)[:, here]):
        for slot, expert in enumerate(experts):
            if expert >= 0:
                store.load(layer, slot, int(expert), checkpoint.expert(layer, int(expert)))
    return store


def _tiered_store(
    checkpoint: Checkpoint,
    slots: int,
    tiers: TierLimits,
    staging_rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> TieredStore:
    """Room on the host and in fast memory; staging rows are host rows, and taken from those."""
    layers, host = checkpoint.num_layers, torch.device("cpu")
    in_host = slots
    if tiers.host_slots is not None:
        in_host = min(slots, max(tiers.host_slots - -(-staging_rows // layers), 0))

    def room_on_host(rows: int, layer: int | None) -> LayerWeights:
        room = checkpoint.room(rows, dtype=dtype, device=host, layer=layer)
        return room.pinned() if device.type == "cuda" else room

    return TieredStore(
        [room_on_host(in_host, layer) for layer in range(layers)],
        slots=slots,
        staging=room_on_host(staging_rows, None),
        pool=checkpoint.room(tiers.fast_slots * layers, dtype=dtype, device=device),
        limits=tiers,
        read=checkpoint.expert,
    )
