"""Predicted seconds of a round of copies, from the links of a cluster.

Shape letters: U members (ranks of before and after together).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeplace.placement.cluster import INTER_NODE, INTRA_NODE, Link
from moeplace.placement.migration.copies import CHECKPOINT, Copy
from moeplace.profiling.errors import InputError

CHECKPOINT_BANDWIDTH = 2e9
"""Bytes per second at which one rank reads experts from the checkpoint, unless said otherwise: one NVMe drive."""


@dataclass(frozen=True, eq=False)
class CopyCost:
    """What a round costs: its slowest member, directions in parallel, plus one latency of the farthest tier.

    Attributes:
        node_of_member: (U,) int64.
        intra, inter: links inside a node and between nodes.
        checkpoint_bandwidth: bytes per second and rank from disk.
    """

    node_of_member: np.ndarray
    intra: Link = INTRA_NODE
    inter: Link = INTER_NODE
    checkpoint_bandwidth: float = CHECKPOINT_BANDWIDTH

    def __post_init__(self) -> None:
        if not self.checkpoint_bandwidth > 0:
            raise InputError(f"checkpoint bandwidth ({self.checkpoint_bandwidth} B/s) must be positive")

    def crosses(self, copy: Copy) -> bool:
        """Whether the copy goes from one node to another."""
        return copy.is_remote and bool(self.node_of_member[copy.sender] != self.node_of_member[copy.receiver])

    def round_seconds(self, copies: Sequence[Copy]) -> float:
        """Seconds of copies that run at the same time; those inside a rank are not counted."""
        read: dict[int, int] = {}
        leaving: dict[int, int] = {}
        entering: dict[int, int] = {}
        slowest, latency = 0.0, 0.0
        for copy in copies:
            if copy.sender == CHECKPOINT:
                read[copy.receiver] = read.get(copy.receiver, 0) + copy.size
            elif copy.is_remote:
                link = self.inter if self.crosses(copy) else self.intra
                slowest, latency = max(slowest, copy.size / link.bandwidth), max(latency, link.latency)
                if self.crosses(copy):
                    for total, member in ((leaving, copy.sender), (entering, copy.receiver)):
                        node = int(self.node_of_member[member])
                        total[node] = total.get(node, 0) + copy.size
        shared = max([*leaving.values(), *entering.values()], default=0) / self.inter.node_bandwidth
        return latency + max(slowest, shared, max(read.values(), default=0) / self.checkpoint_bandwidth)
