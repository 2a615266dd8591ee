"""Small problems for the tests of bounds and solvers."""

from typing import Any

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.profiling.traces.trace import RoutingTrace


def skewed_trace(
    seed: int, *, tokens: int = 40, layers: int = 2, experts: int = 4, top_k: int = 2, ragged: float = 0.0
) -> RoutingTrace:
    """Tokens with a few underlying topics, so that load, co-activation and transitions are all uneven."""
    rng = np.random.default_rng(seed)
    taste = 1.5 * rng.standard_normal((5, layers, experts))[rng.integers(0, 5, tokens)]
    scores = taste + rng.gumbel(size=(tokens, layers, experts))
    ids_TLK = np.argsort(-scores, axis=2)[:, :, :top_k]
    if ragged:
        keep = rng.random(ids_TLK.shape) >= ragged
        keep[:, :, 1:] &= keep[:, :, :1]  # -1 only at the end of a row
        ids_TLK = np.where(np.logical_and.accumulate(keep, axis=2), ids_TLK, -1)
    return RoutingTrace(ids_TLK, np.full(layers, experts))


def skewed_problem(
    seed: int,
    *,
    ranks: int = 2,
    slots: int | list[int] = 2,
    ranks_per_node: int | None = None,
    speed: list[float] | None = None,
    trace: dict[str, Any] | None = None,
    **options: Any,
) -> Problem:
    """A problem on such a trace; traffic objective unless said."""
    cluster = Cluster.uniform(ranks, slots_per_rank=slots, ranks_per_node=ranks_per_node)
    if speed is not None:
        cluster = cluster.replace(speed_of_rank=np.array(speed))
    options.setdefault("objective", "traffic")
    return Problem.from_trace(skewed_trace(seed, **(trace or {})), cluster, **options)
