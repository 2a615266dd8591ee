"""TierTerms: what every walk of a placement with tiers is priced under, whatever policies and budgets are compared."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.evaluation import Terms, count
from moeplace.placement.cost.replay import Replay
from moeplace.placement.cost.replica_rule import MOEPLACE, ReplicaRule
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.memory import Memory
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class TierTerms:
    """What `evaluate` takes beside trace and placement, on a cluster with memory tiers.

    Attributes:
        cluster: with memory tiers; speeds and links as `evaluate` takes them.
        shape: sizes of a step.
        mode, calibration, rule: as `evaluate` takes them.
        bytes_LE: (L, E) of each expert as it is kept and loaded; None = all as many as the trace says.

    Raises:
        InputError: the cluster has no memory tiers.
    """

    cluster: Cluster
    shape: StepShape
    mode: Mode | None = None
    calibration: Calibration | None = None
    rule: ReplicaRule = MOEPLACE
    bytes_LE: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.cluster.memory is None:
            raise InputError("the cluster has no memory tiers: its file needs the tables [fast] and [host]")

    @property
    def memory(self) -> Memory:
        """The cluster's."""
        assert self.cluster.memory is not None
        return self.cluster.memory

    @property
    def expert(self) -> ExpertTime:
        """What computing an expert takes, measured or nominal."""
        return (self.calibration or Calibration(self.cluster.intra, self.cluster.inter)).expert

    def with_memory(self, memory: Memory) -> Self:
        """The same with other tiers."""
        return replace(self, cluster=self.cluster.replace(memory=memory))

    def count(self, trace: RoutingTrace, placement: Placement) -> tuple[Replay, Terms]:
        """The counts of `evaluate`, and what they are priced with; raises as it does."""
        return count(
            trace, placement, mode=self.mode, cluster=self.cluster, shape=self.shape, calibration=self.calibration,
            rule=self.rule,
        )  # fmt: skip
