"""One bound to be improved while time lasts: of a layer (d or dn) or of a window of layers (stayed tokens).

Shape letters: L MoE layers, E experts, K top-k, R ranks, N nodes, C capacity of a part.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from moeplace.placement.bounds.certificate import Proof, proof_of
from moeplace.placement.bounds.dual import solve_dual
from moeplace.placement.bounds.ksets import LARGEST_SET
from moeplace.placement.bounds.relaxation import (
    STEP,
    Layout,
    connectivity_slope,
    kset_slope,
    linear_slope,
    load_spread,
)
from moeplace.placement.bounds.replicated import Copies
from moeplace.placement.bounds.traffic import ksets_of, ranks_per_token, stay_by_load, stay_by_rows, stay_by_spectrum
from moeplace.placement.cluster import Cluster
from moeplace.placement.problem import Problem
from moeplace.profiling.traces.trace import RoutingTrace

TOLERANCE = 1e-9
"""Taken off every bound that comes from floating-point eigenvalues."""
_SET_STEP, _COPIES_STEP = 12.0, 8.0
"""rho over the root mean square of the first slope where minorants are those of subsets, and with redundant slots."""


@dataclass(frozen=True)
class Parts:
    """Ranks or nodes as the parts of a partition."""

    count: int
    capacity: int
    even: bool
    fastest: float  # largest speed share of a part over the mean share
    nodes: bool


def partitions(cluster: Cluster) -> list[Parts]:
    """The ranks, and the nodes where there are several of several ranks."""
    slots_R, speed_R = cluster.slots_of_rank, cluster.speed_of_rank
    found = [_part(slots_R, speed_R, nodes=False)]
    if cluster.num_nodes > 1:
        slots_N = np.bincount(cluster.node_of_rank, slots_R).astype(np.int64)
        found.append(_part(slots_N, np.bincount(cluster.node_of_rank, speed_R), nodes=True))
    return found[::-1]  # nodes first: where time is short, they weigh more


def _part(slots_P: np.ndarray, speed_P: np.ndarray, *, nodes: bool) -> Parts:
    return Parts(len(slots_P), int(slots_P.max()), np.ptp(slots_P) == 0, float(speed_P.max() / speed_P.mean()), nodes)


class Job(ABC):
    """One layer or a window of layers under one kind of parts; writes the better bound into `target`."""

    def __init__(
        self, problem: Problem, parts: Parts, held_L: np.ndarray | None, first: int, target: np.ndarray, layers: int
    ) -> None:
        self._problem, self._parts, self._first, self._target, self._layers = problem, parts, first, target, layers
        span = slice(first, first + layers)
        self._experts_w = problem.experts_per_layer[span]
        self._spare = int(problem.redundant_slots[span].sum())
        self._exact = parts.even and not self._spare
        caps = None if held_L is None or self._spare else held_L[span] * parts.fastest
        self._kappa = None if caps is None else np.minimum(caps, parts.count)
        self.proof: Proof | None = None

    @property
    def seconds_per_iteration(self) -> float:
        return 3e-4 + 2e-9 * float(self._experts_w.sum()) ** 3

    @property
    def relaxable(self) -> bool:
        """Whether the relaxation can say more than the closed forms."""
        return 1 < self._parts.capacity < self._experts_w.min() and np.ptp(self._experts_w) == 0

    @abstractmethod
    def close(self, *, spectral: bool) -> None:
        """Apply the closed forms, those that need eigenvalues only if `spectral`."""

    @abstractmethod
    def relax(self, iterations: int, deadline: float) -> None:
        """Apply the relaxation."""

    def _layout(self) -> Layout:
        w, e, parts = self._layers, int(self._experts_w[0]), self._parts
        loads = []
        scale = max(float(self._problem.load_LE[self._first].sum()), 1.0)
        for index, kappa in enumerate([] if self._kappa is None else self._kappa):
            load_E = self._problem.load_LE[self._first + index, :e] / scale
            p = np.zeros(w * e)
            p[index * e : (index + 1) * e] = load_E - load_E.mean() if self._exact else load_E
            if (np.abs(p) > TOLERANCE).any():
                loads.append((p, load_spread(float(kappa), parts.count, float(load_E.sum()), exact=self._exact)))
        return Layout(w, e, parts.count, parts.capacity, self._exact, loads, self._spare)


class Connectivity(Job):
    """d (or dn) of a layer."""

    def __init__(
        self,
        problem: Problem,
        parts: Parts,
        held_L: np.ndarray | None,
        layer: int,
        target: np.ndarray,
        trace: RoutingTrace,
    ) -> None:
        super().__init__(problem, parts, held_L, layer, target, 1)
        self._trace = trace

    @property
    def seconds_per_iteration(self) -> float:
        tokens, top_k = self._trace.num_tokens, self._trace.top_k
        slope = 3e-9 * tokens * 2**top_k if self._by_subsets else 3e-9 * tokens * top_k**2
        return super().seconds_per_iteration * (2 if self._spare else 1) + slope

    @property
    def _by_subsets(self) -> bool:
        return self._trace.top_k <= LARGEST_SET

    def close(self, *, spectral: bool) -> None:
        self._improve(
            ranks_per_token(
                self._trace.layer(self._first),
                int(self._experts_w[0]),
                self._parts.count,
                self._parts.capacity,
                spare=self._spare,
                exact=self._exact and spectral,
                kappa=float(self._kappa[0]) if spectral and self._kappa is not None else None,
            )
        )

    def relax(self, iterations: int, deadline: float) -> None:
        sets_UK, share_U = ksets_of(self._trace.layer(self._first))
        experts, parts, sets = int(self._experts_w[0]), self._parts, self._by_subsets
        slope = (kset_slope if sets else connectivity_slope)(sets_UK, share_U, experts, parts.capacity)
        layout: Layout | Copies = self._layout()
        if self._spare:
            layout = Copies(experts, parts.count, parts.capacity, experts + self._spare, parts.even)
        dual = solve_dual(
            layout,
            slope,
            iterations=iterations,
            deadline=deadline,
            step=(_COPIES_STEP if self._spare else _SET_STEP) if sets else STEP,
        )
        if self._improve(dual.bound):
            pieces = "subsets" if sets else "inverse"
            self.proof = proof_of(dual, "connectivity", nodes=parts.nodes, first=self._first, layers=1, pieces=pieces)

    def _improve(self, bound: float) -> bool:
        better = bound - TOLERANCE > self._target[self._first]
        if better:
            self._target[self._first] = bound - TOLERANCE
        return bool(better)


class Window(Job):
    """Stayed tokens of the boundaries between consecutive layers, as a share of all tokens."""

    def close(self, *, spectral: bool) -> None:
        weight_EE, parts = self._weight(self._first), self._parts
        bounds = [stay_by_rows(weight_EE, parts.capacity, self._spare)]
        if spectral and self._exact and np.ptp(self._experts_w) == 0:
            bounds.append(stay_by_spectrum(weight_EE, parts.count, parts.capacity))
        if spectral and self._kappa is not None and self._all_counted():
            bounds.append(stay_by_load(weight_EE, parts.count, float(self._kappa.max())))
        self._improve(min(bounds))

    def relax(self, iterations: int, deadline: float) -> None:
        slope = linear_slope([self._weight(self._first + index) for index in range(self._layers - 1)])
        dual = solve_dual(self._layout(), slope, iterations=iterations, curved=False, deadline=deadline)
        if self._improve(-dual.bound):
            self.proof = proof_of(dual, "stay", nodes=self._parts.nodes, first=self._first, layers=self._layers)

    def _improve(self, bound: float) -> bool:
        span = slice(self._first, self._first + self._layers - 1)
        total = float(self._target[span].sum())
        better = bound + TOLERANCE < total
        if better:
            self._target[span] *= max(bound + TOLERANCE, 0.0) / total
        return better

    def _weight(self, layer: int) -> np.ndarray:
        """(E, E) share of all tokens that go from expert to expert."""
        before, after = self._problem.experts_per_layer[layer : layer + 2]
        tokens = self._problem.trace.num_tokens if self._problem.trace else 1
        return self._problem.transitions_LEE[layer][:before, :after] / max(tokens, 1)

    def _all_counted(self) -> bool:
        """Whether the boundary's row and column sums are the layers' loads, which the cap is on."""
        total = int(self._problem.transitions_LEE[self._first].sum())
        return all(int(self._problem.load_LE[self._first + side].sum()) == total for side in (0, 1))
