"""Random valid placements for tests of the runtime, and what is done to them."""

import numpy as np

from moeplace.placement.memory import DISK, HOST
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.models.checkpoint import Checkpoint


def random_placement(
    num_layers: int,
    num_experts: int,
    num_ranks: int,
    *,
    seed: int,
    extra_slots: int = 1,
    nodes: int = 1,
    **fields: object,
) -> Placement:
    """Experts on random ranks, `extra_slots` per rank beyond the least, filled with replicas or left empty."""
    rng = np.random.default_rng(seed)
    slots = -(-num_experts // num_ranks) + extra_slots
    table = np.full((num_layers, num_ranks, slots), EMPTY_SLOT)
    for layer in table:
        for expert in rng.permutation(num_experts):
            free = [r for r in range(num_ranks) if (layer[r] < 0).any()]
            rank = rng.choice(free)
            layer[rank, np.flatnonzero(layer[rank] < 0)[0]] = expert
        for rank in range(num_ranks):
            for slot in np.flatnonzero(layer[rank] < 0):
                expert = rng.integers(num_experts)
                if expert not in layer[rank] and rng.random() < 0.8:
                    layer[rank, slot] = expert
            layer[rank] = rng.permutation(layer[rank])
    node = np.arange(num_ranks) * nodes // num_ranks
    rows = table.reshape(num_layers, -1)
    experts = np.full(num_layers, num_experts)
    return Placement(rows, np.full(num_ranks, slots), node, experts, **fields)


def placement_for(checkpoint: Checkpoint, num_ranks: int, *, seed: int, **options: int) -> Placement:
    """A random one for the experts of a model; `options` of `random_placement`."""
    return random_placement(
        checkpoint.num_layers,
        int(checkpoint.experts_per_layer[0]),
        num_ranks,
        seed=seed,
        layer_ids=checkpoint.layer_ids,
        num_hidden_layers=checkpoint.num_hidden_layers,
        **options,
    )


def with_random_tiers(placement: Placement, limits: TierLimits, seed: int | np.random.Generator) -> Placement:
    """Random residents, no more than every rank has room for, the rest on host and disk."""
    draw = np.random.default_rng(seed)
    tier = np.where(draw.random(placement.slot_to_expert.shape) < 0.5, HOST, DISK)
    for rank in range(placement.num_ranks):
        here = placement.slots_on(rank)
        spots = np.argwhere(placement.slot_to_expert[:, here] >= 0)
        room = limits.fast_slots * placement.num_layers - limits.transit
        for layer, slot in draw.permutation(spots)[: draw.integers(0, room + 1)]:
            tier[layer, here.start + slot] = 0
    return placement.replace(tier=tier)


def turned(placement: Placement) -> Placement:
    """Every expert one slot further."""
    return placement.replace(slot_to_expert=np.roll(placement.slot_to_expert, -1, axis=1))
