"""ReplicaRule: who serves an expert that has several slots, as the engine that will run the placement decides it.

* `moeplace`, of its own runtime: the fewest ranks, ties spread by a fixed table (`replica_choice`).
* `balanced`, of its own runtime too: as few ranks, ties split by the load so far (`balanced_choice`).
* `nearest-static`, SGLang 0.5.23 with `--ep-dispatch-algorithm static`: one slot for each rank, fixed at start.
* `random`, SGLang 0.5.23 with `--ep-dispatch-algorithm dynamic`: any slot, drawn for each token and expert.
* `hash`, vLLM 0.33.0 with EPLB: any slot, by a hash of the token's row on its home rank.

Rules of engines know nothing of the other experts of a token, so replicas that save ranks under `moeplace` may save
none under them. A placement without replicas is served alike by all.

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, S slots, J slots of one expert.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moeplace.placement.cost.balanced_choice import Sent, choose_balanced
from moeplace.placement.cost.replica_choice import choose_ranks
from moeplace.placement.cost.static_draws import SGLANG_SEED, StaticDraws, slots_of_experts
from moeplace.placement.cost.steps import cut_lanes
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError

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
        on: makes the rule ready for a placement and steps of so many tokens.
        share: of rules that look at one expert at a time: ((R,) bool ranks that hold it, (R,) node of each rank) ->
            (R, R) float64, the share of a home's tokens (row) that each rank (column) may be expected to serve.
    """

    name: str
    engine: str
    on: Callable[[Placement, int], ChooseRanks]
    share: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


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


def near_ranks(placement: Placement, mode: Mode, num_tokens: int) -> np.ndarray:
    """(T,) int32 rank where each token of a trace is when its experts are chosen, -1 = unknown.

    Unknown where it decides nothing, and in `coherent` mode in the first layer: later ones find it where it was served.
    """
    if placement.has_replicas and mode != "coherent":
        return home_ranks(num_tokens, placement.num_ranks)
    return np.full(num_tokens, -1, np.int32)


def nearest_static_slots(placement: Placement) -> np.ndarray:
    """(R, L, E) int64 slot that each rank sends an expert's tokens to, -1 beyond a layer's experts."""
    draws = StaticDraws(placement.rank_of_slot, placement.node_of_rank)
    tables = [draws.next_layer(row_S, placement.num_experts) for row_S in placement.slot_to_expert]
    return np.stack(tables, axis=1)


def replica_ranks(slots_S: np.ndarray, num_experts: int, rank_of_slot: np.ndarray) -> np.ndarray:
    """(E, J) int32 rank of the j-th slot of each expert of a layer, -1 beyond its last."""
    slots_E = slots_of_experts(slots_S, num_experts)
    table_EJ = np.full((num_experts, max(map(len, slots_E))), -1, np.int32)
    for expert, slots in enumerate(slots_E):
        table_EJ[expert, : len(slots)] = rank_of_slot[slots]
    return table_EJ


def _replica_ranks(placement: Placement) -> list[np.ndarray]:
    """`replica_ranks` of each layer."""
    rows_LS, experts = placement.slot_to_expert, placement.num_experts
    return [replica_ranks(row_S, experts, placement.rank_of_slot) for row_S in rows_LS]


def _on_moeplace(placement: Placement, batch: int) -> ChooseRanks:
    def choose(layer: int, ids_TK: np.ndarray, near_T: np.ndarray, rank_TK: np.ndarray) -> None:
        copies_ER, rotation_T = placement.copies_LER[layer], np.arange(len(ids_TK))
        choose_ranks(ids_TK, copies_ER, placement.node_of_rank, near_T, rotation_T, rank_TK)

    return choose


def _on_balanced(placement: Placement, batch: int) -> ChooseRanks:
    ranks = placement.num_ranks

    def choose(layer: int, ids_TK: np.ndarray, near_T: np.ndarray, rank_TK: np.ndarray) -> None:
        sender_T = np.where(near_T >= 0, near_T, home_ranks(len(ids_TK), ranks))
        sent = Sent(sender_T, *_steps(len(ids_TK), batch))
        choose_balanced(ids_TK, placement.copies_LER[layer], placement.node_of_rank, near_T, sent, rank_TK)

    return choose


def _steps(tokens: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """(T,) step of each token, the further one of those that fill none included, and its index in the step."""
    lanes, index_T = cut_lanes(tokens, batch), np.arange(tokens)
    full = lanes.width * lanes.length
    step_T = np.where(index_T < full, index_T % lanes.length, lanes.length)
    return step_T, np.where(index_T < full, index_T // lanes.length, index_T - full)


def _on_nearest_static(placement: Placement, batch: int) -> ChooseRanks:
    ranks, rank_RLE = placement.num_ranks, np.append(placement.rank_of_slot, -1)[nearest_static_slots(placement)]

    def choose(layer: int, ids_TK: np.ndarray, near_T: np.ndarray, rank_TK: np.ndarray) -> None:
        asks_T = np.where(near_T >= 0, near_T, home_ranks(len(ids_TK), ranks))
        rank_TK[:] = np.where(ids_TK >= 0, rank_RLE[asks_T[:, None], layer, ids_TK], -1)

    return choose


def _on_random(placement: Placement, batch: int) -> ChooseRanks:
    tables = _replica_ranks(placement)

    def choose(layer: int, ids_TK: np.ndarray, near_T: np.ndarray, rank_TK: np.ndarray) -> None:
        rank_TK[:] = random_ranks(layer, ids_TK, tables[layer])

    return choose


def random_ranks(layer: int, ids_TK: np.ndarray, table_EJ: np.ndarray) -> np.ndarray:
    """(T, K) serving ranks where any slot of `replica_ranks` may be drawn for any expert of a token."""
    share_TK = np.random.default_rng((SGLANG_SEED, layer)).random(ids_TK.shape)
    replica_TK = (share_TK * (table_EJ >= 0).sum(axis=1)[ids_TK]).astype(np.int64)
    return np.where(ids_TK >= 0, table_EJ[ids_TK, replica_TK], -1)


def _on_hash(placement: Placement, batch: int) -> ChooseRanks:
    tables = _replica_ranks(placement)

    def choose(layer: int, ids_TK: np.ndarray, near_T: np.ndarray, rank_TK: np.ndarray) -> None:
        rank_TK[:] = hash_ranks(ids_TK, placement.num_ranks, tables[layer])

    return choose


def hash_ranks(ids_TK: np.ndarray, num_ranks: int, table_EJ: np.ndarray) -> np.ndarray:
    """(T, K) serving ranks where the row of a token, in what its home has to do, chooses among `replica_ranks`."""
    row_T = np.arange(len(ids_TK)) // num_ranks
    hash_T = (row_T * KNUTH_MULTIPLIER) & 0xFFFFFFFF
    replica_TK = hash_T[:, None] % np.maximum((table_EJ >= 0).sum(axis=1)[ids_TK], 1)
    return np.where(ids_TK >= 0, table_EJ[ids_TK, replica_TK], -1)


def _any_alike(held_R: np.ndarray, node_R: np.ndarray) -> np.ndarray:
    """Every replica serves as much of every home."""
    return np.tile(held_R / max(int(held_R.sum()), 1), (len(held_R), 1))


def _near_else_any(held_R: np.ndarray, node_R: np.ndarray) -> np.ndarray:
    """The home's own replica, else the first of its node if only some are there, else any alike."""
    share_RR, ranks = _any_alike(held_R, node_R), np.flatnonzero(held_R)
    if len(ranks) < 2:
        return share_RR
    for home, node in enumerate(node_R):
        mates = ranks[node_R[ranks] == node]
        near = home if held_R[home] else mates[0] if 0 < len(mates) < len(ranks) else -1
        if near >= 0:
            share_RR[home] = np.arange(len(held_R)) == near
    return share_RR


MOEPLACE = ReplicaRule("moeplace", "moeplace's own runtime", _on_moeplace)
BALANCED = ReplicaRule("balanced", "moeplace's own runtime with --replica-rule balanced", _on_balanced)
REPLICA_RULES = {
    rule.name: rule
    for rule in (
        MOEPLACE,
        BALANCED,
        ReplicaRule(
            "nearest-static", "SGLang 0.5.23 with --ep-dispatch-algorithm static", _on_nearest_static, _near_else_any
        ),
        ReplicaRule("random", "SGLang 0.5.23 with --ep-dispatch-algorithm dynamic", _on_random, _any_alike),
        ReplicaRule("hash", "vLLM 0.33.0 with EPLB", _on_hash, _any_alike),
    )
}
RULES_OF_ENGINE = {"sglang": ("nearest-static", "random"), "vllm": ("hash",)}
"""What an engine follows, first what it follows by default with an all-to-all back end. Engines that are not named here
choose without regard to the token's other experts too: `random` stands for them."""
OWN_RULES = (MOEPLACE.name, BALANCED.name)
"""What moeplace's own runtime can follow."""
