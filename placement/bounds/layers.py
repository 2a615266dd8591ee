"""Bounds by layer on what traffic is made of: closed forms everywhere, the relaxation while time lasts.

Shape letters: L MoE layers, R ranks, N nodes.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from moeplace.placement.bounds.blas_threads import one_blas_thread
from moeplace.placement.bounds.certificate import Proof
from moeplace.placement.bounds.jobs import Connectivity, Job, Window, partitions
from moeplace.placement.problem import Problem
from moeplace.profiling.traces.trace import RoutingTrace

FEWEST_ITERATIONS, ENOUGH_ITERATIONS, MOST_ITERATIONS = 40, 100, 300
"""Of the relaxation: below 40 it seldom beats the closed forms, a wider window is worth it from 100 on."""
DOUBT = 4.0
"""How many times as slow as planned a machine may turn out to be."""
WIDTHS = (5, 4, 3)
"""Layers side by side in one relaxation of the chain, if the time allows."""
THREADS = min(os.cpu_count() or 1, 4)


@dataclass(frozen=True, eq=False)
class LayerBounds:
    """Bounds by layer or boundary, means over all tokens.

    Attributes:
        d_L, dn_L: (L,) least ranks and nodes per token.
        stay_L, node_stay_L: (L-1,) most tokens whose primary expert stays, as a share of all tokens. Only their sum
        over
            boundaries is proven: several are bounded together, and share what is gained.
        proofs: what the relaxation rests on, see `certificate`.
    """

    d_L: np.ndarray
    dn_L: np.ndarray
    stay_L: np.ndarray
    node_stay_L: np.ndarray
    proofs: list[Proof] = field(default_factory=list)


def layer_bounds(problem: Problem, trace: RoutingTrace, *, time_limit: float, caps_L: np.ndarray | None) -> LayerBounds:
    """Bounds on what traffic is made of, by layer; those that the mode does not pay for are the trivial ones."""
    deadline = time.monotonic() + time_limit
    layers, tokens = problem.num_layers, max(trace.num_tokens, 1)
    used_L = (np.stack([trace.layer(layer) for layer in range(layers)]) >= 0).any(axis=2).sum(axis=1) / tokens
    bounds = LayerBounds(
        used_L.copy(), used_L.copy(), *np.tile(problem.transitions_LEE.sum(axis=(1, 2)) / tokens, (2, 1))
    )
    if problem.mode == "allgather" or problem.num_ranks == 1:
        return bounds
    chained = problem.mode == "coherent" and problem.top_k == 1
    kinds = partitions(problem.cluster)

    def windows(width: int) -> list[Job]:
        found: list[Job] = []
        for parts in kinds:
            target = bounds.node_stay_L if parts.nodes else bounds.stay_L
            for first in range(0, layers - 1, width - 1):
                found.append(Window(problem, parts, caps_L, first, target, min(width, layers - first)))
        return found

    def singles() -> list[Job]:
        return [
            Connectivity(problem, parts, caps_L, layer, bounds.dn_L if parts.nodes else bounds.d_L, trace)
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
    bounds.proofs.extend(job.proof for job in jobs if job.proof is not None)
    return bounds


def _widest_affordable(windows: Callable[[int], list[Job]], deadline: float) -> list[Job]:
    """The widest windows for which the time allows enough iterations: wider ones see that boundaries share a layer."""
    for width in WIDTHS:
        jobs = windows(width)
        if all(job.relaxable for job in jobs) and _affordable(jobs, deadline) >= ENOUGH_ITERATIONS:
            return jobs
    return windows(2)


def _affordable(jobs: list[Job], deadline: float) -> float:
    """Iterations for each job until the deadline, all threads together."""
    each = sum(job.seconds_per_iteration for job in jobs)
    return THREADS * max(deadline - time.monotonic(), 0.0) / max(each, 1e-12)


def _relax(jobs: list[Job], deadline: float) -> None:
    """As many iterations for each job as the time allows; where it allows too few, only the first jobs get theirs."""
    jobs = [job for job in jobs if job.relaxable]
    affordable = _affordable(jobs, deadline)
    iterations = int(np.clip(affordable, FEWEST_ITERATIONS, MOST_ITERATIONS))
    shares = _Shares(jobs[: int(len(jobs) * min(affordable / iterations, 1.0))], deadline)

    def relax(job: Job) -> None:
        if time.monotonic() < deadline:
            shares.relax(job)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(relax, shares.jobs))


class _Shares:
    """Iterations of each job by what the jobs before took: on a busy machine all have fewer, instead of some none."""

    def __init__(self, jobs: list[Job], deadline: float) -> None:
        self.jobs, self._deadline = jobs, deadline
        self._waiting = sum(job.seconds_per_iteration for job in jobs)
        self._planned = self._spent = 0.0
        self._lock = threading.Lock()

    def relax(self, job: Job) -> None:
        started, own = time.monotonic(), job.seconds_per_iteration
        with self._lock:
            slowness = self._spent / self._planned if self._planned else 1.0
            left = THREADS * max(self._deadline - started, 0.0) / max(slowness, 1e-12)
            wanted = left / self._waiting
            # Until it is known how fast they are, none takes what others may need.
            is_sure = self._planned or len(self.jobs) <= THREADS or wanted >= DOUBT * MOST_ITERATIONS
            most = MOST_ITERATIONS if is_sure else ENOUGH_ITERATIONS
            iterations = int(np.clip(wanted, FEWEST_ITERATIONS, most))
            self._waiting -= own
        job.relax(iterations, self._deadline)
        with self._lock:
            self._planned += iterations * own
            self._spent += time.monotonic() - started
