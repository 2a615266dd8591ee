"""ReplicaRule: who serves an expert that has several slots, as the engine that will run the placement decides it.

* `moeplace`, of its own runtime: near first, then the fewest ranks, then balanced.
* `nearest-static`, SGLang 0.5.23 with `--ep-dispatch-algorithm static`: one slot for each rank, fixed at start.
* `random`, SGLang 0.5.23 with `--ep-dispatch-algorithm dynamic`: any slot, drawn for each token and expert.
* `hash`, vLLM 0.33.0 with EPLB: any slot, by a hash of the token's row on its home rank.

Rules of engines know nothing of the other experts of a token, so replicas that save ranks under `moeplace` may save
none under them. A placement without replicas is served alike by all.

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, S slots, J slots of one expert.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moeplace.placement.cost.replica_choice import choose_ranks
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.errors import InputError

SGLANG_SEED = 42
"""With which SGLang draws where no slot is near."""
KNUTH_MULTIPLIER = 2654435769
"""floor(2^32 / golden ratio), with which vLLM hashes row numbers."""


class ChooseRanks(Protocol):
    """The rule on one placement."""

    def __call__(self, layer: int, ids_TK: np.ndarray, near_T: np.ndarray, rank_TK: np.ndarray) -> None:
        """Write the serving rank of every (token, expert) of a layer to `rank_TK`, -1 where `ids_TK` is -1.

        Args:
            layer: MoE layer.
            ids_TK: (T, K) integer expert ids, -1 = none.
            near_T: (T,) rank where each token is, -1 = unknown.
            rank_TK: (T, K) int32 output.
        """


@dataclass(frozen=True)
class ReplicaRule:
    """A rule by name.

    Attributes:
        name: of the rule.
        engine: who follows it, with version and setting.
        on: makes the rule ready for a placement.
    """

    name: str
    engine: str
    on: Callable[[Placement], ChooseRanks]


def get_rule(name: str) -> ReplicaRule:
    """The rule of that name.

    Raises:
        InputError: there is none.
    """
    if name not in REPLICA_RULES:
        raise InputError(f"replica rule {name!r} must be one of {', '.join(REPLICA_RULES)}")
    return REPLICA_RULES[name]


def home_ranks(num_tokens: int, num_ranks: int) -> np.ndarray:
    """(T,) int32 rank that each token of a trace is at home on: dealt out in turn."""
    return (np.arange(num_tokens) % num_ranks).astype(np.int32)


def nearest_static_slots(placement: Placement) -> np.ndarray:
    """(R, L, E) int64 slot that each rank sends an expert's tokens to, -1 beyond a layer's experts.

    The slot of the rank itself; else the first one of its node, where the node has some and others have some too; else
    a fair draw among all slots for all ranks in want of one. Every rank draws for itself, from the same seed, and draws
    only for experts that it has no near slot of.
    """
    slots_LE = _slots_of_experts(placement)
    layers, experts = placement.num_layers, placement.num_experts
    table_RLE = np.full((placement.num_ranks, layers, experts), -1, np.int64)
    for layer, slots_E in enumerate(slots_LE):
        for expert, slots in enumerate(slots_E):
            table_RLE[:, layer, expert] = [_near_slot(placement, slots, rank) for rank in range(placement.num_ranks)]
    wanting_RLE = (table_RLE < 0) & (placement.replica_counts > 0)
    for rank in range(placement.num_ranks):
        draw = random.Random(SGLANG_SEED)
        for layer, expert in np.argwhere(wanting_RLE[rank]):
            wanting = np.flatnonzero(wanting_RLE[:, layer, expert])
            choices = _fair_choices(slots_LE[layer][expert], len(wanting), draw)
            table_RLE[rank, layer, expert] = choices[int(np.searchsorted(wanting, rank))]
    return table_RLE


def _near_slot(placement: Placement, slots: list[int], rank: int) -> int:
    """The slot that is near enough not to be drawn for, -1 = none."""
    if len(slots) < 2:
        return slots[0] if slots else -1
    ranks = placement.rank_of_slot[slots]
    own = np.flatnonzero(ranks == rank)
    mates = np.flatnonzero(placement.node_of_rank[ranks] == placement.node_of_rank[rank])
    if len(own):
        return slots[own[0]]
    return slots[mates[0]] if 0 < len(mates) < len(slots) else -1


def _fair_choices(slots: list[int], count: int, draw: random.Random) -> list[int]:
    """`count` slots in random order, each as often as any other, as far as that divides."""
    whole, rest = divmod(count, len(slots))
    chosen = slots * whole + draw.sample(slots, k=rest)
    draw.shuffle(chosen)
    return chosen


def _slots_of_experts(placement: Placement) -> list[list[list[int]]]:
    """[layer][expert] slots, rising."""
    slots_LE: list[list[list[int]]] = [[[] for _ in range(placement.num_experts)] for _ in range(placement.num_layers)]
    for layer, slot in np.argwhere(placement.slot_to_expert != EMPTY_SLOT).tolist():
        slots_LE[layer][placement.slot_to_expert[layer, slot]].append(slot)
    return slots_LE


def _replica_ranks(placement: Placement) -> list[np.ndarray]:
    """[layer] (E, J) rank of the j-th slot of each expert, -1 beyond its last."""
    tables = []
    for slots_E in _slots_of_experts(placement):
        table_EJ = np.full((len(slots_E), max(map(len, slots_E))), -1, np.int32)
        for expert, slots in enumerate(slots_E):
            table_EJ[expert, : len(slots)] = placement.rank_of_slot[slots]
        tables.append(table_EJ)
    return tables


def _on_moeplace(placement: Placement) -> ChooseRanks:
    def choose(layer: int, ids_TK: np.ndarray, near_T: np.ndarray, rank_TK: np.ndarray) -> None:
        copies_ER, rotation_T = placement.copies_LER[layer], np.arange(len(ids_TK))
        choose_ranks(ids_TK, copies_ER, placement.node_of_rank, near_T, rotation_T, rank_TK)

    return choose


def _on_nearest_static(placement: Placement) -> ChooseRanks:
    ranks, rank_RLE = placement.num_ranks, np.append(placement.rank_of_slot, -1)[nearest_static_slots(placement)]

    def choose(layer: int, ids_TK: np.ndarray, near_T: np.ndarray, rank_TK: np.ndarray) -> None:
        asks_T = np.where(near_T >= 0, near_T, home_ranks(len(ids_TK), ranks))
        rank_TK[:] = np.where(ids_TK >= 0, rank_RLE[asks_T[:, None], layer, ids_TK], -1)

    return choose


def _on_random(placement: Placement) -> ChooseRanks:
    tables, counts_LE = _replica_ranks(placement), placement.replica_counts

    def choose(layer: int, ids_TK: np.ndarray, near_T: np.ndarray, rank_TK: np.ndarray) -> None:
        share_TK = np.random.default_rng((SGLANG_SEED, layer)).random(ids_TK.shape)
        replica_TK = (share_TK * counts_LE[layer][ids_TK]).astype(np.int64)
        rank_TK[:] = np.where(ids_TK >= 0, tables[layer][ids_TK, replica_TK], -1)

    return choose


def _on_hash(placement: Placement) -> ChooseRanks:
    tables, counts_LE = _replica_ranks(placement), placement.replica_counts

    def choose(layer: int, ids_TK: np.ndarray, near_T: np.ndarray, rank_TK: np.ndarray) -> None:
        row_T = np.arange(len(ids_TK)) // placement.num_ranks  # of the token in what its home has to do
        hash_T = (row_T * KNUTH_MULTIPLIER) & 0xFFFFFFFF
        replica_TK = hash_T[:, None] % np.maximum(counts_LE[layer][ids_TK], 1)
        rank_TK[:] = np.where(ids_TK >= 0, tables[layer][ids_TK, replica_TK], -1)

    return choose


MOEPLACE = ReplicaRule("moeplace", "moeplace's own runtime", _on_moeplace)
REPLICA_RULES = {
    rule.name: rule
    for rule in (
        MOEPLACE,
        ReplicaRule("nearest-static", "SGLang 0.5.23 with --ep-dispatch-algorithm static", _on_nearest_static),
        ReplicaRule("random", "SGLang 0.5.23 with --ep-dispatch-algorithm dynamic", _on_random),
        ReplicaRule("hash", "vLLM 0.33.0 with EPLB", _on_hash),
    )
}
RULES_OF_ENGINE = {"sglang": ("nearest-static", "random"), "vllm": ("hash",)}
"""What an engine follows, first what it follows by default with an all-to-all back end. Engines that are not named here
choose without regard to the token's other experts too: `random` stands for them."""
