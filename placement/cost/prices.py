"""What copies cost beside each other, from the links of a cluster: the weights of the traffic objective.

The unit is a copy between two ranks of a node, on average (of any two ranks, where every node is one rank). A token
that is served on other ranks pays

    dispatch-combine    sum over ranks that serve it of rank_R + sum over nodes that do of node_N:
                        a copy inside the node, and what crossing to the node costs more than that, once per node
    coherent            sum over its copies of pair_RR

With the two tiers of links, rank_R = 1 and node_N = (a byte between nodes / inside a node) - 1, below 0 where links
inside are the slower ones. A topology gives every rank, node and pair its own price.

Shape letters: R ranks, N nodes.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.placement.cluster import Cluster


@dataclass(frozen=True, eq=False)
class LinkPrices:
    """See the module.

    Attributes:
        rank_R: (R,) of a rank that serves a token.
        node_N: (N,) of a node that does, beside its ranks.
        pair_RR: (R, R) of a copy from rank to rank, 0 on the diagonal.
    """

    rank_R: np.ndarray
    node_N: np.ndarray
    pair_RR: np.ndarray

    @classmethod
    def of(cls, cluster: Cluster) -> "LinkPrices":
        """The prices of a cluster."""
        ranks, node_R = cluster.num_ranks, cluster.node_of_rank
        same_RR = node_R[:, None] == node_R[None, :]
        mates_RR = same_RR & ~np.eye(ranks, dtype=bool)
        if ranks == 1:
            return cls(np.ones(1), np.zeros(1), np.zeros((1, 1)))
        if not mates_RR.any():  # every rank is a node: there is one kind of link
            pair_RR = cluster.cost_RR / cluster.cost_RR[~same_RR].mean()
            return cls(_mean_to(pair_RR, ~same_RR), np.zeros(ranks), pair_RR)
        inside = cluster.cost_RR[mates_RR].mean()
        across = cluster.cost_RR[~same_RR].mean() if cluster.num_nodes > 1 else inside
        if cluster.distance_RR is None:
            weight = float(across / inside) - 1.0
            pair_RR = np.where(same_RR, 1.0, 1.0 + weight)
            np.fill_diagonal(pair_RR, 0.0)
            return cls(np.ones(ranks), np.full(cluster.num_nodes, weight), pair_RR)
        pair_RR = cluster.cost_RR / inside
        rank_R = np.where(mates_RR.any(axis=0), _mean_to(pair_RR, mates_RR), 1.0)
        entry_R = _mean_to(pair_RR, ~same_RR)
        node_N = np.array([entry_R[node_R == node].mean() for node in range(cluster.num_nodes)]) - 1.0
        return cls(rank_R, node_N if cluster.num_nodes > 1 else np.zeros(1), pair_RR)


def _mean_to(pair_RR: np.ndarray, counted_RR: np.ndarray) -> np.ndarray:
    """(R,) mean over the counted senders of each rank; 0 where there is none."""
    count_R = counted_RR.sum(axis=0)
    return np.divide((pair_RR * counted_RR).sum(axis=0), count_R, out=np.zeros(len(count_R)), where=count_R > 0)
