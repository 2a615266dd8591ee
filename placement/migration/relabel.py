"""Rank relabelling: which rank takes which bin of experts, so that the most bytes stay where they are.

A solver returns bins; which of several equal ranks takes which bin costs nothing to serve and a lot to move. One layer
is an assignment problem: rows = ranks, columns = bins, value = bytes that a rank holds already. With several nodes,
ranks are permuted within nodes and equal nodes as blocks. A change of width needs no special case: a rank that joined
holds nothing.

Shape letters: L MoE layers, E experts per layer, R ranks, N nodes, S slots per layer.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplace.placement.cluster import Cluster
from moeplace.placement.placement import EMPTY_SLOT, Placement, slot_starts
from moeplace.placement.symmetry import Symmetry
from moeplace.profiling.errors import InputError

ExpertBytes = np.ndarray | int | None
"""Bytes of each expert: (L, E), one number for all, or None = 1 (then bytes are counts of experts)."""


def relabel_to(
    previous: Placement,
    slot_to_expert: np.ndarray,
    cluster: Cluster,
    *,
    per_layer: bool,
    expert_bytes: ExpertBytes = None,
    origin: np.ndarray | None = None,
) -> np.ndarray:
    """The same bins on other, equal ranks, so that the most bytes of `previous` stay put.

    Ranks are equal when slots, speed and distances to all others are; only then may they be exchanged. Inside a rank,
    an expert that stays keeps its slot.

    Args:
        previous: placement in force, of any cluster shape.
        slot_to_expert: (L, S) integers for `cluster`, -1 = empty.
        cluster: where the bins will sit.
        per_layer: True = the exact optimum of every layer; False = the best relabelling common to all layers, which
            leaves the stay rate of `coherent` mode as it is.
        expert_bytes: (L, E) bytes, one number, or None to count experts.
        origin: (R,) old rank that each rank of `cluster` is, -1 = it joined; None = equal numbers.

    Returns:
        (L, S) int32.

    Raises:
        InputError: shapes disagree.
    """
    slots_LS = np.asarray(slot_to_expert, dtype=np.int32)
    shape = (previous.num_layers, cluster.num_slots)
    if slots_LS.shape != shape:
        raise InputError(f"slot_to_expert of shape {slots_LS.shape} must be (layers, slots) {shape}")
    origin_R = check_origin(origin, previous.num_ranks, cluster.num_ranks)
    old_LRE = held_experts(previous, origin_R)
    new_LRE = _members(slots_LS, cluster.rank_of_slot, cluster.num_ranks, previous.num_experts)
    weight_LRE = old_LRE * bytes_per_expert(previous, expert_bytes)[:, None, :].astype(np.float64)
    common_LRR = np.matmul(weight_LRE, new_LRE.transpose(0, 2, 1).astype(np.float64))
    symmetry = Symmetry(cluster)
    if not per_layer:
        common_LRR = np.broadcast_to(common_LRR.sum(axis=0), common_LRR.shape)
    tie = np.eye(cluster.num_ranks)  # among the most bytes, the least changed
    bins_LR = np.stack([symmetry.best_names(common_RR * (len(tie) + 1) + tie) for common_RR in common_LRR])
    return _seat(previous, slots_LS, cluster, bins_LR, origin_R)


def seat_to(previous: Placement, slot_to_expert: np.ndarray, cluster: Cluster) -> np.ndarray:
    """(L, S) int32 the same bins on the same ranks, every expert that stays in its old slot."""
    bins_LR = np.tile(np.arange(cluster.num_ranks), (previous.num_layers, 1))
    origin_R = check_origin(None, previous.num_ranks, cluster.num_ranks)
    return _seat(previous, np.asarray(slot_to_expert, dtype=np.int32), cluster, bins_LR, origin_R)


def moves(previous: Placement, new: Placement, *, origin: np.ndarray | None = None) -> np.ndarray:
    """(L,) int64 experts that a rank must fetch; a change of slot inside a rank is none."""
    return _fetched(previous, new, origin).sum(axis=(1, 2))


def moved_bytes(
    previous: Placement, new: Placement, *, expert_bytes: ExpertBytes = None, origin: np.ndarray | None = None
) -> int:
    """Bytes that all ranks together must fetch."""
    return int(moved_bytes_by_layer(previous, new, expert_bytes=expert_bytes, origin=origin).sum())


def moved_bytes_by_layer(
    previous: Placement, new: Placement, *, expert_bytes: ExpertBytes = None, origin: np.ndarray | None = None
) -> np.ndarray:
    """(L,) int64, the same by layer."""
    fetched_LE = _fetched(previous, new, origin).sum(axis=1)
    return (fetched_LE * bytes_per_expert(previous, expert_bytes)).sum(axis=1)


def least_bytes(
    previous: Placement,
    new_cluster: Cluster,
    *,
    expert_bytes: ExpertBytes = None,
    origin: np.ndarray | None = None,
    filled: np.ndarray | None = None,
    fewest: np.ndarray | None = None,
    most: np.ndarray | None = None,
) -> int:
    """Proven lower bound on the bytes that any valid placement on `new_cluster` makes its ranks fetch.

    Per layer two things cannot be avoided: an expert that no rank can keep is fetched once (the best that can be kept
    is an assignment of experts to the slots of ranks that hold them), and slots that are to be filled beyond what the
    ranks hold are fetched. Scale-up is ruled by the second, scale-down and loss by the first. Exact where the experts
    of a layer have equal size.

    Args:
        previous: placement in force.
        new_cluster: the cluster after the change.
        expert_bytes: as `relabel_to`.
        origin: as `relabel_to`.
        filled: (L,) slots that must hold an expert; None = as many as can.
        fewest, most: (L, R) slots of each rank of which so many must hold an expert, and no more; None = any number.
    """
    origin_R = check_origin(origin, previous.num_ranks, new_cluster.num_ranks)
    size_LE, held_LRE = bytes_per_expert(previous, expert_bytes), held_experts(previous, origin_R)
    total = 0
    for layer, count in enumerate(previous.experts_per_layer):
        size_E, held_RE = size_LE[layer, :count].astype(np.float64), held_LRE[layer, :, :count]
        most_R = np.minimum(new_cluster.slots_of_rank if most is None else most[layer], count)
        least_R = np.zeros_like(most_R) if fewest is None else fewest[layer]
        target = int(most_R.sum() if filled is None else filled[layer])
        held_R = held_RE.sum(axis=1)
        short = int(np.maximum(least_R - held_R, 0).sum())
        missing = short + max(target - int(np.maximum(np.minimum(held_R, most_R), least_R).sum()), 0)
        choices_SE = np.repeat(held_RE, most_R, axis=0) * size_E
        rows, columns = linear_sum_assignment(choices_SE, maximize=True)
        homeless = size_E.sum() - choices_SE[rows, columns].sum()
        total += int(max(homeless, missing * size_E.min()))
    return total


def held_experts(placement: Placement, origin_R: np.ndarray) -> np.ndarray:
    """(L, R, E) bool: whether rank r of the cluster after a change holds expert e before it."""
    held_LRE = placement.copies_LER.transpose(0, 2, 1) > 0
    return held_LRE[:, np.maximum(origin_R, 0), :] & (origin_R >= 0)[None, :, None]


def check_origin(origin: np.ndarray | Sequence[int] | None, old_ranks: int, new_ranks: int) -> np.ndarray:
    """(R,) int64 old rank of each new rank, -1 = it joined; None = equal numbers.

    Raises:
        InputError: an old rank is named twice or does not exist.
    """
    if origin is None:
        index = np.arange(new_ranks)
        return np.where(index < old_ranks, index, -1)
    origin_R = np.asarray(origin, dtype=np.int64)
    stayed = origin_R[origin_R >= 0]
    if origin_R.shape != (new_ranks,) or (origin_R >= old_ranks).any() or len(np.unique(stayed)) != len(stayed):
        names = f"{new_ranks} different ranks of 0..{old_ranks - 1}, or -1"
        raise InputError(f"origin {origin_R.tolist()} must name {names}")
    return origin_R


def bytes_per_expert(placement: Placement, expert_bytes: ExpertBytes) -> np.ndarray:
    """(L, E) int64 bytes of each expert, from (L, E), one number or None (= 1).

    Raises:
        InputError: the shape is another one or a size is not positive.
    """
    shape = (placement.num_layers, placement.num_experts)
    size = np.asarray(1 if expert_bytes is None else expert_bytes)
    if size.shape not in ((), shape):
        raise InputError(f"expert bytes of shape {size.shape} must be one number or (layers, experts) {shape}")
    real_LE = np.arange(shape[1]) < placement.experts_per_layer[:, None]
    size_LE = np.array(np.broadcast_to(size, shape), dtype=np.int64)
    if (size_LE[real_LE] < 1).any():
        raise InputError(f"expert bytes ({size_LE[real_LE].min()}) must be positive")
    return size_LE


def _members(slots_LS: np.ndarray, rank_of_slot: np.ndarray, ranks: int, experts: int) -> np.ndarray:
    """(L, R, E) bool: which experts each bin holds."""
    member_LRE = np.zeros((len(slots_LS), ranks, experts), bool)
    layer, slot = np.nonzero(slots_LS >= 0)
    member_LRE[layer, rank_of_slot[slot], slots_LS[layer, slot]] = True
    return member_LRE


def _seat(
    previous: Placement, slots_LS: np.ndarray, cluster: Cluster, bins_LR: np.ndarray, origin_R: np.ndarray
) -> np.ndarray:
    """Put each rank's bin into its slots: experts that stay keep theirs, the others fill the gaps in their order."""
    start_R = slot_starts(cluster.slots_of_rank)
    seated = np.full_like(slots_LS, EMPTY_SLOT)
    for rank, (start, size) in enumerate(zip(start_R, cluster.slots_of_rank, strict=True)):
        old = int(origin_R[rank])
        kept = previous.slot_to_expert[:, previous.slots_on(old)][:, :size] if old >= 0 else slots_LS[:, :0]
        for layer, bin_index in enumerate(bins_LR[:, rank]):
            chosen = slots_LS[layer, start_R[bin_index] : start_R[bin_index] + size]
            seated[layer, start : start + size] = _keep_slots(kept[layer], chosen)
    return seated


def _keep_slots(old_C: np.ndarray, new_C: np.ndarray) -> np.ndarray:
    """The experts of `new_C`, each in its place of `old_C` where it has one."""
    row = np.full(len(new_C), EMPTY_SLOT, new_C.dtype)
    stays = np.isin(old_C, new_C[new_C >= 0])
    row[: len(old_C)][stays] = old_C[stays]
    arriving = new_C[(new_C >= 0) & ~np.isin(new_C, old_C[stays])]
    row[np.flatnonzero(row == EMPTY_SLOT)[: len(arriving)]] = arriving
    return row


def _fetched(previous: Placement, new: Placement, origin: np.ndarray | None) -> np.ndarray:
    """(L, R, E) bool: rank r of `new` lacks expert e and will hold it.

    Raises:
        InputError: the placements are for different models.
    """
    if not np.array_equal(previous.experts_per_layer, new.experts_per_layer):
        raise InputError("the two placements are for different models: their experts per layer differ")
    origin_R = check_origin(origin, previous.num_ranks, new.num_ranks)
    return (new.copies_LER.transpose(0, 2, 1) > 0) & ~held_experts(previous, origin_R)
