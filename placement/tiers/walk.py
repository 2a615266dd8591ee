"""The walk: a trace step by step and layer by layer through the fast memories of all ranks, with a clock.

All ranks begin a layer's experts together, when its routing is known, and the next layer follows the slowest of them.
On a rank, at that moment:

1. What waits to be fetched ahead for this layer is forgotten; what is loaded already stays, what is on its way is late,
   or, where nobody needs it or the host would have computed it before it comes, is broken off at the end of a piece.
   What is on its way for a later layer waits, from the end of a piece on, until what is missing now has been loaded.
2. Experts in fast memory are computed, then late ones as they come; who had to wait for one loses `wake` seconds more.
3. Of the missing ones, from the fewest tokens on, the host computes an expert if it ends before its load would, all
   others being loaded (HybriMoE's rule). The link loads the rest, most tokens first, each computed when it has come.
4. Behind these loads the predicted experts of the next layers wait for the link, most tokens first. Of a layer only
   the newest prediction counts.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k, R ranks.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.tiers.fast import (
    ABSENT,
    CACHED,
    PINNED,
    TRANSIT,
    Fast,
    Link,
    ask,
    count_load,
    drop,
    follow,
    least_worth,
    set_aside,
    take_up,
    worth,
)
from moeplace.placement.tiers.policy import LFU
from moeplace.profiling.kernel_cache import njit

RESIDENT_USE, CACHED_USE, PREFETCHED, LATE, ON_HOST, LOADED = range(6)
USES = ("resident", "cached", "prefetched", "late", "host", "loaded")
"""How an activated expert was found: pinned; cached; fetched ahead, in time or late; computed on the host; loaded."""


class Steps(NamedTuple):
    """Which tokens are served together: token `lane * length + step` is in step `step`, as in `Lanes`."""

    width: int
    length: int
    walked: int
    """Steps that are walked, the first ones."""


class Routing(NamedTuple):
    """Who goes where."""

    ids_LTK: np.ndarray
    """Integer experts, -1 = none."""
    rank_LTK: np.ndarray
    """int8 rank that serves each."""
    weight_LTK: np.ndarray
    """float32 gate weights, or an array with no tokens: all weigh 1."""
    rank_LE: np.ndarray
    """int64 a rank that holds each expert."""


class Pace(NamedTuple):
    """What takes how long."""

    outside_L: np.ndarray
    """Seconds of each layer before its experts begin."""
    fixed: float
    per_token: float
    per_activated: float
    wake: float
    """Seconds that are lost beside each wait for a load."""
    speed_R: np.ndarray
    host_per_expert: float
    """Infinite where the host computes no experts."""
    host_per_token: float
    on_host_LRE: np.ndarray
    """bool: the expert is in host memory, where the host could compute it."""


class Rule(NamedTuple):
    """The policy."""

    eviction: int
    keep: float
    """What remains of a score after a step."""
    accuracy_J: np.ndarray
    """(layers ahead,) accuracy of the predictor; empty = none."""
    experts_L: np.ndarray
    """(L,) int64 experts of each layer."""
    seed: int


class Tally(NamedTuple):
    """What is counted; the walk adds to it."""

    uses_LRU: np.ndarray
    """(L, R, 6) int64 activated experts by how they were found."""
    seconds_L: np.ndarray
    """Seconds of each layer, over all steps."""
    waited_LR: np.ndarray
    """Seconds by which a rank took longer than with everything in fast memory."""


class Stand(NamedTuple):
    """Where the walk stands."""

    step: int
    layer: int
    rank: int
    now: float
    """Seconds."""


@njit(cache=True, nogil=True)
def walk(routing: Routing, steps: Steps, pace: Pace, rule: Rule, fast: Fast, link: Link, tally: Tally) -> None:
    """All steps; `fast`, `link` and `tally` end as the last step leaves them."""
    layers, ranks, experts = fast.state_LRE.shape
    tokens_RE = np.zeros((ranks, experts), np.int64)
    weight_RE = np.zeros((ranks, experts), np.float64)
    ahead_E = np.zeros(experts, np.int64)
    none_E, awaited_E = np.zeros(experts, np.bool_), np.zeros(experts, np.bool_)
    now = 0.0
    for step in range(steps.walked):
        for layer in range(layers):
            began = now
            now += pace.outside_L[layer]
            _count_tokens(routing, steps, step, layer, tokens_RE, weight_RE)
            last = now
            for r in range(ranks):
                follow(fast, link, r, now, step, rule.eviction, rule.keep, none_E)
                drop(link, layer, r)
                _awaited(pace, fast, layer, r, now, tokens_RE[r], awaited_E)
                left = set_aside(fast, link, layer, r, now, awaited_E)
                since = link.free_R[r]
                end = _compute(pace, rule, fast, link, tally, Stand(step, layer, r, now), tokens_RE[r])
                if left > 0:
                    take_up(fast, link, r, since, left)
                last = max(last, end)
                _note_uses(rule, fast, layer, r, step, tokens_RE[r], weight_RE[r])
            for j in range(len(rule.accuracy_J)):
                if layer + 1 + j < layers:
                    _predict(routing, steps, rule, fast, link, step, layer + 1 + j, j, now, ahead_E)
            for r in range(ranks):
                follow(fast, link, r, last, step, rule.eviction, rule.keep, none_E)
                _leave_layer(fast, layer, r, last)
            tokens_RE[:] = 0
            weight_RE[:] = 0.0
            now = last
            tally.seconds_L[layer] += now - began


@njit(cache=True, nogil=True)
def _count_tokens(routing, steps, step, layer, tokens_RE, weight_RE):  # type: ignore[no-untyped-def]
    weighted = routing.weight_LTK.shape[1] > 0
    for lane in range(steps.width):
        t = lane * steps.length + step
        for k in range(routing.ids_LTK.shape[2]):
            e = routing.ids_LTK[layer, t, k]
            if e >= 0:
                r = routing.rank_LTK[layer, t, k]
                tokens_RE[r, e] += 1
                weight_RE[r, e] += routing.weight_LTK[layer, t, k] if weighted else 1.0


@njit(cache=True, nogil=True)
def _awaited(pace, fast, layer, r, now, tokens_E, awaited_E):  # type: ignore[no-untyped-def]
    """Which experts a rank waits for if they are on their way: those asked for that the host does not end before."""
    for e in range(len(tokens_E)):
        ends = now + pace.host_per_expert + pace.host_per_token * tokens_E[e]
        awaited_E[e] = tokens_E[e] > 0
        awaited_E[e] &= not (pace.on_host_LRE[layer, r, e] and ends < fast.ready_LRE[layer, r, e])


@njit(cache=True, nogil=True)
def _compute(pace, rule, fast, link, tally, stand, tokens_E):  # type: ignore[no-untyped-def]
    """The moment at which a rank has computed its experts of a layer."""
    _, layer, r, now = stand
    experts = len(tokens_E)
    done_E = np.zeros(experts)  # when each activated expert has been computed on the device
    at = now + pace.fixed
    everything = at
    late, missing = np.empty(experts, np.int64), np.empty(experts, np.int64)
    num_late = num_missing = 0
    for e in range(experts):
        if tokens_E[e] == 0:
            continue
        own = _device_seconds(pace, r, tokens_E[e])
        everything += own
        state = fast.state_LRE[layer, r, e]
        if state == ABSENT:
            missing[num_missing] = e
            num_missing += 1
        elif state != PINNED and fast.ready_LRE[layer, r, e] > now:
            late[num_late] = e
            num_late += 1
            tally.uses_LRU[layer, r, LATE] += 1
        else:
            at += own
            done_E[e] = at
            use = RESIDENT_USE if state == PINNED else PREFETCHED if fast.fresh_LRE[layer, r, e] else CACHED_USE
            tally.uses_LRU[layer, r, use] += 1
    order = late[:num_late][np.argsort(fast.ready_LRE[layer, r][late[:num_late]], kind="mergesort")]
    for e in order:
        at = _wait(pace, at, fast.ready_LRE[layer, r, e]) + _device_seconds(pace, r, tokens_E[e])
        done_E[e] = at
    found = missing[:num_missing]
    found = found[np.argsort(-tokens_E[found], kind="mergesort")]  # most tokens first, the lowest of equals first
    loaded, host_end = _split(pace, link, layer, r, now, tokens_E, found)
    tally.uses_LRU[layer, r, ON_HOST] += num_missing - loaded
    tally.uses_LRU[layer, r, LOADED] += loaded
    for e in found[:loaded]:
        at = _load(pace, rule, fast, link, stand, e, at, tokens_E, done_E)
        done_E[e] = at
    end = max(at, host_end)
    tally.waited_LR[layer, r] += end - everything
    return end


@njit(cache=True, nogil=True)
def _device_seconds(pace, r, tokens):  # type: ignore[no-untyped-def]
    return (pace.per_activated + pace.per_token * tokens) / pace.speed_R[r]


@njit(cache=True, nogil=True)
def _split(pace, link, layer, r, now, tokens_E, found):  # type: ignore[no-untyped-def]
    """How many of the missing experts are loaded, the first ones, and when the host has computed the others."""
    loaded = len(found)
    host_end = now
    link_end = max(link.free_R[r], now)
    for e in found:
        link_end += link.load_LRE[layer, r, e]
    while loaded > 0:
        e = found[loaded - 1]
        ends = host_end + pace.host_per_expert + pace.host_per_token * tokens_E[e]
        if not pace.on_host_LRE[layer, r, e] or ends >= link_end + _device_seconds(pace, r, tokens_E[e]):
            break
        host_end = ends
        link_end -= link.load_LRE[layer, r, e]
        loaded -= 1
    return loaded, host_end


@njit(cache=True, nogil=True)
def _wait(pace, at, until):  # type: ignore[no-untyped-def]
    """The moment at which a rank that is free at `at` goes on with what comes at `until`."""
    return at if until <= at else until + pace.wake


@njit(cache=True, nogil=True)
def _load(pace, rule, fast, link, stand, e, at, tokens_E, done_E):  # type: ignore[no-untyped-def]
    """Load a missing expert into a row and compute it; the moment at which that is done."""
    step, layer, r, now = stand
    begin = max(link.free_R[r], now)
    transit = -1
    if fast.room_LR[layer, r] == 0:
        transit = int(np.argmin(fast.transit_RW[r]))
        begin = max(begin, fast.transit_RW[r, transit])
    elif fast.used_LR[layer, r] < fast.room_LR[layer, r]:
        fast.used_LR[layer, r] += 1
    else:
        victim = least_worth(fast, layer, r, step, rule.eviction, rule.keep, tokens_E > 0)
        if victim < 0:  # all are needed in this step: the first that has been computed
            for f in range(len(tokens_E)):
                if fast.state_LRE[layer, r, f] == CACHED and (victim < 0 or done_E[f] < done_E[victim]):
                    victim = f
            begin = max(begin, done_E[victim])
        fast.state_LRE[layer, r, victim] = ABSENT
    came = begin + link.load_LRE[layer, r, e]
    link.free_R[r] = came
    count_load(link, layer, r, e)
    at = _wait(pace, at, came) + _device_seconds(pace, r, tokens_E[e])
    if transit >= 0:
        fast.transit_RW[r, transit] = at
    else:
        fast.state_LRE[layer, r, e] = CACHED
        fast.ready_LRE[layer, r, e] = came
        fast.fresh_LRE[layer, r, e] = False
    return at


@njit(cache=True, nogil=True)
def _note_uses(rule, fast, layer, r, step, tokens_E, weight_E):  # type: ignore[no-untyped-def]
    """Let the policy know who was used, wherever it was computed."""
    for e in range(len(tokens_E)):
        if tokens_E[e]:
            before = worth(fast.value_LRE[layer, r, e], fast.touched_LRE[layer, r, e], step, rule.eviction, rule.keep)
            if rule.eviction == LFU:
                fast.value_LRE[layer, r, e] += 1.0
            else:
                fast.value_LRE[layer, r, e] = before + (1.0 - rule.keep) * weight_E[e]
            fast.touched_LRE[layer, r, e] = step
            fast.fresh_LRE[layer, r, e] = False


@njit(cache=True, nogil=True)
def _leave_layer(fast, layer, r, now):  # type: ignore[no-untyped-def]
    """Rows for transit that this layer had are free; what was fetched for it in vain may be given up."""
    for e in range(fast.state_LRE.shape[2]):
        fast.fresh_LRE[layer, r, e] = False
        if fast.state_LRE[layer, r, e] == TRANSIT:
            fast.state_LRE[layer, r, e] = ABSENT
            fast.transit_RW[r, fast.row_LRE[layer, r, e]] = max(now, fast.ready_LRE[layer, r, e])


@njit(cache=True, nogil=True)
def _predict(routing, steps, rule, fast, link, step, layer, j, now, ahead_E):  # type: ignore[no-untyped-def]
    """Queue what the predictor says of layer `layer`, most tokens first."""
    ahead_E[:] = 0
    experts = rule.experts_L[layer]
    for r in range(len(link.free_R)):
        drop(link, layer, r)
    for lane in range(steps.width):
        t = lane * steps.length + step
        for k in range(routing.ids_LTK.shape[2]):
            e = routing.ids_LTK[layer, t, k]
            if e < 0:
                continue
            bits = _mixed(rule.seed, t, layer * 64 + j, k)
            if np.float64(bits >> np.uint64(11)) * 2.0**-53 >= rule.accuracy_J[j] and experts > 1:
                other = np.int64(_mixed(rule.seed + 1, t, layer * 64 + j, k) % np.uint64(experts - 1))
                e = other + (other >= e)  # any expert but the true one
            ahead_E[e] += 1
    for e in np.argsort(-ahead_E, kind="mergesort"):
        if ahead_E[e] == 0:
            break
        r = routing.rank_LE[layer, e]
        if fast.state_LRE[layer, r, e] == ABSENT:
            ask(link, layer, r, e, now)


@njit(cache=True, nogil=True)
def _mixed(seed, a, b, c):  # type: ignore[no-untyped-def]
    """A number that depends on all four (the finaliser of splitmix64)."""
    x = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(a)
    for part in (np.uint64(b), np.uint64(c)):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = (x ^ (x >> np.uint64(31))) + part * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(31))
