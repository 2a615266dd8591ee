"""Seats: a search over who sits on which rank, resident or backed, by what steps wait for.

A layer has seats, each on a rank, some of them resident. An expert in a backed seat is loaded in every step that asks
for it; the rank computes others meanwhile, and the last one after its load. A layer takes as long as its busiest rank:

    seconds of a layer = mean over steps of max over ranks of max(computing all, loading the backed + computing one)

Two experts change seats while that gets less, or (annealing) a little more. So experts that are asked for together part
where they are backed, and misses spread over ranks in every single step, not on average alone.

Shape letters: E experts per layer, R ranks, S steps, N pairs (step, expert), by expert, X seats.
"""

from typing import NamedTuple

import numpy as np

from moeplace.profiling.kernel_cache import njit

_ROUNDING = 1e-15
"""Seconds below which what is left of loads that were taken away again is rounding."""


class Asked(NamedTuple):
    """The demand of a layer."""

    first_E: np.ndarray
    step_N: np.ndarray
    seconds_N: np.ndarray
    """Seconds of computing each pair on a device of speed 1."""
    load_E: np.ndarray
    """Seconds of loading each expert."""
    last: float
    """Seconds of computing the expert that is loaded last."""


class Seats(NamedTuple):
    """The seats of a layer and who has them."""

    rank_X: np.ndarray
    resident_X: np.ndarray
    expert_X: np.ndarray
    """Expert of each seat, -1 = nobody."""
    pace_R: np.ndarray
    """1 / speed of each rank."""


@njit(cache=True, nogil=True)
def work_of(asked: Asked, seats: Seats, work_SR2: np.ndarray) -> None:
    """Add up what each rank computes and loads in each step, (S, R, 2) seconds."""
    work_SR2[:] = 0.0
    for x in range(len(seats.rank_X)):
        if seats.expert_X[x] >= 0:
            _add(asked, work_SR2, seats.expert_X[x], seats.rank_X[x], seats.resident_X[x], seats.pace_R, 1.0)


@njit(cache=True, nogil=True)
def _add(asked, work_SR2, e, r, resident, pace_R, sign):  # type: ignore[no-untyped-def]
    load = 0.0 if resident else asked.load_E[e]
    for n in range(asked.first_E[e], asked.first_E[e + 1]):
        work_SR2[asked.step_N[n], r, 0] += sign * asked.seconds_N[n] * pace_R[r]
        work_SR2[asked.step_N[n], r, 1] += sign * load


@njit(cache=True, nogil=True)
def _busiest(work_SR2, last, s):  # type: ignore[no-untyped-def]
    most = 0.0
    for r in range(work_SR2.shape[1]):
        most = max(most, work_SR2[s, r, 0])
        if work_SR2[s, r, 1] > _ROUNDING:
            most = max(most, work_SR2[s, r, 1] + last)
    return most


@njit(cache=True, nogil=True)
def _settle(asked, work_SR2, slowest_S, e):  # type: ignore[no-untyped-def]
    """Bring the busiest rank of the expert's steps up to date; by how much their sum rises."""
    rise = 0.0
    if e < 0:
        return rise
    for n in range(asked.first_E[e], asked.first_E[e + 1]):
        s = asked.step_N[n]
        now = _busiest(work_SR2, asked.last, s)
        rise += now - slowest_S[s]
        slowest_S[s] = now
    return rise


@njit(cache=True, nogil=True)
def seat(asked: Asked, seats: Seats, steps: int, tries: int, heat: float, rng: np.random.Generator) -> float:
    """Anneal the seats of a layer; `seats.expert_X` ends as the best found. Returns its seconds, mean over steps.

    Args:
        asked: the demand.
        seats: who sits where.
        steps: S.
        tries: swaps to try.
        heat: seconds (mean over steps) that a swap may cost at the start with probability 1/e; falls to 0.
        rng: where draws come from.
    """
    work_SR2 = np.zeros((steps, len(seats.pace_R), 2))
    work_of(asked, seats, work_SR2)
    slowest_S = np.empty(steps)
    for s in range(steps):
        slowest_S[s] = _busiest(work_SR2, asked.last, s)
    total = slowest_S.sum()
    best, best_X = total, seats.expert_X.copy()
    count = len(seats.rank_X)
    for attempt in range(tries):
        x, y = rng.integers(0, count), rng.integers(0, count)
        a, b = seats.expert_X[x], seats.expert_X[y]
        alike = seats.rank_X[x] == seats.rank_X[y] and seats.resident_X[x] == seats.resident_X[y]
        if a == b or alike:
            continue
        rise = _exchange(asked, seats, work_SR2, slowest_S, x, y)
        limit = heat * steps * (1.0 - attempt / tries)
        if rise <= 0 or (limit > 0 and rng.random() < np.exp(-rise / limit)):
            total += rise
            if total < best * (1.0 - 1e-12):
                best = total
                best_X[:] = seats.expert_X
        else:
            _exchange(asked, seats, work_SR2, slowest_S, x, y)
    seats.expert_X[:] = best_X
    return best / steps


@njit(cache=True, nogil=True)
def _exchange(asked, seats, work_SR2, slowest_S, x, y):  # type: ignore[no-untyped-def]
    a, b = seats.expert_X[x], seats.expert_X[y]
    for e, old, new in ((a, x, y), (b, y, x)):
        if e >= 0:
            _add(asked, work_SR2, e, seats.rank_X[old], seats.resident_X[old], seats.pace_R, -1.0)
            _add(asked, work_SR2, e, seats.rank_X[new], seats.resident_X[new], seats.pace_R, 1.0)
    seats.expert_X[x], seats.expert_X[y] = b, a
    return _settle(asked, work_SR2, slowest_S, a) + _settle(asked, work_SR2, slowest_S, b)


@njit(cache=True, nogil=True)
def gains(asked: Asked, seats: Seats, steps: int) -> np.ndarray:
    """(X,) seconds, mean over steps, that a layer saves when a backed seat becomes resident, or loses the other way.

    Negative numbers are losses of resident seats; 0 for empty seats.
    """
    work_SR2 = np.zeros((steps, len(seats.pace_R), 2))
    work_of(asked, seats, work_SR2)
    gain_X = np.zeros(len(seats.rank_X))
    for x in range(len(seats.rank_X)):
        e = seats.expert_X[x]
        if e < 0:
            continue
        change = asked.load_E[e] if seats.resident_X[x] else -asked.load_E[e]
        for n in range(asked.first_E[e], asked.first_E[e + 1]):
            s = asked.step_N[n]
            before = _busiest(work_SR2, asked.last, s)
            work_SR2[s, seats.rank_X[x], 1] += change
            gain_X[x] += before - _busiest(work_SR2, asked.last, s)
            work_SR2[s, seats.rank_X[x], 1] -= change
    return gain_X / steps
