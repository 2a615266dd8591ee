"""Slots before, during and after a change of placement: the same memory under two numberings.

A rank that stays keeps its memory: local slot j before is local slot j after. A rank that leaves has no new slots, a
rank that joins no old ones. All of them together, in one numbering, are the *places* of a layer.

Shape letters: R ranks, S slots per layer, P places per layer, U ranks of before and after together.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplace.placement.migration.relabel import check_origin
from moeplace.placement.placement import slot_starts
from moeplace.profiling.errors import InputError


@dataclass(frozen=True, eq=False)
class Layout:
    """Ranks and slots of both sides of a change.

    Attributes:
        old_slots_of_rank: (R,) int64 slots per layer before.
        new_slots_of_rank: (R',) int64 slots per layer after.
        origin: (R',) int64 old rank that each new rank is, -1 = it joined.
        lost_ranks: old ranks whose memory is gone.

    Members (U of them) are numbered: old ranks by their number, then the joined ones in the order of their new number.

    Raises:
        InputError: an origin or a lost rank does not exist, or a lost rank is said to stay.
    """

    old_slots_of_rank: np.ndarray
    new_slots_of_rank: np.ndarray
    origin: np.ndarray
    lost_ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        old, new = (np.array(array, dtype=np.int64) for array in (self.old_slots_of_rank, self.new_slots_of_rank))
        origin_R = check_origin(self.origin, len(old), len(new)).copy()
        lost = check_lost(self.lost_ranks, len(old))
        kept = sorted(set(lost) & set(origin_R.tolist()))
        if kept:
            raise InputError(f"rank {kept[0]} is lost and cannot stay")
        object.__setattr__(self, "lost_ranks", lost)
        for name, array in (("old_slots_of_rank", old), ("new_slots_of_rank", new), ("origin", origin_R)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @cached_property
    def member_of_new(self) -> np.ndarray:
        """(R',) int64 member that each new rank is."""
        joined_R = self.origin < 0
        return np.where(joined_R, len(self.old_slots_of_rank) + np.cumsum(joined_R) - 1, self.origin)

    @property
    def num_members(self) -> int:
        """U."""
        return len(self.old_slots_of_rank) + int((self.origin < 0).sum())

    @cached_property
    def places_of_member(self) -> np.ndarray:
        """(U,) int64 places per layer: the more of the slots before and after."""
        places_U = np.zeros(self.num_members, np.int64)
        places_U[: len(self.old_slots_of_rank)] = self.old_slots_of_rank
        np.maximum.at(places_U, self.member_of_new, self.new_slots_of_rank)
        return places_U

    @cached_property
    def member_of_place(self) -> np.ndarray:
        """(P,) int64."""
        return np.repeat(np.arange(self.num_members), self.places_of_member)

    @cached_property
    def place_of_old(self) -> np.ndarray:
        """(S,) int64 place of each slot before."""
        return self._places(np.arange(len(self.old_slots_of_rank)), self.old_slots_of_rank)

    @cached_property
    def place_of_new(self) -> np.ndarray:
        """(S',) int64 place of each slot after."""
        return self._places(self.member_of_new, self.new_slots_of_rank)

    @cached_property
    def lost_places(self) -> np.ndarray:
        """(P,) bool: the memory of this place is gone."""
        return np.isin(self.member_of_place, self.lost_ranks)

    def nodes(self, old_node_of_rank: np.ndarray, new_node_of_rank: np.ndarray) -> np.ndarray:
        """(U,) int64 node of each member in the new numbering; nodes that only leaving ranks are on get new numbers."""
        node_U = np.full(self.num_members, -1, np.int64)
        node_U[self.member_of_new] = new_node_of_rank
        fresh = int(new_node_of_rank.max()) + 1
        for node in range(int(old_node_of_rank.max()) + 1):
            members = np.flatnonzero(old_node_of_rank == node)
            known = node_U[members][node_U[members] >= 0]
            node_U[members[node_U[members] < 0]] = known[0] if len(known) else fresh + node
        return node_U

    def _places(self, members: np.ndarray, slots: np.ndarray) -> np.ndarray:
        start_U = slot_starts(self.places_of_member)
        return np.concatenate([start_U[m] + np.arange(n) for m, n in zip(members, slots, strict=True)])


def default_origin(old_ranks: int, new_ranks: int, lost_ranks: tuple[int, ...]) -> np.ndarray:
    """(R',) old rank of each new rank when nobody says: numbers are kept while the width is; else survivors close up.

    Ranks that are too many leave from the top; ranks that are missing (-1) join at the end, or, at equal width, in the
    places of the lost ones.
    """
    lost = check_lost(lost_ranks, old_ranks)
    if old_ranks == new_ranks:
        return np.where(np.isin(np.arange(new_ranks), lost), -1, np.arange(new_ranks))
    survivors = [rank for rank in range(old_ranks) if rank not in lost][:new_ranks]
    return np.array(survivors + [-1] * (new_ranks - len(survivors)), np.int64)


def check_lost(lost_ranks: tuple[int, ...], old_ranks: int) -> tuple[int, ...]:
    """The lost ranks, sorted.

    Raises:
        InputError: one does not exist.
    """
    lost = tuple(sorted({int(rank) for rank in lost_ranks}))
    for rank in lost:
        if not 0 <= rank < old_ranks:
            raise InputError(f"lost rank {rank} must lie in 0..{old_ranks - 1}")
    return lost
