"""`python -m moeplace.placement.warm_up` compiles the numba kernels, so that no real command waits for it.

Numba stores what it compiled beside the modules (or in the user's cache folder); this solves problems of a few experts
that touch every kernel, with the array types that real problems have.
"""

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.profiling.traces.trace import RoutingTrace


def warm_up() -> None:
    """Run every kernel once on a tiny instance."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((240, 2, 8)), axis=2)[:, :, :2].astype(np.int16)
    trace = RoutingTrace(ids, np.full(2, 8), sequence_ids=np.arange(240) // 20)
    flat = Cluster.uniform(4, slots_per_rank=2)
    nodes = Cluster.uniform(4, slots_per_rank=3, ranks_per_node=2)
    spare = Cluster.uniform(4, slots_per_rank=4, ranks_per_node=2)
    for tokens, cluster, mode, survive in (
        (trace, flat, "dispatch-combine", 0),
        (trace, nodes, "dispatch-combine", 0),
        (trace, spare, "dispatch-combine", 1),
        (trace.primary(), flat, "coherent", 0),
        (trace.primary(), spare, "coherent", 1),
        (trace, flat, "allgather", 0),
    ):
        problem = Problem.from_trace(
            tokens, cluster, mode=mode, objective="traffic", max_imbalance=1.5, survive=survive
        )
        solve(problem, time_limit=0.2)


if __name__ == "__main__":
    warm_up()
