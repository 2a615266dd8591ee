"""Omni (omni-infer): a `.npy` pattern (R, L, E) with 1 where the expert is on the rank; slot order is implied."""

from pathlib import Path

import numpy as np

from moeplace.placement.engines.form import Export, Facts, Rows, check_form
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.containers.npz import read_npy
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import atomic_write

NOTE = "Omni numbers the slots of a rank by rising expert id: the order of slots inside ranks is not kept"


def write(placement: Placement, path: Path) -> Export:
    """Write the pattern as int32; empty slots are fine where all ranks of a layer hold equally many experts."""
    if path.suffix != ".npy":
        raise InputError(f"{path} must end in .npy: Omni loads a numpy array")
    check_form(placement, "Omni", allow_empty=True)
    pattern_RLE = placement.copies_LER.transpose(2, 0, 1).astype(np.int32)
    what_to_do = ""
    if (placement.slot_to_expert == EMPTY_SLOT).any():
        what_to_do = (
            ": some slots are empty; solve without --leave-empty, with a looser --max-imbalance or fewer slots per rank"
        )
    _check_counts(pattern_RLE, "Omni", what_to_do)
    most = pattern_RLE.sum(axis=2).max()
    if most != placement.slots_of_rank[0]:
        raise InputError(
            f"Omni cannot express slots that are empty in every layer: MoE layer 0, as all others, uses at most {most} "
            f"of the {placement.slots_of_rank[0]} slots per rank"
        )
    with atomic_write(path) as file:
        np.save(file, np.ascontiguousarray(pattern_RLE), allow_pickle=False)
    start = (
        f"pattern_path: {path}, max_moe_layer_num: {placement.num_layers}, "
        f"max_redundant_per_expert: {int(placement.replica_counts.max())}, "
        f"max_redundant_per_rank: {int(most) - placement.num_experts // placement.num_ranks} (in its config YAML)"
    )
    return Export((str(path),), start, (NOTE,))


def read(path: Path, known: Facts) -> Rows:
    """Read rows with the slots of a rank in the order of their experts; shorter layers leave slots empty."""
    pattern_RLE = read_npy(path)
    if pattern_RLE.ndim != 3 or not pattern_RLE.size:
        raise FormatError(f"{path} is not an Omni pattern: it must be an array (ranks, MoE layers, experts)")
    if pattern_RLE.dtype.kind not in "iub" or not np.isin(pattern_RLE, (0, 1)).all():
        raise FormatError(f"{path} is not an Omni pattern: its entries must be the integers 0 and 1")
    _check_counts(pattern_RLE, str(path))
    ranks, layers, experts = pattern_RLE.shape
    width = int(pattern_RLE.sum(axis=2, dtype=np.int64).max())
    rows = np.full((layers, ranks, width), EMPTY_SLOT)
    for rank, layer in np.ndindex(ranks, layers):
        held = np.flatnonzero(pattern_RLE[rank, layer])
        rows[layer, rank, : len(held)] = held
    return Rows(rows.reshape(layers, -1).tolist(), Facts(num_ranks=ranks, num_experts=experts))


def _check_counts(pattern_RLE: np.ndarray, who: str, what_to_do: str = "") -> None:
    counts_RL = pattern_RLE.sum(axis=2, dtype=np.int64)
    uneven_L = (counts_RL != counts_RL[0]).any(axis=0)
    if uneven_L.any():
        layer = int(uneven_L.argmax())
        raise FormatError(
            f"{who}: all ranks must hold equally many experts of a layer, but in MoE layer {layer} they hold "
            f"{counts_RL[:, layer].tolist()}{what_to_do}"
        )
