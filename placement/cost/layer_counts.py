"""The kernel of the replay: one layer, token by token, step by step.

Tokens are taken in the order of their steps, so that counts per step need room for one step only, whatever the batch.

Shape letters: T tokens, E experts, K top-k, R ranks, N nodes, S slots.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.cost.steps import Lanes
from moeplace.profiling.kernel_cache import njit


class Routed(NamedTuple):
    """The tokens of a layer."""

    ids_TK: np.ndarray
    """(T, K) expert ids, -1 = none."""
    rank_TK: np.ndarray
    """(T, K) rank that serves each, -1 = none."""
    owner_T: np.ndarray
    """(T,) rank where each token is, -1 = unknown."""


class Sites(NamedTuple):
    """Where experts are."""

    node_R: np.ndarray
    """(R,) node of each rank."""
    slot_ER: np.ndarray
    """(E, R) slot that holds each expert on each rank, anything where none does."""
    speed_R: np.ndarray
    """(R,) relative speeds."""


class Work(NamedTuple):
    """What a rank of speed 1 spends on a step."""

    per_token: float
    per_activated: float


class LayerCounts(NamedTuple):
    """What is counted; the kernel adds to it."""

    sums: np.ndarray
    """(5,) int64: d, dn, tokens with d = 1, copies from owner to ranks, copies from ranks to the new owner."""
    load_R: np.ndarray
    """(R,) int64 assignments that a rank computes."""
    present_R: np.ndarray
    """(R,) int64 tokens that a rank serves."""
    present_N: np.ndarray
    """(N,) int64 tokens that a node serves."""
    first_RR: np.ndarray
    """(R, R) int64 copies from owner to serving rank."""
    entering_RN: np.ndarray
    """(R, N) int64 tokens of each owner that each node serves."""
    second_RR: np.ndarray
    """(R, R) int64 copies from serving rank to new owner."""
    owned_R: np.ndarray
    """(R,) int64 tokens whose owner a rank is, before the layer."""
    step_sums: np.ndarray
    """(4,) float64 sums over steps: tokens of the busiest rank over the mean, activated experts likewise, time of the
    slowest rank, steps in which a token has d > 1."""


class _Scratch(NamedTuple):
    held_R: np.ndarray
    used_K: np.ndarray
    node_seen_N: np.ndarray
    slot_seen_S: np.ndarray
    tokens_R: np.ndarray
    activated_R: np.ndarray


@njit(cache=True, nogil=True)
def count_layer(routed: Routed, sites: Sites, lanes: Lanes, work: Work, moves: bool, counts: LayerCounts) -> None:
    """Count one layer; where tokens move, `routed.owner_T` becomes the owner after the layer.

    The new owner is the rank with most of the token's experts; ties go to the owner until then, else to the lowest.
    """
    num_ranks, tokens = len(sites.node_R), len(routed.owner_T)
    scratch = _Scratch(
        np.zeros(num_ranks, np.int64),
        np.empty(routed.ids_TK.shape[1], np.int64),
        np.full(sites.node_R[-1] + 1, -1, np.int64),
        np.full(sites.slot_ER.max() + 1, -1, np.int64),
        np.zeros(num_ranks, np.int64),
        np.zeros(num_ranks, np.int64),
    )
    for step in range(lanes.length):
        spread = False
        for lane in range(lanes.width):
            d = _count_token(lane * lanes.length + step, step, routed, sites, moves, counts, scratch)
            spread = spread or d > 1
        counts.step_sums[3] += spread
        _close_step(sites.speed_R, work, counts.step_sums, scratch.tokens_R, scratch.activated_R)
    for t in range(lanes.width * lanes.length, tokens):
        _count_token(t, -1, routed, sites, moves, counts, scratch)


@njit(cache=True, nogil=True)
def _count_token(t, step, routed, sites, moves, counts, scratch):  # type: ignore[no-untyped-def]
    d = 0
    old = routed.owner_T[t]
    for k in range(routed.ids_TK.shape[1]):
        r = routed.rank_TK[t, k]
        if r < 0:
            continue
        if scratch.held_R[r] == 0:
            scratch.used_K[d] = r
            d += 1
            node = sites.node_R[r]
            if scratch.node_seen_N[node] != t:
                scratch.node_seen_N[node] = t
                counts.sums[1] += 1
                counts.present_N[node] += 1
                if old >= 0:
                    counts.entering_RN[old, node] += 1
        scratch.held_R[r] += 1
        counts.load_R[r] += 1
        if step >= 0:
            scratch.tokens_R[r] += 1
            slot = sites.slot_ER[routed.ids_TK[t, k], r]
            if scratch.slot_seen_S[slot] != step:
                scratch.slot_seen_S[slot] = step
                scratch.activated_R[r] += 1
    if old >= 0:
        counts.owned_R[old] += 1
    if d == 0:
        return 0
    new = _next_owner(old, d, scratch.used_K, scratch.held_R) if moves else old
    counts.sums[0] += d
    counts.sums[2] += d == 1
    for i in range(d):
        r = scratch.used_K[i]
        scratch.held_R[r] = 0
        counts.present_R[r] += 1
        if old >= 0 and r != old:
            counts.sums[3] += 1
            counts.first_RR[old, r] += 1
        if new >= 0 and r != new:
            counts.sums[4] += 1
            counts.second_RR[r, new] += 1
    routed.owner_T[t] = new
    return d


@njit(cache=True, nogil=True)
def _next_owner(old, d, used_K, held_R):  # type: ignore[no-untyped-def]
    new = used_K[0]
    for i in range(1, d):
        r = used_K[i]
        better = held_R[r] > held_R[new]
        if held_R[r] == held_R[new]:
            better = r == old or (new != old and r < new)
        if better:
            new = r
    return new


@njit(cache=True, nogil=True)
def _close_step(speed_R, work, step_sums, tokens_R, activated_R):  # type: ignore[no-untyped-def]
    """Add the step's figures to the sums, and clear its counts."""
    tokens = most_tokens = activated = most_activated = 0
    slowest = 0.0
    for r in range(len(speed_R)):
        tokens += tokens_R[r]
        activated += activated_R[r]
        most_tokens = max(most_tokens, tokens_R[r])
        most_activated = max(most_activated, activated_R[r])
        spent = (work.per_token * tokens_R[r] + work.per_activated * activated_R[r]) / speed_R[r]
        slowest = max(slowest, spent)
        tokens_R[r] = activated_R[r] = 0
    step_sums[0] += most_tokens * len(speed_R) / tokens if tokens else 1.0
    step_sums[1] += most_activated * len(speed_R) / activated if activated else 1.0
    step_sums[2] += slowest
