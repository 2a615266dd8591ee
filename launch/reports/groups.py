"""Groups: the columns of a chart. Every rank while there is room, then every node, then blocks of neighbouring ranks.

Shape letters: L MoE layers, R ranks, G groups, B layer boundaries.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from moeplace.placement.placement import Placement


@dataclass(frozen=True, eq=False)
class Groups:
    """Which column each rank is in.

    Attributes:
        word: what a column is: "rank", "node" or "block".
        labels: (G,) short names.
        names: (G,) names in words, for hovering.
        group_R: (R,) column of each rank, rising.
    """

    word: str
    labels: tuple[str, ...]
    names: tuple[str, ...]
    group_R: np.ndarray

    @classmethod
    def of(cls, placement: Placement, *, most: int) -> Self:
        """The finest grouping of at most `most` columns."""
        ranks, nodes = placement.num_ranks, placement.num_nodes
        if ranks <= most:
            return cls("rank", *_named("rank", "r", ranks), np.arange(ranks))
        if 1 < nodes <= most:
            return cls("node", *_named("node", "n", nodes), placement.node_of_rank)
        group_R = np.arange(ranks) * most // ranks
        first = [int(np.flatnonzero(group_R == group)[0]) for group in range(most)]
        last = [*(number - 1 for number in first[1:]), ranks - 1]
        labels = tuple(f"r{number}" for number in first)
        return cls("block", labels, tuple(f"ranks {a} to {b}" for a, b in zip(first, last, strict=True)), group_R)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size_G(self) -> np.ndarray:
        """(G,) ranks of each column."""
        return np.bincount(self.group_R, minlength=len(self))

    def busiest(self, load_LR: np.ndarray) -> np.ndarray:
        """(L, G) the greatest value of each column."""
        return np.maximum.reduceat(load_LR, np.flatnonzero(np.diff(self.group_R, prepend=-1)), axis=1)

    def joined(self, travel_BRR: np.ndarray) -> np.ndarray:
        """(B, G, G) sums from column to column."""
        starts = np.flatnonzero(np.diff(self.group_R, prepend=-1))
        return np.add.reduceat(np.add.reduceat(travel_BRR, starts, axis=1), starts, axis=2)


def _named(word: str, letter: str, count: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(f"{letter}{i}" for i in range(count)), tuple(f"{word} {i}" for i in range(count))
