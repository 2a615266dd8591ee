"""Placement: which expert each slot of each layer holds.

Shape letters: L MoE layers, E experts per layer, R ranks, S slots per layer.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import numpy as np

from moeplace.placement.memory import RESIDENT, TIERS
from moeplace.placement.modes import MODES, Mode
from moeplace.profiling.errors import InputError

EMPTY_SLOT = -1


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts in slots. `slot_to_expert` is the only map stored; every other map is derived from it.

    Attributes:
        slot_to_expert: (L, S) int32; the slots of rank r are consecutive. -1 = the slot is empty.
        slots_of_rank: (R,) int64, slots per layer of each rank; 0 = a rank that joins or leaves.
        node_of_rank: (R,) int64, nodes are consecutive blocks of ranks.
        experts_per_layer: (L,) int64.
        layer_ids: (L,) int64, decoder-layer index of each MoE layer.
        num_hidden_layers: decoder layers in all.
        mode: the execution mode it was made for.
        tier: (L, S) int8, memory that each slot is kept in (`moeplace.placement.memory`); empty slots are
            resident. None = all are resident.

    Raises:
        InputError: an expert of a layer has no slot, an id is out of range, a rank holds an expert of a layer twice,
            or shapes disagree.
    """

    slot_to_expert: np.ndarray
    slots_of_rank: np.ndarray
    node_of_rank: np.ndarray
    experts_per_layer: np.ndarray
    layer_ids: np.ndarray | None = None
    num_hidden_layers: int = 0
    mode: Mode = "dispatch-combine"
    tier: np.ndarray | None = None

    def __post_init__(self) -> None:
        slots = np.asarray(self.slot_to_expert)
        if slots.ndim != 2 or not np.issubdtype(slots.dtype, np.integer):
            raise InputError(f"slot_to_expert must be integers (layers, slots), not {slots.dtype} {slots.shape}")
        layers, per_layer = slots.shape
        on_rank = np.asarray(self.slots_of_rank, dtype=np.int64)
        node = np.asarray(self.node_of_rank, dtype=np.int64)
        experts = np.asarray(self.experts_per_layer, dtype=np.int64)
        layer_ids = np.arange(layers) if self.layer_ids is None else np.asarray(self.layer_ids, dtype=np.int64)
        if self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} must be one of {', '.join(MODES)}")
        if on_rank.ndim != 1 or (on_rank < 0).any() or on_rank.sum() != per_layer:
            raise InputError(f"each layer has {per_layer} slots, but the ranks hold {on_rank.tolist()}")
        if node.shape != on_rank.shape or node[0] != 0 or not np.isin(np.diff(node), (0, 1)).all():
            raise InputError(f"nodes must be consecutive blocks of ranks numbered from 0, not {node.tolist()}")
        if experts.shape != (layers,):
            raise InputError(f"experts_per_layer must have {layers} entries, not {experts.shape}")
        if layer_ids.shape != (layers,) or (np.diff(layer_ids) <= 0).any():
            raise InputError(f"layer_ids must be {layers} rising decoder-layer indices, not {layer_ids.tolist()}")
        hidden = self.num_hidden_layers or int(layer_ids[-1]) + 1
        if hidden <= layer_ids[-1]:
            raise InputError(f"num_hidden_layers ({hidden}) must exceed the last MoE layer ({layer_ids[-1]})")
        for name, array in (
            ("slot_to_expert", slots.astype(np.int32)),
            ("slots_of_rank", on_rank.copy()),
            ("node_of_rank", node.copy()),
            ("experts_per_layer", experts.copy()),
            ("layer_ids", layer_ids.copy()),
        ):
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        object.__setattr__(self, "num_hidden_layers", hidden)
        object.__setattr__(self, "tier", _canonical_tiers(self.tier, self.slot_to_expert))
        self._check_experts()

    def _check_experts(self) -> None:
        slots = self.slot_to_expert
        bad = (slots < EMPTY_SLOT) | (slots >= self.experts_per_layer[:, None])
        if bad.any():
            layer, slot = np.argwhere(bad)[0]
            raise InputError(
                f"slot {slot} of MoE layer {layer} holds expert {slots[layer, slot]}, "
                f"which must lie in 0..{self.experts_per_layer[layer] - 1} (or be -1 for an empty slot)"
            )
        counts = self.copies_LER
        if (counts > 1).any():
            layer, expert, rank = np.argwhere(counts > 1)[0]
            raise InputError(f"rank {rank} holds expert {expert} of MoE layer {layer} twice")
        real = np.arange(counts.shape[1]) < self.experts_per_layer[:, None]
        missing = real & ~counts.any(axis=2)
        if missing.any():
            layer, expert = np.argwhere(missing)[0]
            raise InputError(f"expert {expert} of MoE layer {layer} has no slot; every expert needs one")

    @property
    def num_layers(self) -> int:
        return self.slot_to_expert.shape[0]

    @property
    def num_slots(self) -> int:
        return self.slot_to_expert.shape[1]

    @property
    def num_ranks(self) -> int:
        return len(self.slots_of_rank)

    @property
    def num_nodes(self) -> int:
        return int(self.node_of_rank[-1]) + 1

    @property
    def num_experts(self) -> int:
        """E: the most experts any layer has."""
        return int(self.experts_per_layer.max())

    @cached_property
    def rank_of_slot(self) -> np.ndarray:
        """(S,) int64."""
        return np.repeat(np.arange(self.num_ranks), self.slots_of_rank)

    @cached_property
    def copies_LER(self) -> np.ndarray:
        """(L, E, R) int8: how many slots of rank r hold expert e of layer l (0 or 1 in a valid placement)."""
        counts = np.zeros((self.num_layers, self.num_experts, self.num_ranks), dtype=np.int8)
        layer, slot = np.nonzero(self.slot_to_expert >= 0)
        np.add.at(counts, (layer, self.slot_to_expert[layer, slot], self.rank_of_slot[slot]), 1)
        counts.flags.writeable = False
        return counts

    @cached_property
    def replica_counts(self) -> np.ndarray:
        """(L, E) int64: slots that hold each expert, 0 beyond a layer's experts."""
        return self.copies_LER.sum(axis=2, dtype=np.int64)

    @cached_property
    def rank_of_expert(self) -> np.ndarray:
        """(L, E) int64: the first rank that holds each expert, -1 beyond a layer's experts."""
        first = self.copies_LER.argmax(axis=2)
        return np.where(self.replica_counts > 0, first, -1)

    @cached_property
    def has_replicas(self) -> bool:
        """Whether any expert has more than one slot."""
        return bool((self.replica_counts > 1).any())

    def slots_on(self, rank: int) -> slice:
        """The slots of one rank, as a slice of a row of `slot_to_expert`."""
        start = int(slot_starts(self.slots_of_rank)[rank])
        return slice(start, start + int(self.slots_of_rank[rank]))

    @cached_property
    def digest(self) -> str:
        """`sha256:...` of the canonical content: equal digests mean equal placements of equal shape."""
        content = {
            "slot_to_expert": self.slot_to_expert.tolist(),
            "slots_of_rank": self.slots_of_rank.tolist(),
            "node_of_rank": self.node_of_rank.tolist(),
            "experts_per_layer": self.experts_per_layer.tolist(),
            "layer_ids": None if self.layer_ids is None else self.layer_ids.tolist(),
            "num_hidden_layers": self.num_hidden_layers,
        }
        if self.tier is not None:  # absent otherwise: the digests of placements without tiers stay what they were
            content["tier"] = self.tier.tolist()
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def tier_LER(self) -> np.ndarray:
        """(L, E, R) int8: the tier of the expert's slot on each rank, -1 where the rank does not hold it."""
        tiers = np.full((self.num_layers, self.num_experts, self.num_ranks), -1, dtype=np.int8)
        layer, slot = np.nonzero(self.slot_to_expert >= 0)
        stated = RESIDENT if self.tier is None else self.tier[layer, slot]
        tiers[layer, self.slot_to_expert[layer, slot], self.rank_of_slot[slot]] = stated
        tiers.flags.writeable = False
        return tiers

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again.

        Where slots change and nothing is said of tiers, an expert keeps its tier on its rank; on another rank it has
        the fastest one that it had anywhere.
        """
        if self.tier is not None and "tier" not in changes and {"slot_to_expert", "slots_of_rank"} & set(changes):
            changed = replace(self, **changes, tier=None)
            return replace(changed, tier=_carried_tiers(self, changed))
        return replace(self, **changes)

    def equals(self, other: "Placement") -> bool:
        """Whether both put the same experts in the same slots of the same cluster shape."""
        return self.digest == other.digest


def _canonical_tiers(tier: np.ndarray | None, slot_to_expert: np.ndarray) -> np.ndarray | None:
    """(L, S) int8, read-only, empty slots resident; None where all are.

    Raises:
        InputError: the shape or a tier is wrong.
    """
    if tier is None:
        return None
    given = np.asarray(tier)
    if given.shape != slot_to_expert.shape or not np.issubdtype(given.dtype, np.integer):
        raise InputError(f"tier must be integers of shape {slot_to_expert.shape}, not {given.dtype} {given.shape}")
    bad = (given < 0) | (given >= len(TIERS))
    if bad.any():
        layer, slot = np.argwhere(bad)[0]
        names = ", ".join(f"{number} = {name}" for number, name in enumerate(TIERS))
        raise InputError(f"slot {slot} of MoE layer {layer} is in tier {given[layer, slot]}, which must be {names}")
    own = np.where(slot_to_expert == EMPTY_SLOT, RESIDENT, given).astype(np.int8)
    own.flags.writeable = False
    return own if own.any() else None


def _carried_tiers(old: Placement, new: Placement) -> np.ndarray:
    """(L, S) int8 tiers of the slots of `new` by those that the same experts have in `old`; see `Placement.replace`."""
    if old.tier_LER.shape[:2] != new.tier_LER.shape[:2]:
        raise InputError("tiers cannot be carried over to a model with other layers or experts")
    fastest_LE = np.where(old.tier_LER < 0, len(TIERS), old.tier_LER).min(axis=2) % len(TIERS)
    tier = np.zeros(new.slot_to_expert.shape, np.int8)
    for layer, slot in np.argwhere(new.slot_to_expert != EMPTY_SLOT).tolist():
        expert, rank = int(new.slot_to_expert[layer, slot]), int(new.rank_of_slot[slot])
        here = int(old.tier_LER[layer, expert, rank]) if rank < old.num_ranks else -1
        tier[layer, slot] = fastest_LE[layer, expert] if here < 0 else here
    return tier


def slot_starts(slots_of_rank: np.ndarray) -> np.ndarray:
    """(R,) int64 first slot of each rank."""
    sizes = np.asarray(slots_of_rank, dtype=np.int64)
    return np.cumsum(sizes) - sizes


def with_slots(placement: Placement, slots_of_rank: np.ndarray) -> Placement:
    """The same experts on ranks with more slots (empty ones) or fewer (those cut off must be empty).

    Raises:
        InputError: an expert would have no slot.
    """
    rows = np.full((placement.num_layers, int(np.sum(slots_of_rank))), EMPTY_SLOT, np.int32)
    for rank, (start, count) in enumerate(zip(slot_starts(slots_of_rank), slots_of_rank, strict=True)):
        own = placement.slot_to_expert[:, placement.slots_on(rank)]
        if (own[:, count:] != EMPTY_SLOT).any():
            raise InputError(f"rank {rank} has experts beyond its first {count} slots")
        rows[:, start : start + min(count, own.shape[1])] = own[:, :count]
    return placement.replace(slot_to_expert=rows, slots_of_rank=np.asarray(slots_of_rank))


def index_order(
    experts_per_layer: np.ndarray,
    slots_of_rank: np.ndarray,
    node_of_rank: np.ndarray,
    **fields: Any,
) -> Placement:
    """The baseline of every comparison: expert e in the e-th slot, redundant slots left empty.

    Raises:
        InputError: a layer has more experts than there are slots.
    """
    experts = np.asarray(experts_per_layer, dtype=np.int64)
    total = int(np.sum(slots_of_rank))
    if experts.max() > total:
        layer = int(experts.argmax())
        raise InputError(f"MoE layer {layer} has {experts[layer]} experts, but there are only {total} slots")
    index, starts = np.arange(total), slot_starts(slots_of_rank)
    # Spread evenly: with more slots than experts, every rank keeps its share of empty slots.
    rows = []
    for count in experts:
        share = _even_fill(int(count), np.asarray(slots_of_rank, dtype=np.int64))
        row = np.full(total, EMPTY_SLOT, dtype=np.int32)
        filled = np.concatenate([start + index[:n] for start, n in zip(starts, share, strict=True)])
        row[filled] = np.arange(count)
        rows.append(row)
    return Placement(np.stack(rows), slots_of_rank, node_of_rank, experts, **fields)


def _even_fill(count: int, capacity_R: np.ndarray) -> np.ndarray:
    """How many of `count` experts each rank takes: as even as the capacities allow."""
    taken = np.zeros_like(capacity_R)
    while count:
        open_ranks = np.flatnonzero(taken < capacity_R)
        level = int(taken[open_ranks].min())
        lowest = open_ranks[taken[open_ranks] == level][:count]
        taken[lowest] += 1
        count -= len(lowest)
    return taken
