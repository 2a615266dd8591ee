"""Balance of one layer improved by swaps and by re-pointing replicas, within a number of moves.

The load of an expert is split evenly over its replicas. Every step takes the change that lowers the busiest rank most.

Shape letters: E experts of a layer, R ranks, S slots per layer.
"""

from typing import NamedTuple

import numpy as np

from moeplace.profiling.kernel_cache import njit

_NO_LIMIT = 2**31 - 1


class _Layout(NamedTuple):
    """A layer while it is balanced.

    Attributes:
        slots_S: (S,) int32 slot -> expert, -1 = empty.
        rank_S: (S,) rank of each slot.
        load_E: (E,) loads.
        speed_R: (R,) relative speeds.
        replicas_E: (E,) slots that hold each expert.
        on_RE: (R, E) bool, whether a rank holds an expert.
        time_R: (R,) load over speed.
    """

    slots_S: np.ndarray
    rank_S: np.ndarray
    load_E: np.ndarray
    speed_R: np.ndarray
    replicas_E: np.ndarray
    on_RE: np.ndarray
    time_R: np.ndarray


def rebalance_layer(
    slots_S: np.ndarray,
    load_E: np.ndarray,
    capacity_R: np.ndarray,
    speed_R: np.ndarray,
    *,
    max_moves: int | None = None,
    target: float = 1.0,
    min_replicas: int = 1,
) -> int:
    """Improve the balance of one layer in place by swaps and by re-pointing replicas; returns the moves made.

    A move is one expert fetched by a rank that did not hold it in the layout given: a swap costs up to two, a
    re-pointed slot one, and going back costs nothing.

    Args:
        slots_S: (S,) int32 slot -> expert, changed in place.
        load_E: (E,) float64 loads.
        capacity_R: (R,) slots of each rank.
        speed_R: (R,) relative speeds.
        max_moves: most moves, None = any number.
        target: imbalance at which to stop.
        min_replicas: replicas that every expert keeps.
    """
    limit = _NO_LIMIT if max_moves is None else max_moves
    load_E, ranks = np.asarray(load_E, np.float64), len(capacity_R)
    layout = _Layout(
        slots_S, np.repeat(np.arange(ranks), capacity_R), load_E, np.asarray(speed_R, np.float64),
        np.zeros(len(load_E), np.int64), np.zeros((ranks, len(load_E)), np.bool_), np.zeros(ranks),
    )  # fmt: skip
    return int(_rebalance(layout, limit, target, min_replicas))


@njit(cache=True, nogil=True)
def _rebalance(layout, max_moves, target, min_replicas):  # type: ignore[no-untyped-def]
    """See `rebalance_layer`; returns the moves made."""
    slots_S, rank_S, load_E, speed_R, replicas_E, on_RE, time_R = layout
    for s in range(len(slots_S)):
        if slots_S[s] >= 0:
            replicas_E[slots_S[s]] += 1
            on_RE[rank_S[s], slots_S[s]] = True
    was_RE, moves = on_RE.copy(), 0
    _set_times(layout)
    goal = target * load_E.sum() / speed_R.sum()
    for _ in range(64 * len(slots_S)):
        top = np.argmax(time_R)
        if time_R[top] <= goal:
            break
        gain, a, b = _best_swap(layout, top, was_RE, max_moves - moves)
        slot, expert = _best_repoint(layout, top, was_RE, max_moves - moves, min_replicas, gain)
        if slot >= 0:
            moves += _repoint(layout, slot, expert, was_RE)
            _set_times(layout)
        elif a >= 0:
            moves += _swap(layout, top, a, b, was_RE)
        else:
            break
    return moves


@njit(cache=True, nogil=True)
def _set_times(layout):  # type: ignore[no-untyped-def]
    slots_S, rank_S, load_E, speed_R, replicas_E, _, time_R = layout
    time_R[:] = 0.0
    for s in range(len(slots_S)):
        if slots_S[s] >= 0:
            time_R[rank_S[s]] += load_E[slots_S[s]] / replicas_E[slots_S[s]] / speed_R[rank_S[s]]


@njit(cache=True, nogil=True)
def _best_swap(layout, top, was_RE, left):  # type: ignore[no-untyped-def]
    """(gain, a, b): the swap of the busiest rank's slot a with any other's b that lowers the larger time of both most.

    At most `left` experts may be fetched for it; a = -1 if no swap lowers it.
    """
    slots_S, rank_S, load_E, speed_R, replicas_E, on_RE, time_R = layout
    best_gain, best_a, best_b = time_R[top] * 1e-9, -1, -1
    for a in range(len(slots_S)):
        if rank_S[a] != top or slots_S[a] < 0:
            continue
        i = slots_S[a]
        part_i = load_E[i] / replicas_E[i]
        for b in range(len(slots_S)):
            r, j = rank_S[b], slots_S[b]
            if r == top or on_RE[r, i] or (j >= 0 and on_RE[top, j]):
                continue
            part_j = load_E[j] / replicas_E[j] if j >= 0 else 0.0
            if part_j >= part_i or _swap_moves(i, j, top, r, was_RE) > left:
                continue
            new_top = time_R[top] - (part_i - part_j) / speed_R[top]
            new_other = time_R[r] + (part_i - part_j) / speed_R[r]
            gain = time_R[top] - max(new_top, new_other)
            if gain > best_gain:
                best_gain, best_a, best_b = gain, a, b
    return best_gain, best_a, best_b


@njit(cache=True, nogil=True, inline="always")
def _swap_moves(i, j, top, r, was_RE):  # type: ignore[no-untyped-def]
    """Experts fetched more (or fewer: going back) after a swap of expert i on rank top with j on rank r."""
    fetched = int(not was_RE[r, i]) - int(not was_RE[top, i])
    return fetched + (int(not was_RE[top, j]) - int(not was_RE[r, j]) if j >= 0 else 0)


@njit(cache=True, nogil=True)
def _best_repoint(layout, top, was_RE, left, min_replicas, best_gain):  # type: ignore[no-untyped-def]
    """(slot, expert): the replica anywhere that had best hold an expert of the busiest rank; slot = -1: none gains."""
    slots_S, rank_S, _, _, replicas_E, on_RE, time_R = layout
    best_slot, best_expert = -1, -1
    for b in range(len(slots_S)):
        r, j = rank_S[b], slots_S[b]
        if r == top or (j >= 0 and replicas_E[j] <= min_replicas):
            continue
        for a in range(len(slots_S)):
            i = slots_S[a]
            if rank_S[a] != top or i < 0 or i == j or on_RE[r, i]:
                continue
            if int(not was_RE[r, i]) - int(j >= 0 and not was_RE[r, j]) > left:
                continue
            worst = _worst_after_repoint(layout, i, j, r)
            if time_R[top] - worst > best_gain:
                best_gain, best_slot, best_expert = time_R[top] - worst, b, i
    return best_slot, best_expert


@njit(cache=True, nogil=True)
def _repoint(layout, slot, i, was_RE):  # type: ignore[no-untyped-def]
    """Let a slot hold expert i; returns the moves it costs."""
    slots_S, rank_S, _, _, replicas_E, on_RE, _ = layout
    j, r = slots_S[slot], rank_S[slot]
    slots_S[slot] = i
    if j >= 0:
        on_RE[r, j] = False
        replicas_E[j] -= 1
    on_RE[r, i] = True
    replicas_E[i] += 1
    return int(not was_RE[r, i]) - int(j >= 0 and not was_RE[r, j])


@njit(cache=True, nogil=True)
def _swap(layout, top, a, b, was_RE):  # type: ignore[no-untyped-def]
    """Swap slot a of rank top with slot b; returns the moves it costs."""
    slots_S, rank_S, load_E, speed_R, replicas_E, on_RE, time_R = layout
    i, j, r = slots_S[a], slots_S[b], rank_S[b]
    part_i = load_E[i] / replicas_E[i]
    part_j = load_E[j] / replicas_E[j] if j >= 0 else 0.0
    if j >= 0:
        on_RE[r, j], on_RE[top, j] = False, True
    on_RE[top, i], on_RE[r, i] = False, True
    slots_S[a], slots_S[b] = j, i
    time_R[top] -= (part_i - part_j) / speed_R[top]
    time_R[r] += (part_i - part_j) / speed_R[r]
    return _swap_moves(i, j, top, r, was_RE)


@njit(cache=True, nogil=True)
def _worst_after_repoint(layout, i, j, r):  # type: ignore[no-untyped-def]
    """Largest time over ranks if one slot of rank `r` held expert i instead of j."""
    _, _, load_E, speed_R, replicas_E, on_RE, time_R = layout
    less_i = load_E[i] / replicas_E[i] - load_E[i] / (replicas_E[i] + 1)
    more_j = load_E[j] / (replicas_E[j] - 1) - load_E[j] / replicas_E[j] if j >= 0 else 0.0
    worst = 0.0
    for q in range(len(time_R)):
        work = 0.0
        if q == r:
            work = load_E[i] / (replicas_E[i] + 1) - (load_E[j] / replicas_E[j] if j >= 0 else 0.0)
        else:
            if on_RE[q, i]:
                work -= less_i
            if j >= 0 and on_RE[q, j]:
                work += more_j
        worst = max(worst, time_R[q] + work / speed_R[q])
    return worst
