"""Bounds on traffic from those on its parts.

Shape letters: T tokens, L MoE layers, R ranks, N nodes.
"""

import numpy as np

from moeplace.placement.bounds.layers import LayerBounds
from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.profiling.traces.trace import RoutingTrace


def least_traffic(problem: Problem, trace: RoutingTrace, bounds: LayerBounds) -> float:
    """The traffic objective at the bounds of its parts (see `problem_bounds`)."""
    if problem.mode == "allgather":
        return 0.0
    if problem.mode == "dispatch-combine":
        used_L = used_share(trace)
        by_layer = zip(bounds.d_L, bounds.dn_L, used_L, strict=True)
        return float(np.mean([_least_served(d, dn, used, problem) for d, dn, used in by_layer]))
    ranks, nodes = problem.num_ranks, problem.cluster.num_nodes
    copies = sum_of_copies(*coherent_copies(problem, trace, bounds.d_L, bounds.stay_L, ranks))
    across = sum_of_copies(*coherent_copies(problem, trace, bounds.dn_L, bounds.node_stay_L, nodes))
    return least_paid(copies, across, problem.prices.pair_RR, problem.cluster) / max(problem.num_layers - 1, 1)


def least_paid(copies: float, across: float, pair_RR: np.ndarray, cluster: Cluster) -> float:
    """Least cost of at least so many copies, of which at least `across` between nodes, at the prices of pairs.

    Where a copy inside a node is the dearer one, every copy may as well cross: `across` is no more than a lower bound.
    """
    node_R = cluster.node_of_rank
    same_RR = (node_R[:, None] == node_R[None, :]) & ~np.eye(len(node_R), dtype=bool)
    inside = float(pair_RR[same_RR].min()) if same_RR.any() else np.inf
    if cluster.num_nodes == 1:
        return copies * inside if same_RR.any() else 0.0
    outside = float(pair_RR[node_R[:, None] != node_R[None, :]].min())
    return across * outside + max(copies - across, 0.0) * min(inside, outside)


def sum_of_copies(first_L: np.ndarray, second_L: np.ndarray) -> float:
    """Of both exchanges at the boundaries of layers: the first layer's are not counted."""
    return float(first_L.sum() + second_L[1:].sum())


def used_share(trace: RoutingTrace) -> np.ndarray:
    """(L,) share of tokens that have an expert in a layer."""
    return np.array([(trace.layer(layer) >= 0).any(axis=1).mean() for layer in range(trace.num_layers)])


def _least_served(d: float, dn: float, used: float, problem: Problem) -> float:
    """Least price of the ranks and nodes of a layer, per token, when tokens have d ranks and dn nodes in the mean.

    The better of two: ranks and nodes each for themselves, the cheapest first, if no node has a price below 0; and a
    token's ranks in any case, where the first rank of a node costs its node too. Both are convex in the number of
    ranks, so the mean number stands for all.
    """
    if used <= 0:
        return 0.0
    prices, node_R = problem.prices, problem.cluster.node_of_rank
    firsts, others = [], []
    for node, price in enumerate(prices.node_N):
        rising = np.sort(prices.rank_R[node_R == node])
        firsts.append(max(float(rising[0] + price), 0.0))
        others += rising[1:].tolist()
    best = _cheapest(np.array([*firsts, *others]), d / used)
    if prices.node_N.min() >= 0:
        best = max(best, _cheapest(prices.rank_R, d / used) + _cheapest(prices.node_N, dn / used))
    return used * best


def _cheapest(prices: np.ndarray, count: float) -> float:
    """Sum of the `count` lowest prices, the last one in part."""
    rising = np.sort(prices)
    whole = min(int(count), len(rising))
    rest = rising[whole] * (count - whole) if whole < len(rising) else 0.0
    return float(rising[:whole].sum() + rest)


def coherent_copies(
    problem: Problem, trace: RoutingTrace, d_L: np.ndarray, stay_L: np.ndarray, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Least copies per token of the first exchange (L-1,), and of the second (L,), in `coherent` mode, between parts.

    First: d - 1[owner in A] >= d - 1, and for K = 1 one copy per token that does not stay; a token that has no owner
    yet, for lack of experts so far, pays nothing. Second: d - 1. Without an expert in a layer a token pays nothing
    there. Between nodes the same holds with dn.
    """
    seen_T, used_L, fresh_L = np.zeros(trace.num_tokens, bool), [], []
    for layer in range(problem.num_layers):
        k_T = (trace.layer(layer) >= 0).sum(axis=1)
        used_L.append((k_T > 0).mean())
        fresh_L.append((np.clip(k_T, 1, parts) - 1)[~seen_T].sum() / trace.num_tokens)
        seen_T |= k_T > 0
    second_L = np.maximum(d_L - used_L, 0.0)
    if problem.top_k > 1:
        return np.maximum(second_L - fresh_L, 0.0)[1:], second_L
    pairs_L = problem.transitions_LEE.sum(axis=(1, 2)) / trace.num_tokens
    return np.maximum(pairs_L - stay_L, 0.0), second_L
