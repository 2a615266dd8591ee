"""Search for the plan of one layer: descents to several targets, the best kept.

A descent to a low target spends its moves on the busiest ranks first; one to a target that the moves just reach uses
them best. So the first target is the bound, and the next ones halve what is left between it and what was reached.

Shape letters: E experts of a layer, R ranks, S slots per layer.
"""

import numpy as np

from moeplace.placement.rebalancing.descent import descend
from moeplace.placement.rebalancing.seating import (
    Floor,
    Seating,
    across_of,
    moves_of,
    remember,
    repoint,
    set_times,
    sit,
)
from moeplace.placement.rebalancing.steps import Limits
from moeplace.profiling.kernel_cache import njit

TOLERANCE = 3e-4
"""Imbalances this near are equal: the plan that moves less is taken, and a descent ends this near to the bound."""

LEAST_CUT = 0.08
"""A further descent must be able to cut this share of the imbalance above the bound."""


@njit(cache=True, nogil=True)
def search_layer(  # type: ignore[no-untyped-def]
    start_S, load_E, home_E, bound, price, floor: Floor, seating: Seating, limits: Limits, most_steps, best_S
):
    """Write the best slots found to `best_S`; returns (imbalance, sum of codes of moves).

    Args:
        start_S: (S,) int64 slots now in force; every expert has one.
        load_E: (E,) float64 loads, not all zero.
        home_E: (E,) node that may fetch each expert, -1 = any.
        bound: proven least imbalance.
        price: imbalance that a move must save.
        floor, seating: the cluster, and tables to work in.
        limits: of moves.
        most_steps: work to do.
    """
    mean = load_E.sum() / (1.0 / floor.slow_R).sum()
    remember(start_S, load_E, home_E, floor, seating)
    sit(start_S, floor, seating)
    best_S[:] = start_S
    best, best_code, best_worth = seating.time_R.max() / mean, 0, seating.time_R.max() / mean
    low, high, steps = bound * (1.0 + TOLERANCE), best, 0
    target = low
    while steps < most_steps and high > low:
        sit(start_S, floor, seating)
        steps += 1 + descend(target * mean, floor, seating, limits, most_steps - steps)
        reached, code = seating.time_R.max() / mean, seating.moves[0]
        worth = max(reached, low) + price * moves_of(code)
        if worth < best_worth - 1e-12 or (worth <= best_worth + 1e-12 and moves_of(code) < moves_of(best_code)):
            best, best_code, best_worth = reached, code, worth
            best_S[:] = seating.slots_S
        if reached <= target * (1.0 + 1e-12):
            high = target
        else:
            low, high = target, min(high, reached)
        if high - low < max(0.5 * TOLERANCE, LEAST_CUT * (high - bound)):
            break
        target = 0.5 * (low + high)
    return best, best_code


@njit(cache=True, nogil=True)
def seat_missing(slots_S, load_E, home_E, floor: Floor, seating: Seating):  # type: ignore[no-untyped-def]
    """Give every expert without a slot one, in place: an empty one, else the one that is missed least.

    Returns the experts that found none. Heaviest first, each where its rank is done soonest.
    """
    remember(slots_S, load_E, home_E, floor, seating)
    sit(slots_S, floor, seating)
    homeless = 0
    for e in np.argsort(-load_E, kind="mergesort"):
        if seating.count_E[e] > 0:
            continue
        best, best_time = -1, np.inf
        for b in range(len(slots_S)):
            j, r = seating.slots_S[b], floor.rank_S[b]
            if (j >= 0 and seating.count_E[j] < 2) or (home_E[e] >= 0 and home_E[e] != floor.node_R[r]):
                continue
            time = seating.time_R[r] + (load_E[e] - (seating.share_E[j] if j >= 0 else 0.0)) * floor.slow_R[r]
            if j >= 0:
                time += seating.share_E[j]
            if time < best_time:
                best, best_time = b, time
        if best < 0:
            homeless += 1
            continue
        repoint(best, e, floor, seating)
        set_times(floor, seating)
    slots_S[:] = seating.slots_S
    return homeless


@njit(cache=True, nogil=True)
def fill_empty(start_S, slots_S, load_E, home_E, floor: Floor, seating: Seating, limits: Limits):  # type: ignore[no-untyped-def]
    """Give empty slots, in place, the expert of the largest share that leaves the busiest rank the busiest.

    Where there is none, the lightest. Slots stay empty where the limits on moves say so, or their rank has all experts.
    """
    remember(start_S, load_E, home_E, floor, seating)
    sit(slots_S, floor, seating)
    for b in range(len(slots_S)):
        if seating.slots_S[b] >= 0:
            continue
        r, best, best_key = floor.rank_S[b], -1, -np.inf
        top = seating.time_R.max()
        for e in range(len(load_E)):
            if seating.on_ER[e, r] or (home_E[e] >= 0 and home_E[e] != floor.node_R[r]):
                continue
            done, code = seating.moves[0], seating.code_ER[e, r]
            if code and (seating.fetched_R[r] >= limits.per_rank or moves_of(done) >= limits.moves):
                continue
            if across_of(code) and across_of(done) >= limits.across:
                continue
            part = load_E[e] / (seating.count_E[e] + 1)
            key = seating.share_E[e] if seating.time_R[r] + part * floor.slow_R[r] <= top else -1.0 - part
            if key > best_key:
                best, best_key = e, key
        if best >= 0:
            repoint(b, best, floor, seating)
            set_times(floor, seating)
    slots_S[:] = seating.slots_S
    return seating.time_R.max() * (1.0 / floor.slow_R).sum() / max(load_E.sum(), 1e-300), seating.moves[0]
