"""Lower bounds on the load of the busiest rank of a layer, hence on its imbalance.

Shape letters: L MoE layers, E experts of a layer, R ranks, C slots per rank, S slots per layer.
P_(1) >= P_(2) >= ... are the loads in falling order.
"""

import numpy as np

from moeplace.placement.problem import Problem
from moeplace.placement.rebalancing.bound import busiest_without_replicas, slowest_with_replicas


def least_imbalance(problem: Problem, layer: int, load_E: np.ndarray | None = None) -> float:
    """Lower bound on a layer's imbalance: max over ranks of load / speed, over (sum of loads) / (sum of speeds).

    Args:
        problem: cluster and loads.
        layer: MoE layer.
        load_E: other loads than the problem's, for example seconds per expert.
    """
    experts, cluster = int(problem.experts_per_layer[layer]), problem.cluster
    own = load_E is None
    loads = problem.load_LE[layer, :experts] if load_E is None else load_E
    speed_R = cluster.speed_of_rank
    mean = loads.sum() / speed_R.sum()
    if not mean:
        return 1.0
    slowest = slowest_with_replicas(loads, max(cluster.num_slots, experts), speed_R)
    if not problem.redundant_slots[layer] and np.ptp(speed_R) == 0:
        whole = own and bool((loads == np.rint(loads)).all())
        slowest = max(slowest, busiest_without_replicas(loads, cluster.slots_of_rank, whole=whole) / speed_R[0])
    return max(float(slowest / mean), 1.0)
