"""What is in the fast memory of every rank at a moment of a replay, and the link that fills it: compiled pieces.

An expert is ABSENT, CACHED (in a row of its layer that may be given up), PINNED, or in TRANSIT (in a row of no layer,
until its layer is done). One link per rank loads one expert after the other, in the order in which they are asked for.

Shape letters: L MoE layers, R ranks, E experts per layer, W rows for transit, Q places of a queue.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.tiers.policy import LFU, LRU
from moeplace.profiling.kernel_cache import njit

ABSENT, CACHED, PINNED, TRANSIT = 0, 1, 2, 3


class Fast(NamedTuple):
    """Contents of fast memory."""

    state_LRE: np.ndarray
    """int8: ABSENT, CACHED, PINNED or TRANSIT."""
    ready_LRE: np.ndarray
    """Moment from which the expert can be used."""
    fresh_LRE: np.ndarray
    """bool: fetched ahead and not used yet."""
    value_LRE: np.ndarray
    """What the policy thinks of it, as of `touched_LRE`."""
    touched_LRE: np.ndarray
    """Step of the last change of `value_LRE`."""
    room_LR: np.ndarray
    """int64 rows of the layer that are not pinned."""
    used_LR: np.ndarray
    """int64, those of them that hold something."""
    transit_RW: np.ndarray
    """Moment from which each row for transit is free; infinite while it holds what was fetched ahead."""
    row_LRE: np.ndarray
    """int64 row of an expert in TRANSIT."""


class Link(NamedTuple):
    """The link of every rank, and what waits for it."""

    load_LRE: np.ndarray
    """Seconds to load an expert."""
    size_LRE: np.ndarray
    """Bytes of it, float64."""
    free_R: np.ndarray
    """Moment from which it is idle."""
    looked_R: np.ndarray
    """Moment up to which its queue has been followed."""
    layer_RQ: np.ndarray
    expert_RQ: np.ndarray
    since_RQ: np.ndarray
    """Moment at which each waiting expert was named."""
    length_R: np.ndarray
    """int64 experts waiting."""
    ahead_layer_R: np.ndarray
    """int64 layer of the expert that was fetched ahead last, -1 = none since the link was asked for another."""
    ahead_expert_R: np.ndarray
    begun_R: np.ndarray
    """Moment at which its load began, its pauses taken out."""
    pieces: int
    """Pieces of a load: between them a load that is fetched ahead can be broken off, or wait for others."""
    spared_R: np.ndarray
    """Loads that were broken off, in shares of a load that were not done."""
    loads_LR: np.ndarray
    """int64 loads so far."""
    busy_R: np.ndarray
    """Seconds of loads so far."""
    bytes_R: np.ndarray
    """Bytes of loads so far, float64; of what was broken off, the share that was loaded."""


@njit(cache=True, nogil=True)
def worth(value, touched, step, eviction, keep):  # type: ignore[no-untyped-def]
    """What an expert is worth at a step: older is less by LRU, fewer is less by LFU, a score fades."""
    if eviction == LRU:
        return touched
    if eviction == LFU:
        return value
    return value * keep ** (step - touched)


@njit(cache=True, nogil=True)
def least_worth(fast, layer, r, step, eviction, keep, needed_E):  # type: ignore[no-untyped-def]
    """The cached expert to give up that is neither needed nor waiting for its first use; -1 = there is none."""
    best, least, seen = -1, np.inf, np.inf
    for e in range(fast.state_LRE.shape[2]):
        if fast.state_LRE[layer, r, e] != CACHED or needed_E[e] or fast.fresh_LRE[layer, r, e]:
            continue
        value = worth(fast.value_LRE[layer, r, e], fast.touched_LRE[layer, r, e], step, eviction, keep)
        if value < least or (value == least and fast.touched_LRE[layer, r, e] < seen):
            best, least, seen = e, value, fast.touched_LRE[layer, r, e]
    return best


@njit(cache=True, nogil=True)
def ask(link, layer, r, e, now):  # type: ignore[no-untyped-def]
    """Queue an expert to be fetched ahead, unless it waits already or the queue is full."""
    n = link.length_R[r]
    if n == link.layer_RQ.shape[1]:
        return
    for i in range(n):
        if link.layer_RQ[r, i] == layer and link.expert_RQ[r, i] == e:
            return
    link.layer_RQ[r, n], link.expert_RQ[r, n], link.since_RQ[r, n] = layer, e, now
    link.length_R[r] = n + 1


@njit(cache=True, nogil=True)
def drop(link, layer, r):  # type: ignore[no-untyped-def]
    """Forget what waits for layer `layer`: its router has spoken."""
    kept = 0
    for i in range(link.length_R[r]):
        if link.layer_RQ[r, i] != layer:
            link.layer_RQ[r, kept] = link.layer_RQ[r, i]
            link.expert_RQ[r, kept] = link.expert_RQ[r, i]
            link.since_RQ[r, kept] = link.since_RQ[r, i]
            kept += 1
    link.length_R[r] = kept


@njit(cache=True, nogil=True)
def follow(fast, link, r, until, step, eviction, keep, none_E):  # type: ignore[no-untyped-def]
    """Let an idle link begin what waits, first come first served, up to a moment; it stops where there is no row."""
    done = 0
    while done < link.length_R[r]:
        layer, e = link.layer_RQ[r, done], link.expert_RQ[r, done]
        begin = max(link.free_R[r], link.since_RQ[r, done], link.looked_R[r])
        if begin >= until:
            break
        if fast.state_LRE[layer, r, e] == ABSENT:
            if not _make_room(fast, layer, r, e, begin, step, eviction, keep, none_E):
                break
            end = begin + link.load_LRE[layer, r, e]
            link.free_R[r] = end
            fast.ready_LRE[layer, r, e] = end
            fast.fresh_LRE[layer, r, e] = True
            link.ahead_layer_R[r], link.ahead_expert_R[r], link.begun_R[r] = layer, e, begin
            count_load(link, layer, r, e)
        done += 1
    if done:
        for i in range(done, link.length_R[r]):
            link.layer_RQ[r, i - done] = link.layer_RQ[r, i]
            link.expert_RQ[r, i - done] = link.expert_RQ[r, i]
            link.since_RQ[r, i - done] = link.since_RQ[r, i]
        link.length_R[r] -= done
    link.looked_R[r] = max(link.looked_R[r], until)


@njit(cache=True, nogil=True)
def set_aside(fast, link, layer, r, now, awaited_E):  # type: ignore[no-untyped-def]
    """The router of a layer has spoken: the link leaves what it fetches ahead, if that is not awaited now, at the end
    of the piece under way. Of this layer it was in vain and is forgotten; of a later one it goes on after what is asked
    for. Returns the seconds that are left of it, 0 = nothing was set aside."""
    ahead, e = link.ahead_layer_R[r], link.ahead_expert_R[r]
    if ahead < 0 or link.free_R[r] <= now or (ahead == layer and awaited_E[e]):
        return 0.0
    whole = link.load_LRE[ahead, r, e]
    piece = whole / link.pieces
    left = whole - min(np.ceil((now - link.begun_R[r]) / piece - 1e-9), link.pieces) * piece
    if left <= 1e-9 * whole:
        return 0.0
    link.free_R[r] -= left
    if ahead > layer:
        return left
    link.spared_R[r] += left / whole
    link.busy_R[r] -= left
    link.bytes_R[r] -= left / whole * link.size_LRE[ahead, r, e]
    link.ahead_layer_R[r] = -1
    fast.fresh_LRE[ahead, r, e] = False
    if fast.state_LRE[ahead, r, e] == TRANSIT:
        fast.transit_RW[r, fast.row_LRE[ahead, r, e]] = link.free_R[r]
    else:
        fast.used_LR[ahead, r] -= 1
    fast.state_LRE[ahead, r, e] = ABSENT
    return 0.0


@njit(cache=True, nogil=True)
def take_up(fast, link, r, since, left):  # type: ignore[no-untyped-def]
    """Go on with what was set aside at `since`, behind what was loaded meanwhile."""
    layer, e = link.ahead_layer_R[r], link.ahead_expert_R[r]
    link.begun_R[r] += link.free_R[r] - since
    link.free_R[r] += left
    fast.ready_LRE[layer, r, e] = link.free_R[r]


@njit(cache=True, nogil=True)
def _make_room(fast, layer, r, e, begin, step, eviction, keep, none_E):  # type: ignore[no-untyped-def]
    """A row for what is fetched ahead: of its layer, else of transit, where one is left for what is asked for."""
    if fast.used_LR[layer, r] < fast.room_LR[layer, r]:
        fast.used_LR[layer, r] += 1
        fast.state_LRE[layer, r, e] = CACHED
        return True
    if fast.room_LR[layer, r] > 0:
        victim = least_worth(fast, layer, r, step, eviction, keep, none_E)
        if victim >= 0:
            fast.state_LRE[layer, r, victim] = ABSENT
            fast.state_LRE[layer, r, e] = CACHED
            return True
    held, found = 0, -1
    for w in range(fast.transit_RW.shape[1]):
        held += fast.transit_RW[r, w] == np.inf
        if found < 0 and fast.transit_RW[r, w] <= begin:
            found = w
    if found < 0 or held + 1 >= fast.transit_RW.shape[1]:
        return False
    fast.transit_RW[r, found] = np.inf
    fast.row_LRE[layer, r, e] = found
    fast.state_LRE[layer, r, e] = TRANSIT
    return True


@njit(cache=True, nogil=True)
def count_load(link, layer, r, e):  # type: ignore[no-untyped-def]
    """Note that an expert is loaded."""
    link.loads_LR[layer, r] += 1
    link.busy_R[r] += link.load_LRE[layer, r, e]
    link.bytes_R[r] += link.size_LRE[layer, r, e]
