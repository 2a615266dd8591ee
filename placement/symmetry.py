"""Symmetry of a cluster: which ranks may change places without changing what any placement costs, and who best does.

Ranks are equal when slots, speed and distances to all others are. With several nodes, ranks change places inside their
node, and equal nodes as blocks. The best renaming is an assignment problem on each level.

Shape letters: R ranks, N nodes.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplace.placement.cluster import Cluster

_INSIDE = 1e-3
"""Weight of what is gained rank by rank where blocks are valued for themselves: it decides ties between blocks."""


class Symmetry:
    """See the module."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.ranks_of_node = [np.flatnonzero(cluster.node_of_rank == node) for node in range(cluster.num_nodes)]
        self.node_class = [self._first_equal_node(node) for node in range(cluster.num_nodes)]
        self.rank_class = [self._first_twin(rank) for rank in range(cluster.num_ranks)]

    def best_names(self, value_RR: np.ndarray, *, by_block: bool = False) -> np.ndarray:
        """(R,) for each rank, what it takes: the exchange of greatest value.

        Args:
            value_RR: [r, b] = gain if rank r takes what stands at b.
            by_block: a node's gain is all of its block, wherever inside the node; the ranks' own gain decides ties.
        """
        nodes = len(self.ranks_of_node)
        value_NN = np.full((nodes, nodes), -np.inf)
        inner: dict[tuple[int, int], np.ndarray] = {}
        for i, ranks in enumerate(self.ranks_of_node):
            for j, others in enumerate(self.ranks_of_node):
                if self.node_class[i] == self.node_class[j]:
                    value, inner[i, j] = self._within(value_RR, ranks, others)
                    block = float(value_RR[np.ix_(ranks, others)].sum())
                    value_NN[i, j] = block + _INSIDE * value if by_block else value
        names_R = np.empty(len(value_RR), np.int64)
        for node, other in zip(*linear_sum_assignment(value_NN, maximize=True), strict=True):
            names_R[self.ranks_of_node[node]] = inner[int(node), int(other)]
        return names_R

    def _within(self, value_RR: np.ndarray, ranks: np.ndarray, others: np.ndarray) -> tuple[float, np.ndarray]:
        """Best value when `ranks` take the block of `others`, and what each of them takes."""
        classes = np.array([self.rank_class[rank] for rank in ranks])
        block = np.where(classes[:, None] == classes[None, :], value_RR[np.ix_(ranks, others)], -np.inf)
        rows, columns = linear_sum_assignment(block, maximize=True)
        chosen = np.empty(len(ranks), np.int64)
        chosen[rows] = others[columns]
        return float(block[rows, columns].sum()), chosen

    def _first_twin(self, rank: int) -> int:
        """The lowest rank of the node that may change places with `rank`."""
        node = self.ranks_of_node[int(self.cluster.node_of_rank[rank])]
        return next(int(other) for other in node if self._exchangeable(np.array([other]), np.array([rank])))

    def _first_equal_node(self, node: int) -> int:
        return next(
            other
            for other in range(node + 1)
            if len(self.ranks_of_node[other]) == len(self.ranks_of_node[node])
            and self._exchangeable(self.ranks_of_node[other], self.ranks_of_node[node])
        )

    def _exchangeable(self, ranks: np.ndarray, others: np.ndarray) -> bool:
        cluster, order = self.cluster, np.arange(self.cluster.num_ranks)
        order[ranks], order[others] = others, ranks
        distance_RR = cluster.distance_RR
        return (
            np.array_equal(cluster.slots_of_rank[ranks], cluster.slots_of_rank[others])
            and np.allclose(cluster.speed_of_rank[ranks], cluster.speed_of_rank[others])
            and (distance_RR is None or np.allclose(distance_RR, distance_RR[np.ix_(order, order)], atol=0))
        )
