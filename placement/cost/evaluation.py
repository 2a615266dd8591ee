"""Evaluation: what a placement costs on a trace. The one function that computes it, from what a `Replay` counts.

Shape letters: L MoE layers, R ranks, B batch.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.replay import Replay, replay
from moeplace.placement.cost.replica_rule import MOEPLACE, ReplicaRule
from moeplace.placement.cost.seconds import kv_exchange_seconds, layer_seconds
from moeplace.placement.cost.steps import StepShape, default_shape
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
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
        ranks_per_token_L, nodes_per_token_L, imbalance_L: (L,) by layer.
        stay_L: (L-1,) by boundary.
        travel_RR: (R, R) primary transitions from rank to rank over all boundaries.
        served_LR, served_LN: (L, R), (L, N) tokens that a rank serves, that any rank of a node serves.
        moved_RR: (R, R) copies of `copies_per_token` from rank to rank.
        replica_rule: name of the rule by which experts with several slots were served.
        seconds_L: (L,) of `predicted_seconds`, what each layer takes; the K/V exchange belongs to none.
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
    nodes_per_token_L: np.ndarray = field(repr=False)
    imbalance_L: np.ndarray = field(repr=False)
    stay_L: np.ndarray = field(repr=False)
    travel_RR: np.ndarray = field(repr=False)
    served_LR: np.ndarray = field(repr=False)
    served_LN: np.ndarray = field(repr=False)
    moved_RR: np.ndarray = field(repr=False)
    seconds_L: np.ndarray = field(repr=False)
    step_imbalance_mean: float = 1.0
    replica_rule: str = MOEPLACE.name

    def summary(self) -> dict[str, Any]:
        """The scalar figures, ready for JSON."""
        return {name: getattr(self, name) for name in _SCALARS}


_SCALARS = (
    "mode",
    "replica_rule",
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
    rule: ReplicaRule = MOEPLACE,
) -> Evaluation:
    """Replay `trace` under `placement`.

    Args:
        trace: the tokens to judge by; pass the held-out side for a quality figure.
        placement: the placement.
        mode: execution mode, by default the placement's own.
        cluster: links and speeds, by default the placement's nodes with default links.
        shape: sizes of a step, by default those of the trace and `StepShape`.
        calibration: measured times, by default nominal ones.
        rule: who serves an expert with several slots.

    Raises:
        InputError: the placement is for another model or another cluster.
    """
    counted, terms = count(
        trace, placement, mode=mode, cluster=cluster, shape=shape, calibration=calibration, rule=rule
    )
    return _evaluation(counted, *terms, rule)


class Terms(NamedTuple):
    """What counts are priced with."""

    cluster: Cluster
    """With calibrated links."""
    shape: StepShape
    calibration: Calibration


def count(
    trace: RoutingTrace,
    placement: Placement,
    *,
    mode: Mode | None,
    cluster: Cluster | None,
    shape: StepShape | None,
    calibration: Calibration | None,
    rule: ReplicaRule,
) -> tuple[Replay, Terms]:
    """The counts of `evaluate`, and the terms that it prices them with; raises as it does."""
    mode = mode or placement.mode
    require_same_model(trace, placement)
    if not trace.num_tokens:
        raise InputError("the trace has no tokens to evaluate")
    cluster = cluster or cluster_of(placement)
    require_same_cluster(cluster, placement)
    calibration = calibration or Calibration(cluster.intra, cluster.inter)
    cluster = calibration.apply(cluster)
    shape = shape or default_shape(trace)
    counted = replay(
        trace, placement, mode,
        batch=shape.batch, speed_R=cluster.speed_of_rank, expert=calibration.expert, rule=rule,
    )  # fmt: skip
    return counted, Terms(cluster, shape, calibration)


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


def require_same_cluster(cluster: Cluster, placement: Placement) -> None:
    """Check that a placement is for the ranks and nodes of a cluster.

    Raises:
        InputError: they differ.
    """
    if not np.array_equal(cluster.node_of_rank, placement.node_of_rank):
        raise InputError(
            f"the placement is for {placement.num_ranks} ranks on {placement.num_nodes} nodes, "
            f"the cluster has {cluster.num_ranks} on {cluster.num_nodes}"
        )


def cluster_of(placement: Placement) -> Cluster:
    """The cluster shape that a placement was made for, with default links and equal speeds."""
    return Cluster(placement.node_of_rank, placement.slots_of_rank, np.ones(placement.num_ranks))


def _evaluation(
    counted: Replay, cluster: Cluster, shape: StepShape, calibration: Calibration, rule: ReplicaRule
) -> Evaluation:
    tokens, layers, mode = counted.tokens, counted.num_layers, counted.mode
    d, dn, single = counted.sum_L5[:, :3].sum(axis=0) / (tokens * layers)
    imbalance_L = _max_over_mean(counted.load_LR / cluster.speed_of_rank, cluster.speed_of_rank)
    step_imbalance, activated_imbalance = counted.step_L4[:, :2].mean(axis=0)
    node = cluster.node_of_rank
    same_RR = node[:, None] == node[None, :]
    travel_LRR = counted.travel_LRR
    travel_RR, pairs_L = travel_LRR.sum(axis=0), np.maximum(travel_LRR.sum(axis=(1, 2)), 1)
    pairs = max(int(travel_RR.sum()), 1)
    moved_LRR = counted.first_LRR + counted.second_LRR
    if mode == "coherent":
        moved_LRR = moved_LRR[1:]  # per layer boundary, as copies_per_token
    moved_RR = moved_LRR.sum(axis=0) / max(len(moved_LRR), 1)
    seconds_L = layer_seconds(counted, cluster, shape, calibration)
    return Evaluation(
        mode=mode,
        tokens=tokens,
        ranks_per_token=float(d),
        nodes_per_token=float(dn),
        copies_per_token=_copies_per_token(counted),
        node_copies_per_token=float((moved_RR * ~same_RR).sum()),
        stay_rate=float(np.trace(travel_RR) / pairs),
        node_stay_rate=float((travel_RR * same_RR).sum() / pairs),
        single_rank_share=float(single),
        imbalance_mean=float(imbalance_L.mean()),
        imbalance_worst=float(imbalance_L.max()),
        activated_imbalance_mean=float(activated_imbalance),
        step_imbalance_mean=float(step_imbalance),
        predicted_seconds=float(seconds_L.sum()) + kv_exchange_seconds(counted, cluster, shape),
        batch=min(shape.batch, tokens),
        kv_bytes_per_token=_kv_bytes(counted, shape),
        collectives_per_layer=_collectives_per_layer(counted),
        load_LR=counted.load_LR,
        ranks_per_token_L=counted.sum_L5[:, 0] / tokens,
        nodes_per_token_L=counted.sum_L5[:, 1] / tokens,
        imbalance_L=imbalance_L,
        stay_L=travel_LRR.trace(axis1=1, axis2=2) / pairs_L,
        travel_RR=travel_RR,
        served_LR=counted.served_LR,
        served_LN=counted.served_LN,
        moved_RR=moved_RR,
        seconds_L=seconds_L,
        replica_rule=rule.name,
    )


def _copies_per_token(counted: Replay) -> float:
    ranks, cells = counted.num_ranks, counted.tokens * counted.num_layers
    if counted.mode == "allgather":
        return 2.0 * (ranks - 1)
    if counted.mode == "coherent":
        return float(counted.sum_L5[1:, 3:].sum() / max(cells - counted.tokens, 1))
    if counted.knows_home:
        return float(2 * counted.sum_L5[:, 3].sum() / cells)
    return float(2 * counted.sum_L5[:, 0].sum() / cells * (1 - 1 / ranks))


def _collectives_per_layer(counted: Replay) -> float:
    if counted.num_ranks == 1:
        return 0.0
    return 1.0 + float(counted.step_L4[:, 3].mean()) if counted.mode == "coherent" else 2.0


def _kv_bytes(counted: Replay, shape: StepShape) -> float:
    if counted.mode != "coherent":
        return 0.0
    return float((counted.num_ranks - 1) * counted.num_layers * shape.kv_dim * shape.dtype_bytes)


def _max_over_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Over the last axis: max / weighted mean, 1 where all are zero."""
    mean = np.average(values, axis=-1, weights=weights)
    return np.divide(values.max(axis=-1), mean, out=np.ones_like(mean, dtype=float), where=mean > 0)


def _short(values: np.ndarray) -> str:
    text = [str(v) for v in values]
    return f"[{', '.join(text)}]" if len(text) <= 4 else f"[{text[0]}, {text[1]}, ..., {text[-1]}] ({len(text)})"
