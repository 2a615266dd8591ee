"""Balance when only loads are known: packing, then annealing of every layer above its bound while there is time.

The work follows from the time limit and the problem's size, not from the clock, so that a seed decides the placement.

Shape letters: L MoE layers, E experts of a layer, R ranks, S slots per layer.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moeplace.placement.bounds.load import least_imbalance
from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.search.annealing import seed_state
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.solvers.replicas.even_split import anneal_even
from moeplace.placement.solvers.replicas.exact_search import Schedule
from moeplace.placement.solvers.replicas.seats import seat
from moeplace.profiling.parallel import workers

FILL = 0.5
"""Share of the time limit that the planned work should take."""
MOVE_SECONDS = 150e-9
"""Time to try a move, and RANK_SECONDS more for each rank (measured: 8 to 32 ranks, one core of 2024)."""
RANK_SECONDS = 4e-9
ROUNDS = 4
"""Annealing runs of a layer, each from the best so far; a layer at its bound leaves its time to the others."""
NEAR = 2e-4
"""A layer this near to its bound is done."""
HOT, END = 0.1, 2e-4
"""Temperatures, in imbalance, of the first run; later ones begin cooler."""


def solve_balance(problem: Problem, budget: Budget) -> Draft:
    """The best balance found for each layer; never worse than packing. Needs no trace and no previous placement."""
    layers = range(problem.num_layers)
    rows = [pack_slots(problem, layer).astype(np.int32) for layer in layers]
    bounds = [least_imbalance(problem, layer) for layer in layers]
    if problem.survive and problem.cluster.num_nodes > 1:
        return Draft(np.stack(rows))  # moves would not keep replicas on several nodes
    values = [imbalance_of(problem, layer, row) for layer, row in enumerate(rows)]
    tries = FILL * budget.time_limit * workers() / (MOVE_SECONDS + RANK_SECONDS * problem.num_ranks)
    with budget.alarm(budget.remaining) as stop, ThreadPoolExecutor(workers()) as pool:
        for number in range(ROUNDS):
            left = [layer for layer in layers if values[layer] > bounds[layer] * (1 + NEAR)]
            if not left or stop[0]:
                break
            work = tries / ROUNDS / len(left)
            jobs = [(layer, rows[layer], bounds[layer], number, work) for layer in left]
            found = pool.map(lambda job: _run(problem, budget, stop, *job), jobs)
            for layer, (value, row) in zip(left, found, strict=True):
                if value < values[layer] - 1e-12:
                    values[layer], rows[layer] = value, row
            budget.report((number + 1) / ROUNDS)
    return Draft(np.stack(rows), "time_limit" if stop[0] else "feasible")


def imbalance_of(problem: Problem, layer: int, row_S: np.ndarray) -> float:
    """Busiest rank over mean of one layer, loads split evenly over replicas; 1 without load."""
    cluster, load_E = problem.cluster, problem.load_LE[layer]
    held = row_S >= 0
    count_E = np.maximum(np.bincount(row_S[held], minlength=len(load_E)), 1)
    load_R = np.bincount(cluster.rank_of_slot[held], (load_E / count_E)[row_S[held]], minlength=cluster.num_ranks)
    total = load_R.sum()
    return float((load_R / cluster.speed_of_rank).max() * cluster.speed_of_rank.sum() / total) if total else 1.0


def _run(
    problem: Problem, budget: Budget, stop: np.ndarray, layer: int, row_S: np.ndarray, bound: float, number: int,
    work: float,
) -> tuple[float, np.ndarray]:  # fmt: skip
    """One annealing run of one layer: (imbalance, slots)."""
    cluster, moved_S = problem.cluster, row_S.copy()
    entries = max(problem.num_experts, cluster.num_slots)
    load_E = np.zeros(entries)
    load_E[: problem.num_experts] = problem.load_LE[layer]
    seats = seat(moved_S, cluster.first_slots, entries, int(problem.experts_per_layer[layer]))
    schedule = Schedule(HOT / 3.0**number, END / 3.0**number, float(work), problem.survive + 1, 1)
    value = anneal_even(
        load_E, seats, 1.0 / cluster.speed_of_rank, float(bound), schedule, stop, seed_state(budget.rng(layer, number))
    )
    return float(value), moved_S
