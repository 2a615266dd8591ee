"""Replay: one pass of a trace under a placement, layer by layer, and what it counts.

Replica choice gives each token its serving ranks A, `d = |A|`, `dn` nodes; the three execution modes differ in where a
token is before a layer and where its result must go:

* `dispatch-combine`: at its home; results return home. Copies: 2 (d - P(home in A)). Without replicas A does not depend
  on the home, and the mean over all homes is taken. With replicas it does, and token t is at home on rank t mod R, as
  the runtime deals tokens out.
* `coherent`: at its owner, the rank of A with most of its experts in the layer before (ties: the owner until then, if
  among them, else the lowest rank); results go to the new owner. Copies: (d - 1[owner in A]) + (d - 1).
* `allgather`: everywhere; its home chooses among replicas. Copies: 2 (R - 1).

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, N nodes.
"""

from dataclasses import dataclass, replace

import numpy as np

from moeplace.placement.cost.calibration import ExpertTime
from moeplace.placement.cost.gateways import through_gateways
from moeplace.placement.cost.layer_counts import LayerCounts, Routed, Sites, Work, count_layer
from moeplace.placement.cost.replica_rule import ReplicaRule, near_ranks
from moeplace.placement.cost.steps import cut_lanes
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class Replay:
    """Counts of one pass.

    Attributes:
        mode: execution mode.
        tokens: T.
        knows_home: whether tokens have a home each (dispatch-combine with replicas).
        sum_L5: (L, 5) int64 sums over tokens: d, dn, d = 1, copies of the first exchange (where the rank before it is
            known) and of the second (`coherent`).
        load_LR: (L, R) int64 assignments that a rank computes.
        first_LRR, second_LRR: (L, R, R) copies per token from rank to rank in the two exchanges.
        owned_LR: (L, R) share of tokens that a rank attends in `coherent` mode.
        served_LR, served_LN: (L, R), (L, N) int64 tokens that a rank serves, that any rank of a node serves.
        travel_LRR: (L-1, R, R) int64 tokens by the ranks of their primary experts before and after a boundary.
        step_L4: (L, 4) means over steps: tokens of the busiest rank over the mean, activated experts likewise, expert
            seconds of the slowest rank without the fixed part, share of steps that need a second exchange (`coherent`).
    """

    mode: Mode
    tokens: int
    knows_home: bool
    sum_L5: np.ndarray
    load_LR: np.ndarray
    first_LRR: np.ndarray
    second_LRR: np.ndarray
    owned_LR: np.ndarray
    served_LR: np.ndarray
    served_LN: np.ndarray
    travel_LRR: np.ndarray
    step_L4: np.ndarray

    def without_traffic(self) -> "Replay":
        """The same where no row crosses ranks and no second exchange is needed: for bounds."""
        silent = np.zeros_like(self.first_LRR)
        step_L4 = self.step_L4.copy()
        step_L4[:, 3] = 0.0
        return replace(
            self, first_LRR=silent, second_LRR=silent, owned_LR=np.zeros_like(self.owned_LR), step_L4=step_L4
        )

    @property
    def num_layers(self) -> int:
        return len(self.load_LR)

    @property
    def num_ranks(self) -> int:
        return self.load_LR.shape[1]


def replay(
    trace: RoutingTrace,
    placement: Placement,
    mode: Mode,
    *,
    batch: int,
    speed_R: np.ndarray,
    expert: ExpertTime,
    rule: ReplicaRule,
) -> Replay:
    """Count every layer.

    Args:
        trace: tokens.
        placement: of the trace's model.
        mode: execution mode.
        batch: tokens of a step; where the trace has fewer, its one step is scaled up.
        speed_R: (R,) relative speeds.
        expert: what tokens and activated experts cost.
        rule: who serves an expert with several slots.
    """
    tokens, ranks = trace.num_tokens, placement.num_ranks
    lanes = cut_lanes(tokens, batch)
    work = Work(expert.per_token * batch / lanes.width, expert.per_activated)
    near_T = near_ranks(placement, mode, tokens)
    knows_home = placement.has_replicas and mode == "dispatch-combine"
    choose, rank_TK = rule.on(placement, batch), np.empty((tokens, trace.top_k), np.int32)
    layers: list[LayerCounts] = []
    travel_LRR = np.zeros((max(trace.num_layers - 1, 0), ranks, ranks), np.int64)
    primary_T = np.empty(0, np.int32)
    for layer in range(trace.num_layers):
        ids_TK = trace.layer(layer)
        choose(layer, ids_TK, near_T, rank_TK)
        counts = _no_counts(ranks, placement.num_nodes)
        routed = Routed(ids_TK, rank_TK, near_T)  # where tokens move, the next layer finds them moved
        sites = Sites(placement.node_of_rank, _slot_table(placement, layer), speed_R)
        count_layer(routed, sites, lanes, work, mode == "coherent", counts)
        layers.append(counts)
        if layer:
            np.add.at(travel_LRR[layer - 1], _known_pairs(primary_T, rank_TK[:, 0]), 1)
        primary_T = rank_TK[:, 0].copy()
    if mode == "dispatch-combine":
        first_LRR, second_LRR = _home_traffic(layers, tokens, placement.node_of_rank, knows_home)
    else:
        exchanges = {"coherent": _owner_traffic, "allgather": _dense_traffic}[mode]
        first_LRR, second_LRR = exchanges(layers, tokens, placement.node_of_rank)
    return Replay(
        mode=mode,
        tokens=tokens,
        knows_home=knows_home,
        sum_L5=np.stack([counts.sums for counts in layers]),
        load_LR=np.stack([counts.load_R for counts in layers]),
        first_LRR=first_LRR,
        second_LRR=second_LRR,
        owned_LR=_owned_share(layers, tokens),
        served_LR=np.stack([counts.present_R for counts in layers]),
        served_LN=np.stack([counts.present_N for counts in layers]),
        travel_LRR=travel_LRR,
        step_L4=np.stack([counts.step_sums for counts in layers]) / lanes.length,
    )


Exchanges = tuple[np.ndarray, np.ndarray]
"""(L, R, R) copies per token from rank to rank, of the first exchange and of the second."""


def _home_traffic(layers: list[LayerCounts], tokens: int, node_R: np.ndarray, knows_home: bool) -> Exchanges:
    """Copies from homes to the ranks that serve and back; to another node one copy, forwarded inside it."""
    ranks, first = len(node_R), []
    for counts in layers:
        if knows_home:
            wanted_RR, entering_RN = counts.first_RR / tokens, counts.entering_RN / tokens
        else:
            wanted_RR = np.tile(counts.present_R / (ranks * tokens), (ranks, 1))
            entering_RN = np.tile(counts.present_N / (ranks * tokens), (ranks, 1))
        first.append(through_gateways(wanted_RR, entering_RN, node_R))
    first_LRR = np.stack(first)
    return first_LRR, first_LRR.transpose(0, 2, 1)


def _owner_traffic(layers: list[LayerCounts], tokens: int, node_R: np.ndarray) -> Exchanges:
    """Copies from owners to the ranks that serve, then to new owners; before the first layer the owner is uniform."""
    ranks = len(node_R)
    first_LRR = np.stack([counts.first_RR / tokens for counts in layers])
    first_LRR[0] = layers[0].present_R / (ranks * tokens)
    return first_LRR, np.stack([counts.second_RR / tokens for counts in layers])


def _dense_traffic(layers: list[LayerCounts], tokens: int, node_R: np.ndarray) -> Exchanges:
    """Every token from its home to all ranks, and a partial sum back from each."""
    everywhere_LRR = np.full((len(layers), len(node_R), len(node_R)), 1.0 / len(node_R))
    return everywhere_LRR, everywhere_LRR


def _owned_share(layers: list[LayerCounts], tokens: int) -> np.ndarray:
    owned_LR = np.stack([counts.owned_R / tokens for counts in layers])
    owned_LR[0] = 1.0 / owned_LR.shape[1]  # nobody knows where the token was before: uniform
    return owned_LR


def _no_counts(ranks: int, nodes: int) -> LayerCounts:
    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int64)

    return LayerCounts(
        sums=zeros(5), load_R=zeros(ranks), present_R=zeros(ranks), present_N=zeros(nodes),
        first_RR=zeros(ranks, ranks), entering_RN=zeros(ranks, nodes), second_RR=zeros(ranks, ranks),
        owned_R=zeros(ranks), step_sums=np.zeros(4),
    )  # fmt: skip


def _slot_table(placement: Placement, layer: int) -> np.ndarray:
    """(E, R) slot that holds each expert on each rank, 0 where none does."""
    table = np.zeros((placement.num_experts, placement.num_ranks), np.int64)
    row = placement.slot_to_expert[layer]
    slots = np.flatnonzero(row >= 0)
    table[row[slots], placement.rank_of_slot[slots]] = slots
    return table


def _known_pairs(before_T: np.ndarray, after_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = (before_T >= 0) & (after_T >= 0)
    return before_T[both], after_T[both]
