"""Evaluation: what a placement costs on a routing trace. The one place that computes it.

A trace is replayed layer by layer: replica choice gives each token its serving ranks A, `d = |A|`, `dn` nodes; the
three execution modes differ in where a token is before a layer and where its result must go:

* `dispatch-combine`: at its home, which is uniform over ranks; results return home. Copies: 2 (d - P(home in A)).
* `coherent`: at its owner, the rank of A with most of its experts in the layer before (ties: the owner until then, if
  among them, else the lowest rank); results go to the new owner. Copies: (d - 1[owner in A]) + (d - 1).
* `allgather`: everywhere. Copies: 2 (R - 1).

A trace has no steps. A step of B tokens is formed from B lanes: the token sequence is cut into B pieces of equal
length, and step s holds the s-th token of every piece, so that each lane reads its sequences in order.

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, N nodes, B batch.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import njit

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.replica_choice import choose_ranks
from moeplace.placement.cost.seconds import (
    Calibration,
    StepShape,
    collective_latency,
    expert_seconds,
    transfer_seconds,
)
from moeplace.placement.placement import Mode, Placement
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a placement costs on a trace in one mode; means are over tokens and layers.

    Attributes:
        mode: the execution mode.
        tokens: tokens evaluated.
        ranks_per_token: mean d.
        nodes_per_token: mean dn.
        copies_per_token: hidden vectors that cross ranks per token and layer, both directions; in `coherent` mode per
            token and layer boundary, so that it is 1 - stay_rate for K = 1.
        node_copies_per_token: those of them that cross nodes, when a token is sent to each node once.
        stay_rate: share of layer boundaries whose primary expert stays on the rank.
        node_stay_rate: likewise for the node.
        single_rank_share: share of token-layers with d = 1.
        imbalance_mean, imbalance_worst: over layers, of max over ranks / mean over ranks of routed tokens (divided by
            the rank's relative speed where speeds differ).
        activated_imbalance_mean: the same for activated experts per rank and step, mean over steps and layers.
        predicted_seconds: of one step, by the cost model.
        batch: B, tokens per step of the last two figures.
        kv_bytes_per_token: K/V bytes that leave a token's rank per token in `coherent` mode, all layers.
        collectives_per_layer: exchanges per MoE layer, the expected share of second ones included.
        load_LR: (L, R) routed tokens per rank.
        ranks_per_token_L, imbalance_L: (L,) by layer.
        stay_L: (L-1,) by boundary.
        travel_RR: (R, R) primary transitions from rank to rank over all boundaries.
        tokens_per_step: the busiest rank's routed tokens over the mean rank's in one step, mean over steps and layers.
    """

    mode: Mode
    tokens: int
    ranks_per_token: float
    nodes_per_token: float
    copies_per_token: float
    node_copies_per_token: float
    stay_rate: float
    node_stay_rate: float
    single_rank_share: float
    imbalance_mean: float
    imbalance_worst: float
    activated_imbalance_mean: float
    predicted_seconds: float
    batch: int
    kv_bytes_per_token: float
    collectives_per_layer: float
    load_LR: np.ndarray = field(repr=False)
    ranks_per_token_L: np.ndarray = field(repr=False)
    imbalance_L: np.ndarray = field(repr=False)
    stay_L: np.ndarray = field(repr=False)
    travel_RR: np.ndarray = field(repr=False)
    step_imbalance_mean: float = 1.0

    def summary(self) -> dict[str, Any]:
        """The scalar figures, ready for JSON."""
        return {name: getattr(self, name) for name in _SCALARS}


_SCALARS = (
    "mode",
    "tokens",
    "ranks_per_token",
    "nodes_per_token",
    "copies_per_token",
    "node_copies_per_token",
    "stay_rate",
    "node_stay_rate",
    "single_rank_share",
    "imbalance_mean",
    "imbalance_worst",
    "activated_imbalance_mean",
    "step_imbalance_mean",
    "predicted_seconds",
    "batch",
    "kv_bytes_per_token",
    "collectives_per_layer",
)


def evaluate(
    trace: RoutingTrace,
    placement: Placement,
    *,
    mode: Mode | None = None,
    cluster: Cluster | None = None,
    shape: StepShape | None = None,
    calibration: Calibration | None = None,
) -> Evaluation:
    """Replay `trace` under `placement`.

    Args:
        trace: the tokens to judge by; pass the held-out side for a quality figure.
        placement: the placement.
        mode: execution mode, by default the placement's own.
        cluster: links and speeds, by default the placement's nodes with default links.
        shape: sizes of a step, by default those of the trace and `StepShape`.
        calibration: measured times, by default nominal ones.

    Raises:
        InputError: the placement is for another model or another cluster.
    """
    mode = mode or placement.mode
    require_same_model(trace, placement)
    if not trace.num_tokens:
        raise InputError("the trace has no tokens to evaluate")
    cluster = cluster or cluster_of(placement)
    if not np.array_equal(cluster.node_of_rank, placement.node_of_rank):
        raise InputError(
            f"the placement is for {placement.num_ranks} ranks on {placement.num_nodes} nodes, "
            f"the cluster has {cluster.num_ranks} on {cluster.num_nodes}"
        )
    calibration = calibration or Calibration(cluster.intra, cluster.inter)
    cluster = calibration.apply(cluster)
    shape = shape or default_shape(trace)
    replay = _Replay(trace, placement, mode, shape)
    return replay.evaluation(cluster, shape, calibration)


def require_same_model(trace: RoutingTrace, placement: Placement) -> None:
    """Check that a placement is for the model that a trace was recorded from.

    Raises:
        InputError: layers or experts differ.
    """
    for name in ("experts_per_layer", "layer_ids"):
        ours, theirs = getattr(trace, name), getattr(placement, name)
        if not np.array_equal(ours, theirs):
            raise InputError(
                f"the placement is for another model: {name} is {_short(theirs)}, the trace has {_short(ours)}"
            )


def cluster_of(placement: Placement) -> Cluster:
    """The cluster shape that a placement was made for, with default links and equal speeds."""
    return Cluster(placement.node_of_rank, placement.slots_of_rank, np.ones(placement.num_ranks))


def default_shape(trace: RoutingTrace) -> StepShape:
    """Sizes of a step with the trace's hidden size."""
    return StepShape(hidden_size=trace.hidden_size) if trace.hidden_size else StepShape()


def step_of_token(num_tokens: int, batch: int) -> np.ndarray:
    """(T,) step of each token with B lanes; -1 for the at most B - 1 tokens that fill no step."""
    lanes = min(batch, num_tokens)
    length = num_tokens // lanes
    index = np.arange(num_tokens)
    return np.where(index < lanes * length, index % length, -1)


class _Replay:
    """Counts of one pass over the trace."""

    def __init__(self, trace: RoutingTrace, placement: Placement, mode: Mode, shape: StepShape) -> None:
        self._mode, self._placement = mode, placement
        self._tokens, self._layers = trace.num_tokens, trace.num_layers
        ranks, nodes = placement.num_ranks, placement.num_nodes
        self._step_T = step_of_token(trace.num_tokens, shape.batch)
        self._steps = int(self._step_T.max()) + 1
        layers = self._layers
        self.sum_L = np.zeros((layers, 5), np.int64)  # d, dn, d == 1, copies of exchange 1, copies of exchange 2
        self.load_LR = np.zeros((layers, ranks), np.int64)
        self.present_LR = np.zeros((layers, ranks), np.int64)  # tokens that a rank serves
        self.present_LN = np.zeros((layers, nodes), np.int64)
        self.first_LRR = np.zeros((layers, ranks, ranks))  # copies per token of the first exchange, rank to rank
        self.second_LRR = np.zeros((layers, ranks, ranks))
        self.owned_LR = np.zeros((layers, ranks))  # share of tokens that a rank attends
        self.travel_LRR = np.zeros((max(layers - 1, 0), ranks, ranks), np.int64)
        self.second_needed_L = np.zeros(layers)
        self.step_tokens_LSR = np.zeros((layers, self._steps, ranks), np.int32)
        self.activated_LSR = np.zeros((layers, self._steps, ranks), np.int32)
        owner_T = np.full(self._tokens, -1, np.int32)
        nowhere_T = owner_T.copy()
        primary_T = nowhere_T
        rotation_T = np.arange(self._tokens)
        rank_TK = np.empty((self._tokens, trace.top_k), np.int32)
        for layer in range(layers):
            ids_TK = trace.layer(layer)
            copies_ER = placement.copies_LER[layer]
            near_T = owner_T if mode == "coherent" else nowhere_T
            choose_ranks(ids_TK, copies_ER, placement.node_of_rank, near_T, rotation_T, rank_TK)
            self._count(layer, ids_TK, rank_TK, owner_T)
            if layer:
                np.add.at(self.travel_LRR[layer - 1], _pairs(primary_T, rank_TK[:, 0]), 1)
            primary_T = rank_TK[:, 0].copy()
        if mode == "dispatch-combine":
            self._home_traffic()
        elif mode == "allgather":
            self.first_LRR[:] = self.second_LRR[:] = 1.0 / ranks

    def _count(self, layer: int, ids_TK: np.ndarray, rank_TK: np.ndarray, owner_T: np.ndarray) -> None:
        placement = self._placement
        first_RR, second_RR = np.zeros((2, placement.num_ranks, placement.num_ranks), np.int64)
        multi_S = np.zeros(self._steps, np.bool_)
        owned_R = np.zeros(placement.num_ranks, np.int64)
        slot_ER = _slot_table(placement, layer)
        count_layer(
            ids_TK, rank_TK, placement.node_of_rank, slot_ER, self._step_T, owner_T, self.sum_L[layer],
            self.load_LR[layer], self.present_LR[layer], self.present_LN[layer], first_RR, second_RR, owned_R,
            self.step_tokens_LSR[layer], self.activated_LSR[layer], multi_S,
        )  # fmt: skip
        self.second_needed_L[layer] = multi_S.mean()
        ranks = placement.num_ranks
        if self._mode == "coherent":
            self.first_LRR[layer] = first_RR / self._tokens
            self.second_LRR[layer] = second_RR / self._tokens
            if layer == 0:  # nobody knows where the token was before: uniform
                self.first_LRR[0] = np.broadcast_to(self.present_LR[0] / (ranks * self._tokens), (ranks, ranks))
            self.owned_LR[layer] = 1.0 / ranks if layer == 0 else owned_R / self._tokens

    def _home_traffic(self) -> None:
        """Copies from a uniform home to the ranks that serve; to another node one copy, forwarded inside it."""
        placement = self._placement
        node, sizes = placement.node_of_rank, np.bincount(placement.node_of_rank)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        per_home = 1.0 / (placement.num_ranks * self._tokens)
        for home in range(placement.num_ranks):
            for target in range(placement.num_nodes):
                members = np.flatnonzero(node == target)
                gateway = home
                if node[home] != target:
                    gateway = int(starts[target] + (home - starts[node[home]]) % sizes[target])
                    self.first_LRR[:, home, gateway] += self.present_LN[:, target] * per_home
                others = members[members != gateway]
                self.first_LRR[:, gateway, others] += self.present_LR[:, others] * per_home
        self.second_LRR[:] = self.first_LRR.transpose(0, 2, 1)

    def evaluation(self, cluster: Cluster, shape: StepShape, calibration: Calibration) -> Evaluation:
        tokens, layers, ranks = self._tokens, self._layers, self._placement.num_ranks
        d, dn, single = self.sum_L[:, :3].sum(axis=0)
        cells = tokens * layers
        copies = {
            "dispatch-combine": 2 * (d / cells) * (1 - 1 / ranks),
            "coherent": float(self.sum_L[1:, 3:].sum() / max(tokens * (layers - 1), 1)),
            "allgather": 2.0 * (ranks - 1),
        }[self._mode]
        imbalance_L = _max_over_mean(self.load_LR / cluster.speed_of_rank, cluster.speed_of_rank)
        travel_RR = self.travel_LRR.sum(axis=0) if layers > 1 else np.zeros((ranks, ranks), np.int64)
        pairs_L = np.maximum(self.travel_LRR.sum(axis=(1, 2)), 1)
        stay_L = self.travel_LRR.trace(axis1=1, axis2=2) / pairs_L
        node = cluster.node_of_rank
        same_RR = node[:, None] == node[None, :]
        pairs = max(int(travel_RR.sum()), 1)
        moved_LRR = self.first_LRR + self.second_LRR
        if self._mode == "coherent":
            moved_LRR = moved_LRR[1:]  # per layer boundary, as copies_per_token
        node_copies = float((moved_LRR * ~same_RR).sum() / max(len(moved_LRR), 1))
        collectives = {
            "dispatch-combine": 2.0,
            "coherent": 1.0 + float(self.second_needed_L.mean()),
            "allgather": 2.0,
        }[self._mode]
        return Evaluation(
            mode=self._mode,
            tokens=tokens,
            ranks_per_token=float(d / cells),
            nodes_per_token=float(dn / cells),
            copies_per_token=float(copies),
            node_copies_per_token=node_copies,
            stay_rate=float(np.trace(travel_RR) / pairs),
            node_stay_rate=float((travel_RR * same_RR).sum() / pairs),
            single_rank_share=float(single / cells),
            imbalance_mean=float(imbalance_L.mean()),
            imbalance_worst=float(imbalance_L.max()),
            activated_imbalance_mean=float(_max_over_mean(self.activated_LSR).mean()),
            step_imbalance_mean=float(_max_over_mean(self.step_tokens_LSR).mean()),
            predicted_seconds=self._predict(cluster, shape, calibration),
            batch=min(shape.batch, tokens),
            kv_bytes_per_token=self._kv_bytes(shape, ranks),
            collectives_per_layer=0.0 if ranks == 1 else collectives,
            load_LR=self.load_LR,
            ranks_per_token_L=self.sum_L[:, 0] / tokens,
            imbalance_L=imbalance_L,
            stay_L=stay_L,
            travel_RR=travel_RR,
        )

    def _kv_bytes(self, shape: StepShape, ranks: int) -> float:
        if self._mode != "coherent":
            return 0.0
        return float((ranks - 1) * self._layers * shape.kv_dim * shape.dtype_bytes)

    def _predict(self, cluster: Cluster, shape: StepShape, calibration: Calibration) -> float:
        """Seconds of one step of `shape.batch` tokens (see `cost_model`)."""
        hidden = shape.batch * shape.hidden_size * shape.dtype_bytes
        latency = collective_latency(cluster)
        seconds = calibration.layer_overhead(self._mode) * self._layers
        scale = shape.batch / min(shape.batch, self._tokens)
        for layer in range(self._layers):
            second_share = self.second_needed_L[layer] if self._mode == "coherent" else 1.0
            seconds += latency * (1.0 + second_share)
            seconds += transfer_seconds(self.first_LRR[layer], cluster, hidden)
            seconds += transfer_seconds(self.second_LRR[layer], cluster, hidden)
            seconds += expert_seconds(
                self.step_tokens_LSR[layer] * scale, self.activated_LSR[layer], cluster, calibration.expert
            )
        if self._mode == "coherent" and cluster.num_ranks > 1:
            kv = shape.batch * shape.kv_dim * shape.dtype_bytes
            all_RR = np.repeat(self.owned_LR.sum(axis=0)[:, None], cluster.num_ranks, axis=1)
            seconds += latency + transfer_seconds(_once_per_node(all_RR, cluster), cluster, kv)
        return float(seconds)


def _once_per_node(copies_RR: np.ndarray, cluster: Cluster) -> np.ndarray:
    """Copies to every rank, sent once to each other node and forwarded inside it by the rank that received them."""
    node, sizes = cluster.node_of_rank, cluster.ranks_per_node
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    out = np.zeros_like(copies_RR)
    for source in range(cluster.num_ranks):
        for target_node in range(cluster.num_nodes):
            members = np.flatnonzero(node == target_node)
            amount = float(copies_RR[source, members].max(initial=0.0))
            gateway = source
            if node[source] != target_node:
                gateway = int(starts[target_node] + (source - starts[node[source]]) % sizes[target_node])
                out[source, gateway] += amount
            out[gateway, members] += amount * (members != gateway)
    return out


@njit(cache=True, nogil=True)
def count_layer(  # type: ignore[no-untyped-def]
    ids_TK, rank_TK, node_R, slot_ER, step_T, owner_T, sums, load_R, present_R, present_N, first_RR, second_RR, owned_R,
    step_tokens_SR, activated_SR, multi_S,
):  # fmt: skip
    """One layer of the replay: counts into the output arrays, and moves `owner_T` (see the module's docstring)."""
    num_ranks = len(node_R)
    held_R = np.zeros(num_ranks, np.int64)
    node_seen_N = np.zeros(node_R[-1] + 1, np.int64)
    seen_SP = np.zeros((len(multi_S), slot_ER.max() + 1), np.bool_)
    used = np.empty(ids_TK.shape[1], np.int64)
    for t in range(ids_TK.shape[0]):
        d = dn = 0
        step = step_T[t]
        for k in range(ids_TK.shape[1]):
            r = rank_TK[t, k]
            if r < 0:
                continue
            if held_R[r] == 0:
                used[d] = r
                d += 1
                if node_seen_N[node_R[r]] != t + 1:
                    node_seen_N[node_R[r]] = t + 1
                    present_N[node_R[r]] += 1
                    dn += 1
            held_R[r] += 1
            load_R[r] += 1
            if step >= 0:
                step_tokens_SR[step, r] += 1
                slot = slot_ER[ids_TK[t, k], r]
                if not seen_SP[step, slot]:
                    seen_SP[step, slot] = True
                    activated_SR[step, r] += 1
        old = owner_T[t]
        if old >= 0:
            owned_R[old] += 1
        if d == 0:
            continue
        new = used[0]
        for i in range(1, d):
            r = used[i]
            better = held_R[r] > held_R[new]
            if held_R[r] == held_R[new]:
                better = r == old or (new != old and r < new)
            if better:
                new = r
        sums[0] += d
        sums[1] += dn
        sums[2] += d == 1
        sums[4] += d - 1
        if d > 1 and step >= 0:
            multi_S[step] = True
        for i in range(d):
            r = used[i]
            held_R[r] = 0
            present_R[r] += 1
            if old >= 0 and r != old:
                sums[3] += 1
                first_RR[old, r] += 1
            if r != new:
                second_RR[r, new] += 1
        owner_T[t] = new


def _slot_table(placement: Placement, layer: int) -> np.ndarray:
    """(E, R) slot that holds each expert on each rank, 0 where none does."""
    table = np.zeros((placement.num_experts, placement.num_ranks), np.int64)
    row = placement.slot_to_expert[layer]
    slots = np.flatnonzero(row >= 0)
    table[row[slots], placement.rank_of_slot[slots]] = slots
    return table


def _pairs(before_T: np.ndarray, after_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = (before_T >= 0) & (after_T >= 0)
    return before_T[both], after_T[both]


def _max_over_mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Over the last axis: max / mean, 1 where all are zero; `weights` make it a weighted mean."""
    mean = np.average(values, axis=-1, weights=weights)
    return np.divide(values.max(axis=-1), mean, out=np.ones_like(mean, dtype=float), where=mean > 0)


def _short(values: np.ndarray) -> str:
    text = [str(v) for v in values]
    return f"[{', '.join(text)}]" if len(text) <= 4 else f"[{text[0]}, {text[1]}, ..., {text[-1]}] ({len(text)})"
