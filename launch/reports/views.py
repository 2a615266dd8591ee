"""The numbers behind the charts: what a trace looks like under a placement, and how the placement came to be.

Shape letters: T tokens, L MoE layers, E experts per layer, R ranks, S slots per layer, B = L - 1 layer boundaries.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moeplace.placement.cost.evaluation import Evaluation, evaluate
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.placement.placement_file import PlacementFile
from moeplace.profiling.traces.stats import RoutingStats
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class PlacementView:
    """A placement seen through a trace.

    Attributes:
        name: what to call it.
        placement: the placement.
        stats: counts of the trace.
        evaluation: what the placement costs on it.
        solver: of the run that made it, as its file says; may be empty.
        evidence: what its file says of held-out tokens; may be empty.
    """

    name: str
    placement: Placement
    stats: RoutingStats
    evaluation: Evaluation
    solver: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layer_ids(self) -> np.ndarray:
        """(L,) what to call the layers."""
        ids = self.placement.layer_ids
        return np.arange(self.placement.num_layers) if ids is None else ids

    @cached_property
    def _share_LER(self) -> np.ndarray:
        """(L, E, R) share of each expert's tokens that each rank serves, split evenly over replicas."""
        copies = self.placement.copies_LER.astype(float)
        return copies / np.maximum(copies.sum(axis=2, keepdims=True), 1)

    @cached_property
    def slot_load_LS(self) -> np.ndarray:
        """(L, S) load of each slot over the layer's mean slot, split evenly over replicas; NaN = an empty slot."""
        experts_LS = self.placement.slot_to_expert
        layers = np.arange(len(experts_LS))[:, None]
        counts = np.maximum(self.placement.replica_counts, 1)
        load = (self.stats.load / counts)[layers, np.maximum(experts_LS, 0)]
        load = np.where(experts_LS == EMPTY_SLOT, np.nan, load)
        return load / np.maximum(np.nanmean(load, axis=1, keepdims=True), 1e-12)

    @cached_property
    def rank_load_LR(self) -> np.ndarray:
        """(L, R) load of each rank over the layer's mean rank, by the replica rule."""
        load = self.evaluation.load_LR.astype(float)
        return load / np.maximum(load.mean(axis=1, keepdims=True), 1e-12)

    @property
    def imbalance(self) -> float:
        """Mean over layers of the busiest rank over the mean rank."""
        return self.evaluation.imbalance_mean

    @property
    def predicted_seconds(self) -> float:
        """Of one step: as the placement's file says (its links and batch), else with nominal links."""
        return float(self.evidence.get("predicted_seconds", self.evaluation.predicted_seconds))

    @cached_property
    def travel_BRR(self) -> np.ndarray:
        """(B, R, R) share of the tokens that go from rank to rank at each boundary, by their primary experts."""
        share = self._share_LER
        count = np.einsum(
            "bef,ber,bfq->brq", self.stats.transitions.astype(float), share[:-1], share[1:], optimize=True
        )
        return count / np.maximum(count.sum(axis=(1, 2), keepdims=True), 1e-12)

    @cached_property
    def stay_B(self) -> np.ndarray:
        """(B,) share that stays on its rank."""
        return self.travel_BRR.trace(axis1=1, axis2=2)

    @property
    def stay_rate(self) -> float:
        """Share of layer boundaries at which a token stays."""
        return float(self.stay_B.mean()) if len(self.stay_B) else 1.0

    def order(self, layer: int) -> tuple[np.ndarray, list[int]]:
        """Experts of a layer by rank, and how many each rank has; of replicas the first counts."""
        rank_E = self.placement.rank_of_expert[layer][: self.placement.experts_per_layer[layer]]
        sizes = np.bincount(rank_E, minlength=self.placement.num_ranks)
        return np.argsort(rank_E, kind="stable"), sizes.tolist()

    def affinity(self, boundary: int) -> np.ndarray:
        """(E, E) P(expert of the next layer given that of this one), experts in the order of their ranks."""
        rows, columns = self.order(boundary)[0], self.order(boundary + 1)[0]
        counts = self.stats.transitions[boundary].astype(float)
        given = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1e-12)
        return given[rows][:, columns]


def make_views(trace: RoutingTrace, placements: Mapping[str, Placement | PlacementFile]) -> list[PlacementView]:
    """One view per placement.

    Raises:
        InputError: a placement is for another model.
    """
    stats = RoutingStats.from_trace(trace)
    views = []
    for name, given in placements.items():
        file = given if isinstance(given, PlacementFile) else PlacementFile(given)
        found = evaluate(trace, file.placement)
        views.append(PlacementView(name, file.placement, stats, found, file.solver, file.evidence))
    return views
