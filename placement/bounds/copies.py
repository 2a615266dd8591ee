"""Bounds on traffic from those on its parts.

Shape letters: T tokens, L MoE layers, R ranks, N nodes.
"""

import numpy as np

from moeplace.placement.bounds.layers import LayerBounds
from moeplace.placement.problem import Problem
from moeplace.profiling.traces.trace import RoutingTrace


def least_traffic(problem: Problem, trace: RoutingTrace, bounds: LayerBounds) -> float:
    """The traffic objective at the bounds of its parts (see `problem_bounds`)."""
    if problem.mode == "allgather":
        return 0.0
    if problem.mode == "dispatch-combine":
        return float(bounds.d_L.mean() + problem.node_weight * bounds.dn_L.mean())
    first_L, second_L = coherent_copies(problem, trace, bounds.d_L, bounds.stay_L, problem.num_ranks)
    total = first_L.sum() + second_L[1:].sum()
    if problem.node_weight:
        first_L, second_L = coherent_copies(problem, trace, bounds.dn_L, bounds.node_stay_L, problem.cluster.num_nodes)
        total += problem.node_weight * (first_L.sum() + second_L[1:].sum())
    return float(total) / max(problem.num_layers - 1, 1)


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
