"""Descent of one layer to a target, step by step, each the one that ends most overload per move.

Shape letters: E experts of a layer, R ranks, S slots per layer.
"""

import numpy as np

from moeplace.placement.rebalancing.seating import Floor, Seating, moves_of, repoint, set_times, swap
from moeplace.placement.rebalancing.steps import (
    Free,
    Goal,
    Limits,
    Step,
    Trial,
    best_lightening,
    best_relay,
    best_repoint,
    best_swap,
    set_losses,
)
from moeplace.profiling.kernel_cache import njit


@njit(cache=True, nogil=True)
def descend(target, floor: Floor, seating: Seating, limits: Limits, most_steps):  # type: ignore[no-untyped-def]
    """Steps, in place, until every rank's time is at most `target`, none gains, or `most_steps` are done.

    Returns the number of steps. A step ends overload, so no layout comes back.
    """
    time_R, loss_S, ranks = seating.time_R, np.empty(len(floor.rank_S)), len(floor.node_R)
    trial = Trial(np.zeros(ranks), np.zeros(4 * ranks, np.int64), np.zeros(1, np.int64))
    mean, room = seating.load_E.sum() / (1.0 / floor.slow_R).sum(), _room(target, floor, seating)
    for number in range(most_steps):
        goal = Goal(int(np.argmax(time_R)), target, mean, room)
        if time_R[goal.top] <= target:
            return number
        set_losses(goal, floor, seating, limits, loss_S)
        best = best_swap(goal, floor, seating, limits, Step(0.0, -1, -1, -1, -1))
        free = Free(np.flatnonzero(loss_S < np.inf), loss_S)
        best = best_repoint(goal, floor, seating, limits, free, trial, best)
        best = best_lightening(goal, floor, seating, limits, free, trial, best)
        if best.score <= 0.0 and moves_of(seating.moves[0]) + 2 <= limits.moves:
            best = best_relay(goal, floor, seating, limits, free, trial, best)
        if best.score <= 0.0:
            return number
        _take(best, floor, seating)
        set_times(floor, seating)
    return most_steps


@njit(cache=True, nogil=True)
def _room(target, floor, seating):  # type: ignore[no-untyped-def]
    """See `Goal`: what the fastest rank does until the target, less the lightest experts that fill its other slots."""
    slots, rising_E = np.diff(floor.start_R).min(), np.sort(seating.load_E)
    lightest = 0.0
    for e in range(min(slots - 1, len(rising_E))):
        lightest += rising_E[e]
    return target / floor.slow_R.min() - lightest


@njit(cache=True, nogil=True)
def _take(step, floor, seating):  # type: ignore[no-untyped-def]
    if step.a >= 0:
        swap(step.a, step.b, floor, seating)
        return
    if step.s >= 0:
        repoint(step.s, seating.slots_S[step.b], floor, seating)
    repoint(step.b, step.i, floor, seating)
