"""Free alignment: ranks of a layer may be renamed without changing its traffic or balance, so name them well.

With clusters of experts fixed in every layer, the names that keep most tokens in place follow from one assignment
problem per boundary, composed forward; that is optimal over all renamings (MoETuner's second program, uniform links,
in polynomial time). Only ranks of equal slots and speed exchange names; with several nodes, ranks exchange names inside
their node, and whole nodes of one shape exchange names first.

Shape letters: L MoE layers, R ranks, N nodes, S slots per layer.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplace.placement.cluster import Cluster

_FORBIDDEN = 1e15


def align_ranks(flow_LRR: np.ndarray, cluster: Cluster) -> np.ndarray:
    """(L, R) new name of every rank of every layer, given the tokens between ranks of consecutive layers.

    Args:
        flow_LRR: (L-1, R, R) tokens from rank to rank under the present names.
        cluster: decides which ranks may exchange names.
    """
    names = [np.arange(cluster.num_ranks)]
    for flow_RR in flow_LRR:
        flow = np.empty_like(flow_RR)
        flow[names[-1]] = flow_RR  # rows by the new names of the layer before
        names.append(_best_names(flow.astype(np.float64), cluster))
    return np.stack(names)


def _best_names(flow_RR: np.ndarray, cluster: Cluster) -> np.ndarray:
    """(R,) name of each rank (column of `flow_RR`) that keeps most tokens on the rank of the row."""
    if cluster.num_nodes == 1:
        return _match(flow_RR.T, _exchangeable(cluster, np.arange(cluster.num_ranks), np.arange(cluster.num_ranks)))
    members = [np.flatnonzero(cluster.node_of_rank == n) for n in range(cluster.num_nodes)]
    gain_NN = np.zeros((len(members),) * 2)
    allowed_NN = np.zeros(gain_NN.shape, bool)
    inner: dict[tuple[int, int], np.ndarray] = {}
    for source, columns in enumerate(members):
        for target, rows in enumerate(members):
            if len(rows) != len(columns):
                continue
            allowed = _exchangeable(cluster, columns, rows)
            if not allowed.any(axis=1).all():
                continue
            block = flow_RR[np.ix_(rows, columns)].T
            inner[source, target] = _match(block, allowed)
            # Tokens that stay in the node count most; staying on the rank decides ties.
            stay = block[np.arange(len(columns)), inner[source, target]].sum()
            gain_NN[source, target] = block.sum() + 1e-3 * stay
            allowed_NN[source, target] = True
    names = np.empty(cluster.num_ranks, np.int64)
    for source, target in enumerate(_match(gain_NN, allowed_NN)):
        names[members[source]] = members[target][inner[source, int(target)]]
    return names


def _exchangeable(cluster: Cluster, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    same_slots = cluster.slots_of_rank[a][:, None] == cluster.slots_of_rank[b][None, :]
    return same_slots & np.isclose(cluster.speed_of_rank[a][:, None], cluster.speed_of_rank[b][None, :])


def _match(gain: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Column of each row at most gain."""
    _, columns = linear_sum_assignment(np.where(allowed, -gain, _FORBIDDEN))
    return columns
