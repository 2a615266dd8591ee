"""FastRows: how the fast memory of every rank is shared out among layers, and what of it is pinned.

    rank's rows = rows for transit (all layers) + rows of layer 0 + rows of layer 1 + ...
    rows of a layer = its resident slots + an even share of what is left, at most its slots

Shape letters: L MoE layers, E experts per layer, R ranks.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.placement.memory import RESIDENT, Memory
from moeplace.placement.placement import Placement
from moeplace.placement.tiers.policy import Policy
from moeplace.profiling.errors import InputError


@dataclass(frozen=True, eq=False)
class FastRows:
    """See the module.

    Attributes:
        first_LRE: (L, R, E) bool, experts that are in fast memory at the start.
        pinned_LRE: (L, R, E) bool, those of them that stay.
        free_LR: (L, R) int64 rows of each layer that are not pinned.
        transit: rows of each rank for transit.
    """

    first_LRE: np.ndarray
    pinned_LRE: np.ndarray
    free_LR: np.ndarray
    transit: int


def share_out(placement: Placement, memory: Memory, policy: Policy, *, expert_bytes: float | np.ndarray) -> FastRows:
    """The rows of every rank and layer.

    A placement without tiers says nothing of residency: caches start empty and pinning has nothing to pin, unless all
    of it fits.

    Args:
        placement, memory, policy: of the ranks.
        expert_bytes: of one expert, or (R,) of the largest of each rank: by it memory in bytes is cut into rows.

    Raises:
        InputError: more is resident than there is room for.
    """
    layers, ranks = placement.num_layers, placement.num_ranks
    held_LRE = placement.tier_LER.transpose(0, 2, 1) >= 0
    resident_LRE = placement.tier_LER.transpose(0, 2, 1) == RESIDENT
    free_LR = np.zeros((layers, ranks), np.int64)
    size_R = np.broadcast_to(expert_bytes, ranks).tolist()
    for rank in range(ranks):
        room = memory.rows(rank, layers=layers, expert_bytes=size_R[rank]) - memory.transit
        if placement.tier is None and resident_LRE[:, rank].sum() > room:
            resident_LRE[:, rank] = False
        left = room - int(resident_LRE[:, rank].sum())
        if left < 0:
            raise InputError(
                f"rank {rank} has {resident_LRE[:, rank].sum()} resident experts, its fast memory holds {max(room, 0)} "
                f"and {memory.transit} in transit"
            )
        free_LR[:, rank] = _fill_evenly((held_LRE & ~resident_LRE)[:, rank].sum(axis=1), left)
    if not policy.pins:
        return FastRows(resident_LRE, np.zeros_like(resident_LRE), free_LR + resident_LRE.sum(axis=2), memory.transit)
    return FastRows(resident_LRE, resident_LRE, free_LR, memory.transit)


def _fill_evenly(wanted_L: np.ndarray, amount: int) -> np.ndarray:
    """(L,) shares of `amount`, as even as wishes allow; the first layers take what does not divide."""
    share_L = np.zeros_like(wanted_L)
    while amount > 0 and (share_L < wanted_L).any():
        asking = np.flatnonzero(share_L < wanted_L)
        each = max(min(amount // len(asking), int((wanted_L - share_L)[asking].min())), 1)
        taking = asking[: amount // each]
        share_L[taking] += each
        amount -= each * len(taking)
    return share_L
