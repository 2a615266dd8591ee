"""InTurn: a replica rule on one layer after another, while the layers are still being decided.

What the engine draws for a layer may depend on the layers before it, so they are decided in the order of the model: a
row is tried as often as wanted, then taken.

Shape letters: T tokens, E experts, K top-k, R ranks, S slots.
"""

import numpy as np

from moeplace.placement.cost.replica_rule import (
    ReplicaRule,
    hash_ranks,
    home_ranks,
    random_ranks,
    replica_ranks,
)
from moeplace.placement.cost.static_draws import StaticDraws


class InTurn:
    """A rule of an engine, on slots of the same ranks in every layer.

    Args:
        rule: one that looks at one expert at a time.
        rank_of_slot: (S,) rank of each slot.
        node_of_rank: (R,) node of each rank.
        num_experts: E, the most of any layer.
    """

    def __init__(self, rule: ReplicaRule, rank_of_slot: np.ndarray, node_of_rank: np.ndarray, num_experts: int) -> None:
        self._name, self._rank_S, self._ranks, self._experts = rule.name, rank_of_slot, len(node_of_rank), num_experts
        self._draws = StaticDraws(rank_of_slot, node_of_rank)

    def try_row(self, layer: int, slots_S: np.ndarray, ids_TK: np.ndarray) -> np.ndarray:
        """(T, K) rank that serves each expert in this layer if it has these slots, -1 where `ids_TK` is -1."""
        if self._name == "nearest-static":
            rank_RE = np.append(self._rank_S, -1)[self._draws.try_layer(slots_S, self._experts)]
            home_T = home_ranks(len(ids_TK), self._ranks)
            return np.where(ids_TK >= 0, rank_RE[home_T[:, None], ids_TK], -1)
        table_EJ = replica_ranks(slots_S, self._experts, self._rank_S)
        if self._name == "random":
            return random_ranks(layer, ids_TK, table_EJ)
        return hash_ranks(ids_TK, self._ranks, table_EJ)

    def take_row(self, slots_S: np.ndarray) -> None:
        """The layer has these slots."""
        if self._name == "nearest-static":
            self._draws.next_layer(slots_S, self._experts)
