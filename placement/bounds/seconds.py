"""Bounds on the predicted seconds of a step: every term of the cost model at its own bound.

The busiest rank moves at least the mean, and computes at least the mean or what the load bounds say of "seconds per
expert".

Shape letters: T tokens, L MoE layers, E experts, R ranks, N nodes, S steps.
"""

import numpy as np

from moeplace.placement.bounds.copies import coherent_copies, least_paid, used_share
from moeplace.placement.bounds.layers import LayerBounds
from moeplace.placement.bounds.load import least_imbalance
from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.gateways import gateways
from moeplace.placement.cost.replica_rule import home_ranks
from moeplace.placement.cost.seconds import collective_latency, transfer_seconds
from moeplace.placement.cost.steps import step_of_token
from moeplace.placement.problem import Problem
from moeplace.profiling.traces.trace import RoutingTrace


def least_seconds(problem: Problem, trace: RoutingTrace, bounds: LayerBounds) -> float:
    """Predicted seconds of a step (`cost_model`), every maximum over ranks replaced by a bound."""
    calibration, shape = problem.calibration, problem.shape
    cluster = calibration.apply(problem.cluster)
    latency = collective_latency(cluster)
    hidden = shape.batch * shape.hidden_size * shape.dtype_bytes
    layers, ranks = problem.num_layers, cluster.num_ranks
    seconds = layers * (calibration.layer_overhead(problem.mode) + latency)
    seconds += sum(_least_expert_seconds(problem, trace, layer) for layer in range(layers))
    if ranks == 1:
        return float(seconds)
    if problem.mode == "allgather":
        return float(
            seconds + layers * (latency + 2 * transfer_seconds(np.full((ranks,) * 2, 1 / ranks), cluster, hidden))
        )
    if problem.mode == "dispatch-combine":
        return float(seconds + layers * latency + 2 * hidden * _least_dispatch(problem, trace, bounds, cluster))
    first_L, second_L = coherent_copies(problem, trace, bounds.d_L, bounds.stay_L, ranks)
    across = coherent_copies(problem, trace, bounds.dn_L, bounds.node_stay_L, cluster.num_nodes)
    moved = _least_first_scatter(float(bounds.d_L[0]), cluster)
    moved += _least_move(float(first_L.sum()), float(across[0].sum()), cluster)
    moved += _least_move(float(second_L.sum()), float(across[1].sum()), cluster)
    return float(seconds + hidden * moved + latency + _least_kv(problem, trace, cluster))


def _least_dispatch(problem: Problem, trace: RoutingTrace, bounds: LayerBounds, cluster: Cluster) -> float:
    """Seconds per byte of sending all layers' tokens from their homes, at least."""
    has_spare = bool((problem.redundant_slots > 0).any())
    if not has_spare and cluster.distance_RR is None:
        return _least_scatter(float(bounds.d_L.sum()), float(bounds.dn_L.sum()), cluster)
    ranks, largest = cluster.num_ranks, int(cluster.ranks_per_node.max())
    copies_L, across_L = bounds.d_L * (1 - 1 / ranks), bounds.dn_L * (1 - largest / ranks)
    if has_spare:  # with replicas homes are known, and may serve more of their own tokens than chance would have it
        home_L = np.array([_most_at_home(problem, trace, layer) for layer in range(problem.num_layers)])
        copies_L = np.minimum(copies_L, bounds.d_L - home_L)
        across_L = np.minimum(across_L, bounds.dn_L - used_share(trace))
    return _least_move(float(np.maximum(copies_L, 0.0).sum()), float(np.maximum(across_L, 0.0).sum()), cluster)


def _most_at_home(problem: Problem, trace: RoutingTrace, layer: int) -> float:
    """Largest share of tokens whose home can hold one of their experts: every expert once, then the redundant slots."""
    ids_TK, ranks, experts = trace.layer(layer), problem.num_ranks, int(problem.experts_per_layer[layer])
    token, slot = np.nonzero(ids_TK >= 0)
    cell = ids_TK[token, slot].astype(np.int64) * ranks + home_ranks(len(ids_TK), ranks)[token]
    falling_ER = -np.sort(-np.bincount(cell, minlength=experts * ranks).reshape(experts, ranks), axis=1)
    further = np.sort(falling_ER[:, 1:], axis=None)[::-1][: max(int(problem.redundant_slots[layer]), 0)]
    met = falling_ER[:, 0].sum() + further.sum()
    return float(min(met, (ids_TK >= 0).any(axis=1).sum()) / len(ids_TK))


def _least_scatter(d: float, dn: float, cluster: Cluster) -> float:
    """Seconds per byte of sending each token from a uniform home to its d ranks on dn nodes, at least.

    A token reaches another node once, at the rank whose place there is the home's place (gateway), and is forwarded
    inside. Rank r is the gateway of c_r homes, itself included, so it receives p_r (R - c_r) / R copies from inside and
    q_n (c_r - 1) / R from other nodes, sum p = d, sum q = dn; its node receives q_n (R - size) / R.
    """
    node_R, size_N, ranks = cluster.node_of_rank, cluster.ranks_per_node, cluster.num_ranks
    homes_R = np.bincount(gateways(node_R).ravel(), minlength=ranks)
    seconds = d * _harmonic((ranks - homes_R) / ranks) / cluster.intra.bandwidth
    if cluster.num_nodes > 1:
        across_N = np.zeros(cluster.num_nodes)
        np.maximum.at(across_N, node_R, (homes_R - 1) / ranks)
        by_rank = _harmonic(across_N) / cluster.inter.bandwidth
        seconds += dn * max(by_rank, _harmonic((ranks - size_N) / ranks) / cluster.inter.node_bandwidth)
    return float(seconds)


def _least_first_scatter(d: float, cluster: Cluster) -> float:
    """The same for the first layer in `coherent` mode, where every copy is sent for itself.

    Rank r receives p_r (size of its node - 1) / R copies from inside and p_r (R - size) / R from other nodes.
    """
    node_R, size_N, ranks = cluster.node_of_rank, cluster.ranks_per_node, cluster.num_ranks
    if cluster.distance_RR is not None:
        return d * float(cluster.seconds_per_byte_RR.sum(axis=0).min()) / ranks**2
    inside_R, across_N = (size_N[node_R] - 1) / ranks, (ranks - size_N) / ranks
    seconds = d * _harmonic(inside_R) / cluster.intra.bandwidth
    if cluster.num_nodes > 1:
        by_rank = _harmonic(across_N[node_R]) / cluster.inter.bandwidth
        seconds += d * max(by_rank, _harmonic(across_N) / cluster.inter.node_bandwidth)
    return float(seconds)


def _harmonic(factors: np.ndarray) -> float:
    """Least possible max of p_i factor_i over p >= 0 that sum to 1: equal, at 1 / sum(1 / factor)."""
    return 0.0 if (factors == 0).any() else float(1 / (1 / factors).sum())


def _least_move(copies: float, across: float, cluster: Cluster) -> float:
    """Seconds per byte of one exchange with so many copies per token, `across` of them between nodes, at least."""
    if cluster.distance_RR is not None:
        return least_paid(copies, across, cluster.seconds_per_byte_RR / cluster.num_ranks, cluster)
    inside = 1 / (cluster.num_ranks * cluster.intra.bandwidth)
    if cluster.num_nodes == 1:
        return copies * inside
    outside = _mean_outside(cluster)
    return across * outside + max(copies - across, 0.0) * min(inside, outside)


def _mean_outside(cluster: Cluster) -> float:
    """Seconds per byte between nodes if all ranks and nodes share it evenly."""
    by_rank = 1 / (cluster.num_ranks * cluster.inter.bandwidth)
    return max(by_rank, 1 / (cluster.num_nodes * cluster.inter.node_bandwidth))


def _least_kv(problem: Problem, trace: RoutingTrace, cluster: Cluster) -> float:
    """The K/V exchange of `coherent`: every owned token reaches all other ranks, once per node and forwarded inside."""
    shape, ranks, nodes = problem.shape, cluster.num_ranks, cluster.num_nodes
    owned, seen_T = 1.0, (trace.layer(0) >= 0).any(axis=1)
    for layer in range(1, problem.num_layers):
        owned += float(seen_T.mean())
        seen_T = seen_T | (trace.layer(layer) >= 0).any(axis=1)
    kv_bytes = shape.batch * shape.kv_dim * shape.dtype_bytes
    if cluster.distance_RR is not None:
        return _least_move(owned * (ranks - 1), owned * (nodes - 1), cluster) * kv_bytes
    seconds = owned * (ranks - nodes) / (ranks * cluster.intra.bandwidth)
    if nodes > 1:
        seconds += owned * (nodes - 1) * _mean_outside(cluster)
    return seconds * kv_bytes


def _least_expert_seconds(problem: Problem, trace: RoutingTrace, layer: int) -> float:
    """Expert time of a layer, mean over steps of the slowest rank; the larger of two bounds.

    By step: all work of the step over all speeds; the heaviest single expert on the fastest rank, without replicas.
    By mean: the slowest rank of the mean step, from the load bounds of "seconds per expert".
    """
    expert, cluster = problem.calibration.expert, problem.cluster
    batch = problem.shape.batch
    step_T, ids_TK = step_of_token(trace.num_tokens, batch), trace.layer(layer)
    scale = batch / min(batch, trace.num_tokens)
    experts, steps = int(problem.experts_per_layer[layer]), int(step_T.max()) + 1
    counted = (ids_TK >= 0) & (step_T >= 0)[:, None]
    token, slot = np.nonzero(counted)
    cell = step_T[token] * experts + ids_TK[token, slot]
    tokens_SE = np.bincount(cell, minlength=steps * experts).reshape(steps, experts)
    work_SE = expert.per_token * scale * tokens_SE + expert.per_activated * (tokens_SE > 0)
    speed_R = cluster.speed_of_rank
    by_step_S = work_SE.sum(axis=1) / speed_R.sum()
    if not problem.redundant_slots[layer]:
        by_step_S = np.maximum(by_step_S, work_SE.max(axis=1) / speed_R.max())
    work_E = work_SE.mean(axis=0)
    by_mean = least_imbalance(problem, layer, work_E) * work_E.sum() / speed_R.sum()
    return float(expert.fixed + max(by_step_S.mean(), by_mean))
