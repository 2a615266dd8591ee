"""Steps that end overload: the best change that takes load off the busiest rank, per expert that must be fetched.

Overload is the sum over ranks of time above a target. A step that ends overload elsewhere, or brings little to a rank
that stays below the target, counts even if the busiest rank stays the busiest: several ranks share the heaviest
experts, and all must be relieved before the maximum falls.

    swap      a slot of the busiest rank with a lighter one elsewhere (or an empty one)
    repoint   a slot whose expert has others gets an expert of the busiest rank; or, on the busiest rank, a lighter one
    relay     a slot elsewhere gets an expert of the busiest rank, and its own expert, the only one of its kind, moves
              to a slot that is free for re-pointing

Functions take plain arrays out of their tuples once, because every access counts references.

Shape letters: E experts of a layer, R ranks, H ranks of an expert, N nodes, S slots per layer, F free ones, A slots of
a rank.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.rebalancing.seating import Floor, Seating, across_of, moves_of
from moeplace.profiling.kernel_cache import njit

SPREAD = 0.1
"""What a fall of the sum of squared times counts beside a fall of overload, both in loads: it decides between steps
that end the same overload (0.01 to 2 gave imbalances within 2 % of each other on Zipf and lognormal loads)."""
ACROSS = 0.5
"""What an expert that is new to the node costs on top of a move: links between nodes are the slow ones."""
FREE = 0.3
"""Cost, in moves, of a step that fetches nothing (it goes back), so that its gain still counts."""

SWAP_RANKS = 16
"""Ranks, those done soonest, that the busiest one may swap with: enough pairs of slots to meet any difference."""
RELAY_RANKS = 6
"""Ranks, those done soonest, that a relay may go through (32 instead of 6 gave the same imbalances on Zipf loads)."""
RELAYED = 0.5
"""Share of the busiest rank's overload that an expert must relieve for a relay: there are many, and each costs two."""


class Limits(NamedTuple):
    """What a plan of one layer may cost.

    Attributes:
        moves: most experts fetched.
        per_rank: most experts fetched by one rank.
        across: most experts fetched that are new to their node.
        min_replicas: slots that every expert keeps.
    """

    moves: int
    per_rank: int
    across: int
    min_replicas: int


class Goal(NamedTuple):
    """What steps are for.

    Attributes:
        top: the busiest rank.
        target: most time of a rank.
        mean: time of all ranks in balance.
        room: most load of a slot beside the lightest experts on a rank at the target: an expert with heavier slots must
            get more, whatever the rank that takes one suffers at first.
    """

    top: int
    target: float
    mean: float
    room: float


class Step(NamedTuple):
    """A step: slot `a` of the busiest rank swaps with `b`; or (a = -1) `b` gets expert `i`, and the expert that it held
    moves to slot `s` (-1: to none). score = what it is worth per move, 0 = no step."""

    score: float
    a: int
    b: int
    i: int
    s: int


class Free(NamedTuple):
    """Slots that can be given to another expert, and what it costs other ranks (S,), infinity for the other slots."""

    slot_F: np.ndarray
    loss_S: np.ndarray


class Trial(NamedTuple):
    """Changes of ranks' times that a step would make: `change_R` is zero but for the first `used[0]` of `rank_R`."""

    change_R: np.ndarray
    rank_R: np.ndarray
    used: np.ndarray


@njit(cache=True, nogil=True, inline="always")
def _over(time, target):  # type: ignore[no-untyped-def]
    return time - target if time > target else 0.0


@njit(cache=True, nogil=True, inline="always")
def _cost(code):  # type: ignore[no-untyped-def]
    """What a step of this code costs, in moves."""
    return max(moves_of(code) + ACROSS * across_of(code), FREE)


@njit(cache=True, nogil=True, inline="always")
def _per_move(value, code, done, limits):  # type: ignore[no-untyped-def]
    """`value` per move of a step of this code after `done`; 0 where it breaks a limit."""
    moves, across = moves_of(code), across_of(code)
    all_across = across_of(done) + across
    if (across > 0 and all_across > limits.across) or (moves > 0 and moves_of(done) + moves > limits.moves):
        return 0.0
    return value / max(moves + ACROSS * across, FREE)


@njit(cache=True, nogil=True, inline="always")
def _may_get(e, r, on_ER, code_ER, home_E, node_R, fetched_R, per_rank):  # type: ignore[no-untyped-def]
    """Whether rank r lacks expert e and may fetch it."""
    if on_ER[e, r] or (home_E[e] >= 0 and home_E[e] != node_R[r]):
        return False
    return code_ER[e, r] == 0 or fetched_R[r] < per_rank


@njit(cache=True, nogil=True)
def best_swap(goal: Goal, floor: Floor, seating: Seating, limits: Limits, best: Step):  # type: ignore[no-untyped-def]
    """The best step, or a better swap of a slot of the busiest rank with one of a rank below the target."""
    _, start_R, node_R, slow_R = floor
    slots_S, _, home_E, code_ER, _, share_E, on_ER, _, _, time_R, fetched_R, done = seating
    top, target, unit = goal.top, goal.target, SPREAD / goal.mean
    time, over_top, held = time_R[top], _over(time_R[top], target), start_R[top + 1] - start_R[top]
    code_A, part_A, slot_A = np.zeros(held, np.int64), np.zeros(held), np.zeros(held, np.int64)
    for h in np.argsort(time_R)[:SWAP_RANKS]:
        if h == top or time_R[h] >= target:
            break
        movable, heaviest, cheapest = 0, 0.0, np.inf
        for a in range(start_R[top], start_R[top + 1]):
            i = slots_S[a]
            if i >= 0 and _may_get(i, h, on_ER, code_ER, home_E, node_R, fetched_R, limits.per_rank):
                code = code_ER[i, h] - code_ER[i, top]
                code_A[movable], part_A[movable], slot_A[movable] = code, share_E[i], a
                heaviest, cheapest = max(heaviest, share_E[i]), min(cheapest, moves_of(code) + ACROSS * across_of(code))
                movable += 1
        # A swap ends no more overload than this rank has room, and evens out no more than half of the difference.
        most = min(over_top, target - time_R[h]) + 0.5 * unit * (time - time_R[h]) ** 2
        back = 1.0 + ACROSS if fetched_R[h] else 0.0
        if movable == 0 or most <= best.score * max(cheapest - back, FREE):
            continue
        for b in range(start_R[h], start_R[h + 1]):
            j, part_j, code_j = slots_S[b], 0.0, 0
            if j >= 0:
                part_j = share_E[j]
                if part_j >= heaviest or not _may_get(
                    j, top, on_ER, code_ER, home_E, node_R, fetched_R, limits.per_rank
                ):
                    continue
                code_j = code_ER[j, top] - code_ER[j, h]
            for n in range(movable):
                shift = part_A[n] - part_j
                new_h = time_R[h] + shift * slow_R[h]
                if shift <= 0.0 or new_h >= time:
                    continue
                new_top = time - shift * slow_R[top]
                gain = over_top - _over(new_top, target) - _over(new_h, target)
                value = gain + unit * (time * time - new_top * new_top + time_R[h] * time_R[h] - new_h * new_h)
                if gain > 0.0 and value > best.score * _cost(code_A[n] + code_j):
                    score = _per_move(value, code_A[n] + code_j, done[0], limits)
                    if score > best.score:
                        best = Step(score, slot_A[n], b, -1, -1)
    return best


@njit(cache=True, nogil=True, inline="always")
def _add(r, change, change_R, rank_R, used):  # type: ignore[no-untyped-def]
    if change_R[r] == 0.0:
        rank_R[used[0]] = r
        used[0] += 1
    change_R[r] += change


@njit(cache=True, nogil=True, inline="always")
def _needs(load, count, goal):  # type: ignore[no-untyped-def]
    """What it is worth that an expert gets a slot beside the `count` it has: a rank's load if it must, else 0."""
    return goal.mean if load > count * goal.room else 0.0


@njit(cache=True, nogil=True)
def _relief(e, goal, floor, seating):  # type: ignore[no-untyped-def]
    """What one slot more of expert e is worth on the ranks that hold it."""
    _, load_E, _, _, count_E, share_E, on_ER, holder_EH, holders_E, time_R, _, _ = seating
    less, unit = share_E[e] - load_E[e] / (count_E[e] + 1), SPREAD / goal.mean
    gain = _needs(load_E[e], count_E[e], goal)
    for n in range(holders_E[e]):
        r = holder_EH[e, n]
        new = time_R[r] - less * on_ER[e, r] * floor.slow_R[r]
        gain += _over(time_R[r], goal.target) - _over(new, goal.target) + unit * (time_R[r] ** 2 - new**2)
    return gain


@njit(cache=True, nogil=True)
def set_losses(goal: Goal, floor: Floor, seating: Seating, limits: Limits, loss_S):  # type: ignore[no-untyped-def]
    """Write what it costs other ranks that a slot gives its expert up; infinity where the expert needs it."""
    slots_S, load_E, _, _, count_E, share_E, on_ER, holder_EH, holders_E, time_R, _, _ = seating
    rank_S, slow_R, unit, target = floor.rank_S, floor.slow_R, SPREAD / goal.mean, goal.target
    for b in range(len(slots_S)):
        j = slots_S[b]
        loss_S[b] = 0.0 if j < 0 else np.inf
        if j >= 0 and count_E[j] > limits.min_replicas:
            more = load_E[j] / (count_E[j] - 1) - share_E[j]
            loss = _needs(load_E[j], count_E[j] - 1, goal)
            for n in range(holders_E[j]):
                r = holder_EH[j, n]
                if r != rank_S[b]:
                    new = time_R[r] + more * on_ER[j, r] * slow_R[r]
                    loss += _over(new, target) - _over(time_R[r], target) + unit * (new**2 - time_R[r] ** 2)
            loss_S[b] = loss


@njit(cache=True, nogil=True)
def _worth(b, i, s, goal, floor, seating, limits, trial):  # type: ignore[no-untyped-def]
    """Exact score of giving slot b to expert i and slot s (-1: none) to the expert that was in b."""
    slots_S, load_E, _, code_ER, count_E, share_E, on_ER, holder_EH, holders_E, time_R, _, done = seating
    change_R, rank_R, used = trial
    h, j, slow_R = floor.rank_S[b], slots_S[b], floor.slow_R
    code, part_i = code_ER[i, h], load_E[i] / (count_E[i] + 1)
    for n in range(holders_E[i]):
        r = holder_EH[i, n]
        _add(r, (part_i - share_E[i]) * on_ER[i, r] * slow_R[r], change_R, rank_R, used)
    _add(h, part_i * slow_R[h], change_R, rank_R, used)
    if j >= 0:
        _add(h, -share_E[j] * slow_R[h], change_R, rank_R, used)
        code -= code_ER[j, h] if on_ER[j, h] == 1 else 0
    free, leaves = (b, j) if s < 0 else (s, slots_S[s])
    if s >= 0:
        r = floor.rank_S[s]
        code += code_ER[j, r]
        _add(r, share_E[j] * slow_R[r], change_R, rank_R, used)
        if leaves >= 0:
            _add(r, -share_E[leaves] * slow_R[r], change_R, rank_R, used)
            code -= code_ER[leaves, r] if on_ER[leaves, r] == 1 else 0
    if leaves >= 0:
        more = load_E[leaves] / (count_E[leaves] - 1) - share_E[leaves]
        for n in range(holders_E[leaves]):
            r = holder_EH[leaves, n]
            slots = on_ER[leaves, r] - (r == floor.rank_S[free])
            _add(r, more * slots * slow_R[r], change_R, rank_R, used)
    gain, spread = _needs(load_E[i], count_E[i], goal), 0.0
    if leaves >= 0:
        gain -= _needs(load_E[leaves], count_E[leaves] - 1, goal)
    for n in range(used[0]):
        r = rank_R[n]
        new = time_R[r] + change_R[r]
        gain += _over(time_R[r], goal.target) - _over(new, goal.target)
        spread += time_R[r] ** 2 - new**2
        change_R[r] = 0.0
    used[0] = 0
    if gain <= 1e-9 * goal.mean:
        return 0.0
    return _per_move(gain + SPREAD / goal.mean * spread, code, done[0], limits)


@njit(cache=True, nogil=True)
def best_repoint(  # type: ignore[no-untyped-def]
    goal: Goal, floor: Floor, seating: Seating, limits: Limits, free: Free, trial: Trial, best: Step
):
    """The best step, or a better one that gives a free slot to an expert of the busiest rank."""
    rank_S, start_R, node_R, slow_R = floor
    slots_S, load_E, home_E, code_ER, count_E, share_E, on_ER, _, _, time_R, fetched_R, done = seating
    top, target, unit, loss_S = goal.top, goal.target, SPREAD / goal.mean, free.loss_S
    for a in range(start_R[top], start_R[top + 1]):
        i = slots_S[a]
        if i < 0:
            continue
        relief, part_i = _relief(i, goal, floor, seating), load_E[i] / (count_E[i] + 1)
        if relief <= FREE * best.score:
            continue
        for b in free.slot_F:
            r, j = rank_S[b], slots_S[b]
            if loss_S[b] >= relief or r == top or i == j:
                continue
            new = time_R[r] + (part_i - (share_E[j] if j >= 0 else 0.0)) * slow_R[r]
            value = relief - loss_S[b] + _over(time_R[r], target) - _over(new, target)
            value += unit * (time_R[r] ** 2 - new**2)
            if value <= FREE * best.score:
                continue
            code = code_ER[i, r] - (code_ER[j, r] if j >= 0 and on_ER[j, r] == 1 else 0)
            if value <= best.score * _cost(code) or _per_move(value, code, done[0], limits) <= 0.0:
                continue
            if _may_get(i, r, on_ER, code_ER, home_E, node_R, fetched_R, limits.per_rank):
                score = _worth(b, i, -1, goal, floor, seating, limits, trial)
                if score > best.score:
                    best = Step(score, -1, b, i, -1)
    return best


@njit(cache=True, nogil=True)
def best_lightening(  # type: ignore[no-untyped-def]
    goal: Goal, floor: Floor, seating: Seating, limits: Limits, free: Free, trial: Trial, best: Step
):
    """The best step, or a better one that gives a free slot of the busiest rank to a lighter expert."""
    rank_S, _, node_R, slow_R = floor
    slots_S, load_E, home_E, code_ER, count_E, share_E, on_ER, _, _, time_R, fetched_R, done = seating
    top, target, unit, loss_S = goal.top, goal.target, SPREAD / goal.mean, free.loss_S
    for b in free.slot_F:
        j = slots_S[b]
        if rank_S[b] != top or j < 0:
            continue
        code_j = code_ER[j, top] if on_ER[j, top] == 1 else 0
        for i in range(len(load_E)):
            part_i = load_E[i] / (count_E[i] + 1)
            if part_i >= share_E[j]:
                continue
            new = time_R[top] + (part_i - share_E[j]) * slow_R[top]
            saved = _over(time_R[top], target) - _over(new, target) + unit * (time_R[top] ** 2 - new**2)
            saved += load_E[i] - part_i - loss_S[b]  # at most what all its ranks save
            saved += _needs(load_E[i], count_E[i], goal)
            code = code_ER[i, top] - code_j
            if saved <= best.score * _cost(code) or _per_move(saved, code, done[0], limits) <= 0.0:
                continue
            if _may_get(i, top, on_ER, code_ER, home_E, node_R, fetched_R, limits.per_rank):
                score = _worth(b, i, -1, goal, floor, seating, limits, trial)
                if score > best.score:
                    best = Step(score, -1, b, i, -1)
    return best


@njit(cache=True, nogil=True)
def best_relay(  # type: ignore[no-untyped-def]
    goal: Goal, floor: Floor, seating: Seating, limits: Limits, free: Free, trial: Trial, best: Step
):
    """The best step, or a better relay of an expert of the busiest rank."""
    slots_S, _, home_E, code_ER, _, _, on_ER, _, _, time_R, fetched_R, _ = seating
    start_R, top, per_rank = floor.start_R, goal.top, limits.per_rank
    emptiest = np.argsort(time_R)[:RELAY_RANKS]
    for a in range(start_R[top], start_R[top + 1]):
        i = slots_S[a]
        relief = _relief(i, goal, floor, seating) if i >= 0 else 0.0
        if relief <= max(FREE * best.score, RELAYED * _over(time_R[top], goal.target)):
            continue
        for h in emptiest:
            if time_R[h] >= goal.target or not _may_get(
                i, h, on_ER, code_ER, home_E, floor.node_R, fetched_R, per_rank
            ):
                continue
            for b in range(start_R[h], start_R[h + 1]):
                if slots_S[b] >= 0 and on_ER[slots_S[b], h] == 1:
                    best = _best_relay_through(b, i, relief, goal, floor, seating, limits, free, trial, best)
    return best


@njit(cache=True, nogil=True)
def _best_relay_through(b, i, relief, goal, floor, seating, limits, free, trial, best):  # type: ignore[no-untyped-def]
    """The best step, or a better one that gives slot b to expert i and a free slot to the expert that was in b."""
    rank_S, _, node_R, slow_R = floor
    slots_S, load_E, home_E, code_ER, count_E, share_E, on_ER, _, _, time_R, fetched_R, done = seating
    target, h, j, loss_S = goal.target, rank_S[b], slots_S[b], free.loss_S
    value = relief - _over(time_R[h] + (load_E[i] / (count_E[i] + 1) - share_E[j]) * slow_R[h], target)
    code_h = code_ER[i, h] - code_ER[j, h]
    if value <= FREE * best.score:
        return best
    for s in free.slot_F:
        r, k = rank_S[s], slots_S[s]
        if r == h or k in (j, i) or loss_S[s] >= value:
            continue
        new, code = time_R[r] + share_E[j] * slow_R[r], code_h + code_ER[j, r]
        if k >= 0:
            new -= share_E[k] * slow_R[r]
            code -= code_ER[k, r] if on_ER[k, r] == 1 else 0
        left = value - loss_S[s] - _over(new, target) + _over(time_R[r], target)
        left *= 1.0 + SPREAD
        if left <= best.score * _cost(code) or _per_move(left, code, done[0], limits) <= 0.0:
            continue
        if _may_get(j, r, on_ER, code_ER, home_E, node_R, fetched_R, limits.per_rank):
            score = _worth(b, i, s, goal, floor, seating, limits, trial)
            if score > best.score:
                best = Step(score, -1, b, i, s)
    return best
