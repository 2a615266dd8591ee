"""Proven lower bounds on what any placement of a problem can cost, printed with every result.

Each bound holds for the tokens (or loads) of the problem and for all placements that respect its slots and its load
cap; limits on moves, which only forbid more, are ignored. A held-out figure may cross a bound, it is another trace.

* imbalance: mean over layers of `least_imbalance` (closed forms of `load_bounds`).
* traffic: d and dn per layer, stayed tokens per boundary: the better of the closed forms of `traffic_bounds` and,
  while the time lasts, the semidefinite relaxation of `relaxation`.
* seconds: every term of the cost model at its own bound. The busiest rank moves at least the mean, and computes at
  least the mean or what the load bounds say of "seconds per expert".

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, N nodes, C capacity of a part.
"""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from moeplace.placement.bounds.blas_threads import one_blas_thread
from moeplace.placement.bounds.load import least_imbalance
from moeplace.placement.bounds.relaxation import Layout, connectivity_slope, linear_slope, load_spread, lower_bound
from moeplace.placement.bounds.traffic import ksets_of, ranks_per_token, stay_by_load, stay_by_rows, stay_by_spectrum
from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.evaluation import step_of_token
from moeplace.placement.cost.seconds import collective_latency, transfer_seconds
from moeplace.placement.problem import Problem
from moeplace.placement.search.packing import packed_imbalance
from moeplace.profiling.traces.trace import RoutingTrace

FEWEST_ITERATIONS, ENOUGH_ITERATIONS, MOST_ITERATIONS = 40, 100, 300
WIDTHS = (5, 4, 3)
"""Layers side by side in one relaxation of the chain, if the time allows."""
THREADS = min(os.cpu_count() or 1, 4)
TOLERANCE = 1e-9
"""Taken off every bound that comes from floating-point eigenvalues."""


@dataclass(frozen=True, eq=False)
class LayerBounds:
    """Bounds by layer or boundary, means over all tokens.

    Attributes:
        d_L, dn_L: (L,) least ranks and nodes per token.
        stay_L, node_stay_L: (L-1,) most tokens whose primary expert stays, as a share of all tokens. Only their sum
        over
            boundaries is proven: several are bounded together, and share what is gained.
    """

    d_L: np.ndarray
    dn_L: np.ndarray
    stay_L: np.ndarray
    node_stay_L: np.ndarray


def problem_bounds(problem: Problem, *, time_limit: float, caps_L: np.ndarray | None = None) -> dict[str, float]:
    """Lower bounds on "imbalance" and, where tokens are known, on "traffic" and "seconds".

    Traffic is mean d + node_weight * mean dn in `dispatch-combine`; copies per token, plus node_weight times those
    between nodes, in `coherent` mode (for K = 1: 1 - stay rate, likewise for nodes); 0 in `allgather`.

    Args:
        problem: the problem.
        time_limit: seconds; the amount of work follows from it, the clock only cuts in.
        caps_L: (L,) imbalance that each layer is held to, at least as large as what any accepted placement has; by
            default the larger of `max_imbalance` and what packing reaches.
    """
    layers = range(problem.num_layers)
    bounds = {"imbalance": float(np.mean([least_imbalance(problem, layer) for layer in layers]))}
    trace = problem.trace
    if trace is None:
        return bounds
    by_layer = layer_bounds(problem, trace, time_limit=time_limit, caps_L=caps_L)
    bounds["traffic"] = _traffic(problem, trace, by_layer)
    bounds["seconds"] = _seconds(problem, trace, by_layer)
    return bounds


def held_imbalance(problem: Problem) -> np.ndarray | None:
    """(L,) imbalance each layer is held to: the larger of the cap and what packing reaches; None without a cap."""
    if problem.max_imbalance is None:
        return None
    return np.array([max(problem.max_imbalance, packed_imbalance(problem, x)) for x in range(problem.num_layers)])


def layer_bounds(
    problem: Problem, trace: RoutingTrace, *, time_limit: float, caps_L: np.ndarray | None = None
) -> LayerBounds:
    """Bounds on what traffic is made of, by layer; those that the mode does not pay for are the trivial ones."""
    deadline = time.monotonic() + time_limit
    layers, tokens = problem.num_layers, max(trace.num_tokens, 1)
    held_L = held_imbalance(problem) if caps_L is None else caps_L
    used_L = (np.stack([trace.layer(layer) for layer in range(layers)]) >= 0).any(axis=2).sum(axis=1) / tokens
    bounds = LayerBounds(
        used_L.copy(), used_L.copy(), *np.tile(problem.transitions_LEE.sum(axis=(1, 2)) / tokens, (2, 1))
    )
    if problem.mode == "allgather" or problem.num_ranks == 1:
        return bounds
    chained = problem.mode == "coherent" and problem.top_k == 1
    kinds = _partitions(problem.cluster)

    def windows(width: int) -> list[_Job]:
        found: list[_Job] = []
        for parts in kinds:
            target = bounds.node_stay_L if parts.nodes else bounds.stay_L
            for first in range(0, layers - 1, width - 1):
                found.append(_Window(problem, parts, held_L, first, target, min(width, layers - first)))
        return found

    def singles() -> list[_Job]:
        return [
            _Connectivity(problem, parts, held_L, layer, bounds.dn_L if parts.nodes else bounds.d_L, trace)
            for parts in kinds
            for layer in range(layers)
        ]

    jobs = windows(2) if chained else singles()
    with one_blas_thread():
        for job in jobs:
            job.close(spectral=time.monotonic() < deadline)
        if chained:
            jobs = _widest_affordable(windows, deadline)
        _relax(jobs, deadline)
    return bounds


@dataclass(frozen=True)
class _Parts:
    """Ranks or nodes as the parts of a partition."""

    count: int
    capacity: int
    even: bool
    fastest: float  # largest speed share of a part over the mean share
    nodes: bool


def _partitions(cluster: Cluster) -> list[_Parts]:
    """The ranks, and the nodes where there are several of several ranks."""
    slots_R, speed_R = cluster.slots_of_rank, cluster.speed_of_rank
    found = [_part(slots_R, speed_R, nodes=False)]
    if cluster.num_nodes > 1:
        slots_N = np.bincount(cluster.node_of_rank, slots_R).astype(np.int64)
        found.append(_part(slots_N, np.bincount(cluster.node_of_rank, speed_R), nodes=True))
    return found[::-1]  # nodes first: where time is short, they weigh more


def _part(slots_P: np.ndarray, speed_P: np.ndarray, *, nodes: bool) -> _Parts:
    return _Parts(len(slots_P), int(slots_P.max()), np.ptp(slots_P) == 0, float(speed_P.max() / speed_P.mean()), nodes)


class _Job(ABC):
    """One layer or a window of layers under one kind of parts; writes the better bound into `target`."""

    def __init__(
        self, problem: Problem, parts: _Parts, held_L: np.ndarray | None, first: int, target: np.ndarray, layers: int
    ) -> None:
        self._problem, self._parts, self._first, self._target, self._layers = problem, parts, first, target, layers
        span = slice(first, first + layers)
        self._experts_w = problem.experts_per_layer[span]
        self._spare = int(problem.redundant_slots[span].sum())
        self._exact = parts.even and not self._spare
        caps = None if held_L is None or self._spare else held_L[span] * parts.fastest
        self._kappa = None if caps is None else np.minimum(caps, parts.count)

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


class _Connectivity(_Job):
    """d (or dn) of a layer."""

    def __init__(
        self,
        problem: Problem,
        parts: _Parts,
        held_L: np.ndarray | None,
        layer: int,
        target: np.ndarray,
        trace: RoutingTrace,
    ) -> None:
        super().__init__(problem, parts, held_L, layer, target, 1)
        self._trace = trace

    @property
    def seconds_per_iteration(self) -> float:
        return super().seconds_per_iteration + 3e-9 * self._trace.num_tokens * self._trace.top_k**2

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
        slope = connectivity_slope(sets_UK, share_U, int(self._experts_w[0]), self._parts.capacity)
        self._improve(lower_bound(self._layout(), slope, iterations=iterations, deadline=deadline))

    def _improve(self, bound: float) -> None:
        self._target[self._first] = max(self._target[self._first], bound - TOLERANCE)


class _Window(_Job):
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
        self._improve(-lower_bound(self._layout(), slope, iterations=iterations, smooth=0.0, deadline=deadline))

    def _improve(self, bound: float) -> None:
        span = slice(self._first, self._first + self._layers - 1)
        total = float(self._target[span].sum())
        if bound + TOLERANCE < total:
            self._target[span] *= max(bound + TOLERANCE, 0.0) / total

    def _weight(self, layer: int) -> np.ndarray:
        """(E, E) share of all tokens that go from expert to expert."""
        before, after = self._problem.experts_per_layer[layer : layer + 2]
        tokens = self._problem.trace.num_tokens if self._problem.trace else 1
        return self._problem.transitions_LEE[layer][:before, :after] / max(tokens, 1)

    def _all_counted(self) -> bool:
        """Whether the boundary's row and column sums are the layers' loads, which the cap is on."""
        total = int(self._problem.transitions_LEE[self._first].sum())
        return all(int(self._problem.load_LE[self._first + side].sum()) == total for side in (0, 1))


def _widest_affordable(windows: Callable[[int], list[_Job]], deadline: float) -> list[_Job]:
    """The widest windows for which the time allows enough iterations: wider ones see that boundaries share a layer."""
    for width in WIDTHS:
        jobs = windows(width)
        if all(job.relaxable for job in jobs) and _affordable(jobs, deadline) >= ENOUGH_ITERATIONS:
            return jobs
    return windows(2)


def _affordable(jobs: list[_Job], deadline: float) -> float:
    """Iterations for each job until the deadline, all threads together."""
    each = sum(job.seconds_per_iteration for job in jobs)
    return THREADS * max(deadline - time.monotonic(), 0.0) / max(each, 1e-12)


def _relax(jobs: list[_Job], deadline: float) -> None:
    """As many iterations for each job as the time allows; where it allows too few, only the first jobs get theirs."""
    jobs = [job for job in jobs if job.relaxable]
    affordable = _affordable(jobs, deadline)
    iterations = int(np.clip(affordable, FEWEST_ITERATIONS, MOST_ITERATIONS))
    jobs = jobs[: int(len(jobs) * min(affordable / iterations, 1.0))]

    def relax(job: _Job) -> None:
        if time.monotonic() < deadline:
            job.relax(iterations, deadline)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(relax, jobs))


def _traffic(problem: Problem, trace: RoutingTrace, bounds: LayerBounds) -> float:
    """The traffic objective at the bounds of its parts (see `problem_bounds`)."""
    if problem.mode == "allgather":
        return 0.0
    if problem.mode == "dispatch-combine":
        return float(bounds.d_L.mean() + problem.node_weight * bounds.dn_L.mean())
    first_L, second_L = _coherent_copies(problem, trace, bounds.d_L, bounds.stay_L, problem.num_ranks)
    total = first_L.sum() + second_L[1:].sum()
    if problem.node_weight:
        first_L, second_L = _coherent_copies(problem, trace, bounds.dn_L, bounds.node_stay_L, problem.cluster.num_nodes)
        total += problem.node_weight * (first_L.sum() + second_L[1:].sum())
    return float(total) / max(problem.num_layers - 1, 1)


def _coherent_copies(
    problem: Problem, trace: RoutingTrace, d_L: np.ndarray, stay_L: np.ndarray, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Least copies per token of the first exchange (L-1,), and of the second (L,), in `coherent` mode, between parts.

    First: d - 1[owner in A] >= d - 1, and for K = 1 one copy per token that does not stay; a token that has no owner
    yet, for lack of experts so far, pays nothing. Second: d - 1. Without an expert in a layer a token pays nothing
    there. Between nodes the same holds with dn.
    """
    seen_T, used_L, fresh_L = np.zeros(trace.num_tokens, bool), [], []
    for layer in range(problem.num_layers):
        k_T = (trace.layer(layer) >= 0).sum(axis=1)
        used_L.append((k_T > 0).mean())
        fresh_L.append((np.clip(k_T, 1, parts) - 1)[~seen_T].sum() / trace.num_tokens)
        seen_T |= k_T > 0
    second_L = np.maximum(d_L - used_L, 0.0)
    if problem.top_k > 1:
        return np.maximum(second_L - fresh_L, 0.0)[1:], second_L
    pairs_L = problem.transitions_LEE.sum(axis=(1, 2)) / trace.num_tokens
    return np.maximum(pairs_L - stay_L, 0.0), second_L


def _seconds(problem: Problem, trace: RoutingTrace, bounds: LayerBounds) -> float:
    """Predicted seconds of a step (`cost_model`), every maximum over ranks replaced by a bound."""
    calibration, shape = problem.calibration, problem.shape
    cluster = calibration.apply(problem.cluster)
    latency = collective_latency(cluster)
    hidden = shape.batch * shape.hidden_size * shape.dtype_bytes
    layers, ranks = problem.num_layers, cluster.num_ranks
    seconds = layers * (calibration.layer_overhead(problem.mode) + latency)
    seconds += sum(_least_expert_seconds(problem, trace, layer) for layer in range(layers))
    if ranks == 1:
        return float(seconds)
    if problem.mode == "allgather":
        return float(
            seconds + layers * (latency + 2 * transfer_seconds(np.full((ranks,) * 2, 1 / ranks), cluster, hidden))
        )
    if problem.mode == "dispatch-combine":
        scattered = _least_scatter(float(bounds.d_L.sum()), float(bounds.dn_L.sum()), cluster)
        return float(seconds + layers * latency + 2 * hidden * scattered)
    first_L, second_L = _coherent_copies(problem, trace, bounds.d_L, bounds.stay_L, ranks)
    across = _coherent_copies(problem, trace, bounds.dn_L, bounds.node_stay_L, cluster.num_nodes)
    moved = _least_first_scatter(float(bounds.d_L[0]), cluster)
    moved += _least_move(float(first_L.sum()), float(across[0].sum()), cluster)
    moved += _least_move(float(second_L.sum()), float(across[1].sum()), cluster)
    return float(seconds + hidden * moved + latency + _least_kv(problem, trace, cluster))


def _least_scatter(d: float, dn: float, cluster: Cluster) -> float:
    """Seconds per byte of sending each token from a uniform home to its d ranks on dn nodes, at least.

    A token reaches another node once, at the rank whose place there is the home's place (gateway), and is forwarded
    inside. Rank r is the gateway of c_r homes, itself included, so it receives p_r (R - c_r) / R copies from inside and
    q_n (c_r - 1) / R from other nodes, sum p = d, sum q = dn; its node receives q_n (R - size) / R.
    """
    node_R, size_N, ranks = cluster.node_of_rank, cluster.ranks_per_node, cluster.num_ranks
    place_R = np.arange(ranks) - (np.cumsum(size_N) - size_N)[node_R]
    homes_R = np.array(
        [
            1 + (place_R[node_R != node] % size_N[node] == place).sum()
            for node, place in zip(node_R, place_R, strict=True)
        ]
    )
    seconds = d * _harmonic((ranks - homes_R) / ranks) / cluster.intra.bandwidth
    if cluster.num_nodes > 1:
        across_N = np.zeros(cluster.num_nodes)
        np.maximum.at(across_N, node_R, (homes_R - 1) / ranks)
        by_rank = _harmonic(across_N) / cluster.inter.bandwidth
        seconds += dn * max(by_rank, _harmonic((ranks - size_N) / ranks) / cluster.inter.node_bandwidth)
    return float(seconds)


def _least_first_scatter(d: float, cluster: Cluster) -> float:
    """The same for the first layer in `coherent` mode, where every copy is sent for itself.

    Rank r receives p_r (size of its node - 1) / R copies from inside and p_r (R - size) / R from other nodes.
    """
    node_R, size_N, ranks = cluster.node_of_rank, cluster.ranks_per_node, cluster.num_ranks
    inside_R, across_N = (size_N[node_R] - 1) / ranks, (ranks - size_N) / ranks
    seconds = d * _harmonic(inside_R) / cluster.intra.bandwidth
    if cluster.num_nodes > 1:
        by_rank = _harmonic(across_N[node_R]) / cluster.inter.bandwidth
        seconds += d * max(by_rank, _harmonic(across_N) / cluster.inter.node_bandwidth)
    return float(seconds)


def _harmonic(factors: np.ndarray) -> float:
    """Least possible max of p_i factor_i over p >= 0 that sum to 1: equal, at 1 / sum(1 / factor)."""
    return 0.0 if (factors == 0).any() else float(1 / (1 / factors).sum())


def _least_move(copies: float, across: float, cluster: Cluster) -> float:
    """Seconds per byte of one exchange with so many copies per token, `across` of them between nodes, at least."""
    inside = 1 / (cluster.num_ranks * cluster.intra.bandwidth)
    if cluster.num_nodes == 1:
        return copies * inside
    outside = _mean_outside(cluster)
    return across * outside + max(copies - across, 0.0) * min(inside, outside)


def _mean_outside(cluster: Cluster) -> float:
    """Seconds per byte between nodes if all ranks and nodes share it evenly."""
    by_rank = 1 / (cluster.num_ranks * cluster.inter.bandwidth)
    return max(by_rank, 1 / (cluster.num_nodes * cluster.inter.node_bandwidth))


def _least_kv(problem: Problem, trace: RoutingTrace, cluster: Cluster) -> float:
    """The K/V exchange of `coherent`: every owned token reaches all other ranks, once per node and forwarded inside."""
    shape, ranks, nodes = problem.shape, cluster.num_ranks, cluster.num_nodes
    owned, seen_T = 1.0, (trace.layer(0) >= 0).any(axis=1)
    for layer in range(1, problem.num_layers):
        owned += float(seen_T.mean())
        seen_T = seen_T | (trace.layer(layer) >= 0).any(axis=1)
    kv_bytes = shape.batch * shape.kv_dim * shape.dtype_bytes
    seconds = owned * (ranks - nodes) / (ranks * cluster.intra.bandwidth)
    if nodes > 1:
        seconds += owned * (nodes - 1) * _mean_outside(cluster)
    return seconds * kv_bytes


def _least_expert_seconds(problem: Problem, trace: RoutingTrace, layer: int) -> float:
    """Expert time of a layer, mean over steps of the slowest rank; the larger of two bounds.

    By step: all work of the step over all speeds; the heaviest single expert on the fastest rank, without replicas.
    By mean: the slowest rank of the mean step, from the load bounds of "seconds per expert".
    """
    expert, cluster = problem.calibration.expert, problem.cluster
    batch = problem.shape.batch
    step_T, ids_TK = step_of_token(trace.num_tokens, batch), trace.layer(layer)
    scale = batch / min(batch, trace.num_tokens)
    experts, steps = int(problem.experts_per_layer[layer]), int(step_T.max()) + 1
    counted = (ids_TK >= 0) & (step_T >= 0)[:, None]
    token, slot = np.nonzero(counted)
    cell = step_T[token] * experts + ids_TK[token, slot]
    tokens_SE = np.bincount(cell, minlength=steps * experts).reshape(steps, experts)
    work_SE = expert.per_token * scale * tokens_SE + expert.per_activated * (tokens_SE > 0)
    speed_R = cluster.speed_of_rank
    by_step_S = work_SE.sum(axis=1) / speed_R.sum()
    if not problem.redundant_slots[layer]:
        by_step_S = np.maximum(by_step_S, work_SE.max(axis=1) / speed_R.max())
    work_E = work_SE.mean(axis=0)
    by_mean = least_imbalance(problem, layer, work_E) * work_E.sum() / speed_R.sum()
    return float(expert.fixed + max(by_step_S.mean(), by_mean))
