"""SlotTables: the maps of a placement as tensors, the only form in which the exchange modes see it.

Shape letters: L MoE layers, E experts per layer, R ranks, S slots per layer.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from moeplace.placement.cost.replica_choice import preference_orders
from moeplace.placement.placement import Placement


@dataclass(frozen=True, eq=False)
class SlotTables:
    """Where experts are, for look-ups.

    Attributes:
        rank: the rank that looks.
        rank_of_slot: (S + 1,) int64; entry -1 is -1, so that an absent expert maps to no rank.
        first_slot: per layer (E + 1,) int64, the first slot of an expert; entry -1 is -1.
        first_slot_host: the same as arrays of this process.
        slot_on_rank: (L, E, R) int64, the slot of an expert on a rank, -1 = none.
        replicated: (L,) bool per layer, as Python values: whether some expert of it has several slots.
        node_of_rank: (R,) int64.
        preference: (P, R) int64, the place of each rank in the order of each rotation number.
        slots_start: first global slot of this rank.
        slots_here: slots per layer of this rank.
    """

    rank: int
    rank_of_slot: torch.Tensor
    first_slot: tuple[torch.Tensor, ...]
    first_slot_host: tuple[np.ndarray, ...]
    slot_on_rank: torch.Tensor
    replicated: tuple[bool, ...]
    node_of_rank: torch.Tensor
    preference: torch.Tensor
    slots_start: int
    slots_here: int

    @classmethod
    def from_placement(cls, placement: Placement, *, rank: int, device: str | torch.device = "cpu") -> Self:
        """The tables of `placement` as `rank` sees them."""
        layers, experts, ranks = placement.copies_LER.shape
        slot_LER = np.full((layers, experts, ranks), -1, dtype=np.int64)
        layer, slot = np.nonzero(placement.slot_to_expert >= 0)
        slot_LER[layer, placement.slot_to_expert[layer, slot], placement.rank_of_slot[slot]] = slot
        first_LE = np.full((layers, experts + 1), -1, dtype=np.int64)
        first_LE[:, :experts] = np.where(slot_LER >= 0, slot_LER, np.iinfo(np.int64).max).min(axis=2)
        first_LE[:, :experts][placement.replica_counts == 0] = -1
        here = placement.slots_on(rank)
        return cls(
            rank=rank,
            rank_of_slot=torch.as_tensor(np.append(placement.rank_of_slot, -1), device=device),
            first_slot_host=tuple(first_LE),
            first_slot=torch.as_tensor(first_LE, device=device).unbind(0),
            slot_on_rank=torch.as_tensor(slot_LER, device=device),
            replicated=tuple(bool((counts > 1).any()) for counts in placement.replica_counts),
            node_of_rank=torch.as_tensor(np.array(placement.node_of_rank), device=device),
            preference=torch.as_tensor(np.argsort(preference_orders(ranks), axis=1), device=device),
            slots_start=here.start,
            slots_here=here.stop - here.start,
        )

    @property
    def num_layers(self) -> int:
        return len(self.replicated)

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)

    def local_slots(self, slots: torch.Tensor) -> torch.Tensor:
        """Global slots as slots of this rank, 0 .. C-1; -1 for those of other ranks and for -1."""
        if self.num_ranks == 1:
            return slots
        local = slots - self.slots_start
        return torch.where((slots >= self.slots_start) & (local < self.slots_here), local, -1)
