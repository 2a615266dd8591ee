"""Predicted seconds of one step, from what a replay counted and what a calibration measured.

    seconds = sum over layers of [ sum over exchanges of (latency + transfer) + expert time ] + the K/V exchange

    transfer    = the busiest rank's bytes per tier / that tier's bandwidth (of each pair, where a topology tells them
                  apart), both tiers added; between nodes also the busiest node's bytes / the node's shared bandwidth,
                  whichever is longer
    expert time = max over ranks of fixed + per_token * tokens + per_activated * activated experts, both divided by
                  the rank's relative speed

Shape letters: L MoE layers, R ranks, N nodes.
"""

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.gateways import through_gateways
from moeplace.placement.cost.replay import Replay
from moeplace.placement.cost.steps import StepShape


def predict_step(counted: Replay, cluster: Cluster, shape: StepShape, calibration: Calibration) -> float:
    """Seconds of one step of `shape.batch` tokens.

    Args:
        counted: with the batch of `shape`, the speeds of `cluster` and the expert time of `calibration`.
        cluster: with calibrated links.
        shape: sizes of a step.
        calibration: times.
    """
    layers = float(layer_seconds(counted, cluster, shape, calibration).sum())
    return layers + kv_exchange_seconds(counted, cluster, shape)


def layer_seconds(counted: Replay, cluster: Cluster, shape: StepShape, calibration: Calibration) -> np.ndarray:
    """(L,) seconds of a step in each layer, see `predict_step`."""
    outside_L = seconds_outside_experts(counted, cluster, shape, calibration)
    return outside_L + calibration.expert.fixed + counted.step_L4[:, 2]


def seconds_outside_experts(
    counted: Replay, cluster: Cluster, shape: StepShape, calibration: Calibration
) -> np.ndarray:
    """(L,) seconds of a step in each layer beside its experts: exchanges, attention, norms. See `predict_step`."""
    coherent = counted.mode == "coherent"
    hidden = shape.batch * shape.hidden_size * shape.dtype_bytes
    latency = collective_latency(cluster)
    seconds_L = np.full(counted.num_layers, calibration.layer_overhead(counted.mode))
    for layer in range(counted.num_layers):
        seconds_L[layer] += latency * (1.0 + (counted.step_L4[layer, 3] if coherent else 1.0))
        for copies_LRR in (counted.first_LRR, counted.second_LRR):
            seconds_L[layer] += transfer_seconds(copies_LRR[layer], cluster, hidden)
    return seconds_L


def kv_exchange_seconds(counted: Replay, cluster: Cluster, shape: StepShape) -> float:
    """Seconds of a step's K/V exchange in `coherent` mode; 0 in others and on one rank."""
    if counted.mode != "coherent" or cluster.num_ranks == 1:
        return 0.0
    return collective_latency(cluster) + _kv_seconds(counted.owned_LR.sum(axis=0), cluster, shape)


def _kv_seconds(owned_R: np.ndarray, cluster: Cluster, shape: StepShape) -> float:
    """The K/V of all tokens that a rank attends, to every other rank: once to each other node, forwarded inside it."""
    wanted_RR = np.repeat(owned_R[:, None], cluster.num_ranks, axis=1)
    entering_RN = np.repeat(owned_R[:, None], cluster.num_nodes, axis=1)
    copies_RR = through_gateways(wanted_RR, entering_RN, cluster.node_of_rank)
    return transfer_seconds(copies_RR, cluster, shape.batch * shape.kv_dim * shape.dtype_bytes)


def transfer_seconds(copies_RR: np.ndarray, cluster: Cluster, bytes_per_copy: float) -> float:
    """Seconds of one exchange without its latency: the busiest rank (and node) per tier.

    Args:
        copies_RR: (R, R) copies of a hidden vector from rank to rank; the diagonal is ignored.
        cluster: links and nodes.
        bytes_per_copy: bytes of one copy.
    """
    node = cluster.node_of_rank
    inside = copies_RR * (node[:, None] == node[None, :])
    seconds = _busiest(inside, cluster, cluster.intra.bandwidth) + slowest_direction_seconds(copies_RR, cluster)
    return seconds * bytes_per_copy


def slowest_direction_seconds(bytes_RR: np.ndarray, cluster: Cluster) -> float:
    """Seconds for which the busiest rank's or node's link between nodes is in use, sending or receiving.

    Args:
        bytes_RR: (R, R) bytes from rank to rank; those inside nodes are ignored.
        cluster: links and nodes.
    """
    if cluster.num_nodes == 1:
        return 0.0
    node = cluster.node_of_rank
    across = bytes_RR * (node[:, None] != node[None, :])
    by_node = max(np.bincount(node, across.sum(axis=axis)).max() for axis in (0, 1))
    by_rank = _busiest(across, cluster, cluster.inter.bandwidth)
    return float(max(by_rank, by_node / cluster.inter.node_bandwidth))


def _busiest(bytes_RR: np.ndarray, cluster: Cluster, bandwidth: float) -> float:
    """Seconds of the rank that sends or receives longest, at one bandwidth or by the pairs of a topology."""
    remote = bytes_RR * ~np.eye(len(bytes_RR), dtype=bool)
    if cluster.distance_RR is not None:
        remote, bandwidth = remote * cluster.seconds_per_byte_RR, 1.0
    return float(max(remote.sum(axis=0).max(), remote.sum(axis=1).max())) / bandwidth


def collective_latency(cluster: Cluster) -> float:
    """Seconds that a collective over the whole cluster costs, whatever it carries; 0 on one rank."""
    if cluster.num_ranks == 1:
        return 0.0
    return cluster.inter.latency if cluster.num_nodes > 1 else cluster.intra.latency


def expert_seconds(tokens_R: np.ndarray, activated_R: np.ndarray, cluster: Cluster, expert: ExpertTime) -> float:
    """Seconds until the slowest rank has computed one layer's experts.

    Args:
        tokens_R: (..., R) routed tokens per rank; leading axes are steps, over which the mean is taken.
        activated_R: (..., R) activated experts per rank.
    """
    work = expert.per_token * tokens_R + expert.per_activated * activated_R
    return expert.fixed + float((work / cluster.speed_of_rank).max(axis=-1).mean())
