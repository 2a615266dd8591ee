"""Balance alone, by annealing: loads split evenly over replicas, until the bound is met or the work is done.

Longest-first packing and descents end where no single change helps; a few heavy experts on few slots need several
changes at once that are worse one by one.

Shape letters: E experts of a layer, R ranks, S slots per layer.
"""

import numpy as np

from moeplace.placement.search.annealing import next_random
from moeplace.placement.solvers.replicas.exact_search import Schedule
from moeplace.placement.solvers.replicas.seats import Seats, make_move, propose, take_back
from moeplace.profiling.kernel_cache import njit

SPREAD = 0.1
"""What overload above the bound counts beside the busiest rank: it leads where the maximum is flat."""


@njit(cache=True, nogil=True)
def anneal_even(load_E, seats: Seats, slow_R, bound, schedule: Schedule, stop, state):  # type: ignore[no-untyped-def]
    """Improve the seats in place; returns the imbalance of the best layout met, which they end with.

    Args:
        load_E: (entries,) loads, 0 behind the layer's experts.
        seats: where experts are.
        slow_R: (R,) 1 / relative speed.
        bound: imbalance that nothing can beat: the search ends there.
        schedule: temperatures in imbalance; `work` moves are tried.
        stop: (1,) uint8, set from outside when time is up.
        state: (1,) uint64.
    """
    slots_S, rank_S, (rank_EH, count_E, held_ER) = seats.slots_S, seats.rank_S, seats.holders
    mean, ranks = load_E.sum() / (1.0 / slow_R).sum(), len(slow_R)
    time_R, trial_R, room_R = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    for s in range(len(slots_S)):
        if slots_S[s] >= 0:
            time_R[rank_S[s]] += load_E[slots_S[s]] / count_E[slots_S[s]] * slow_R[rank_S[s]] / mean
    cost, busiest = _cost(time_R, bound)
    best_S, best = slots_S.copy(), busiest
    done = 0
    while done < schedule.work and best > bound * (1.0 + 1e-12) and not stop[0]:
        temperature = schedule.hot * (schedule.end / schedule.hot) ** (done / schedule.work)
        done += 1
        for r in range(ranks):
            room_R[r] = bound - time_R[r]
        move = propose(slots_S, rank_S, count_E, held_ER, seats.num_real, schedule.min_replicas, room_R, 1.0, state)
        if move.x < 0:
            continue
        trial_R[:] = time_R
        _shift(move.a, -1.0 / mean, load_E, rank_EH, count_E, slow_R, trial_R)
        if move.b >= 0:
            _shift(move.b, -1.0 / mean, load_E, rank_EH, count_E, slow_R, trial_R)
        make_move(move, seats)
        _shift(move.a, 1.0 / mean, load_E, rank_EH, count_E, slow_R, trial_R)
        if move.b >= 0:
            _shift(move.b, 1.0 / mean, load_E, rank_EH, count_E, slow_R, trial_R)
        new_cost, busiest = _cost(trial_R, bound)
        draw = max(float(next_random(state) >> np.uint64(11)) * (1.0 / 9007199254740992.0), 1e-300)
        if new_cost - cost > -temperature * np.log(draw):
            take_back(move, seats)
            continue
        cost = new_cost
        time_R[:] = trial_R
        if busiest < best - 1e-12:
            best = busiest
            best_S[:] = slots_S
    slots_S[:] = best_S
    return best


@njit(cache=True, nogil=True, inline="always")
def _shift(e, factor, load_E, rank_EH, count_E, slow_R, time_R):  # type: ignore[no-untyped-def]
    """Add the shares of an expert, times a factor, to the times of its ranks."""
    for n in range(count_E[e]):
        time_R[rank_EH[e, n]] += factor * load_E[e] / count_E[e] * slow_R[rank_EH[e, n]]


@njit(cache=True, nogil=True, inline="always")
def _cost(time_R, bound):  # type: ignore[no-untyped-def]
    """(what is minimised, the busiest rank's time)."""
    busiest, over = 0.0, 0.0
    for r in range(len(time_R)):
        busiest = max(busiest, time_R[r])
        over += max(time_R[r] - bound, 0.0)
    return busiest + SPREAD * over, busiest
