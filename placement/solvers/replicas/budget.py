"""Replicas where they pay: the redundant slots of the whole model shared out to layers (`replica_budget="global"`).

Every layer is searched with several numbers of slots per rank. With v[l, s] = the best objective found for layer l with
s slots per rank more or fewer than the cluster has,

    min sum_l v[l, s_l]   s.t.   sum_l s_l <= 0

is a knapsack over small integers, solved exactly by dynamic programming (a layer's benefit is a staircase: several
replicas may be needed before anything is saved). All ranks give and take alike, so that the memory of each rank stays
what it is. s = 0 everywhere is one of the choices, and a layer with more slots is never worse than with fewer.

Shape letters: L MoE layers, R ranks, S slots per layer.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, slot_starts
from moeplace.placement.problem import CAP_ROUNDING, Problem

Layers = Sequence[int]
Search = Callable[[Problem, Layers, float], list[tuple[float, np.ndarray]]]
"""(problem, layers, share of the time) -> (objective, (S,) slots) of each of these layers."""


def slot_steps(problem: Problem) -> range:
    """Slots per rank that a layer may have fewer (negative) or more than the cluster says."""
    growth = int(problem.layout.slots_of_rank[0] - problem.cluster.slots_of_rank[0])
    return range(-problem.spare_per_rank, growth + 1)


def with_steps(problem: Problem, step: int) -> Problem:
    """The problem with `step` slots per rank more, the same in every layer."""
    cluster = problem.cluster.replace(slots_of_rank=problem.cluster.slots_of_rank + step)
    return problem.replace(cluster=cluster, replica_budget="per-layer", previous=None, max_moves=None)


def share_out(value_LS: np.ndarray, steps: range) -> np.ndarray:
    """(L,) step of each layer that minimises the sum of values while the steps sum to at most 0.

    Args:
        value_LS: (L, len(steps)) value of each layer at each step.
        steps: consecutive integers from a negative (or 0) to a positive one.
    """
    layers, low = len(value_LS), steps[0]
    room = -low * layers  # steps counted from the lowest one: their sum may be at most this
    best = np.zeros(room + 1)
    chosen = np.zeros((layers, room + 1), np.int64)
    for layer in range(layers):
        options = np.full((len(steps), room + 1), np.inf)
        for used in range(min(len(steps), room + 1)):  # no layer can have more than all others give
            options[used, used:] = best[: room + 1 - used] + value_LS[layer, used]
        chosen[layer] = options.argmin(axis=0)
        best = options.min(axis=0)
    step_L = np.zeros(layers, np.int64)
    left = room
    for layer in range(layers - 1, -1, -1):
        step_L[layer] = chosen[layer, left]
        left -= step_L[layer]
    return step_L + low


def widen(problem: Problem, row_S: np.ndarray, step: int) -> np.ndarray:
    """(S,) slots of the layout for a row of `step` more slots per rank, the further slots empty."""
    wide_R, from_R = problem.layout.slots_of_rank, problem.cluster.slots_of_rank + step
    row = np.full(int(wide_R.sum()), EMPTY_SLOT, np.int32)
    for wide_start, start, count in zip(slot_starts(wide_R), slot_starts(from_R), from_R, strict=True):
        row[wide_start : wide_start + count] = row_S[start : start + count]
    return row


def narrow(problem: Problem, row_S: np.ndarray) -> tuple[int, np.ndarray]:
    """(step, (S,) slots) of a row of the layout: the fewest slots that hold it, the same on every rank. See `widen`."""
    parts = [row_S[start : start + count] for start, count in _spans(problem.layout.slots_of_rank)]
    held = [part[part != EMPTY_SLOT] for part in parts]
    step = max(len(part) - int(count) for part, count in zip(held, problem.cluster.slots_of_rank, strict=True))
    row = np.full(int((problem.cluster.slots_of_rank + step).sum()), EMPTY_SLOT, np.int32)
    for (start, _), part in zip(_spans(problem.cluster.slots_of_rank + step), held, strict=True):
        row[start : start + len(part)] = part
    return step, row


def _spans(slots_R: np.ndarray) -> list[tuple[int, int]]:
    """(first slot, slots) of each rank."""
    return list(zip(slot_starts(slots_R).tolist(), slots_R.tolist(), strict=True))


def search_budget(
    problem: Problem, search: Search, exceeds: Callable[[Problem, np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """(L, S) slots of the layout under the global budget.

    Args:
        problem: with `replica_budget` "global".
        search: layers of a problem, each by itself.
        exceeds: (problem, (L, S) slots) -> (L,) by how much each layer is above its cap on imbalance, None = there is
            none. A layer gets no number of slots with which it is further above than with the cluster's own.
    """
    steps, layers = slot_steps(problem), list(range(problem.num_layers))
    # Most time goes to the cluster's own slots, so that an exchange must beat a thorough search; a layer without
    # replicas is soon searched.
    weights = [1.0 if step < 0 else 5.0 if step == 0 else 2.0 for step in steps]
    found = [
        search(with_steps(problem, step), layers, weight / sum(weights))
        for step, weight in zip(steps, weights, strict=True)
    ]
    rows = [[widen(problem, row, step) for _, row in each] for step, each in zip(steps, found, strict=True)]
    value_LS = np.array([[value for value, _ in each] for each in found]).T
    if exceeds is not None:
        over_LS = np.zeros_like(value_LS)
        for number, (step, each) in enumerate(zip(steps, found, strict=True)):
            over_LS[:, number] = exceeds(with_steps(problem, step), np.stack([row for _, row in each]))
        own_L = np.maximum(over_LS[:, steps.index(0)], 0.0)
        value_LS[over_LS > own_L[:, None] + CAP_ROUNDING] = np.inf
    for number in range(1, len(steps)):  # with more slots the layer can stay as it was with fewer
        for layer in layers:
            if value_LS[layer, number - 1] <= value_LS[layer, number]:
                value_LS[layer, number] = value_LS[layer, number - 1]
                rows[number][layer] = rows[number - 1][layer]
    step_L = share_out(value_LS, steps)
    return np.stack([rows[int(step) - steps[0]][layer] for layer, step in enumerate(step_L)])
