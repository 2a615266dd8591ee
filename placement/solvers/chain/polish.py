"""Exact steps on a chain: a layer gets its best assignment given its neighbours, under its cap, until none gains.

A tight cap leaves hardly a swap that keeps it, so annealing by swaps ends above what single layers could have. Steps
start from several plans: the search's own, and plans for looser caps, tightened step by step (`tightened`). Between
rounds a plan is shaken: a window of one to three layers steps under a looser cap, then all layers that this touches.

Shape letters: L MoE layers, R ranks, S slots.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moeplace.placement.solvers.chain.capped import assign_capped
from moeplace.placement.solvers.chain.search import Chain

LOOSER = (1.02, 1.05, 1.1)
"""Factors on limits from which tightening begins."""
MOST_CHOICES = 1024
"""Entries times ranks up to which steps are taken: beyond them one takes longer than it gains."""
CLOSED_CHOICES = 256
"""Entries times ranks up to which CP-SAT closes the gap of a step; at 64 x 8 a thousandth of the stay rate is left."""
Expired = Callable[[], bool]


def moved_tokens(rank_LS: np.ndarray, chain: Chain) -> float:
    """The traffic of a chain alone, without hedge and prices."""
    pairs = zip(chain.transitions_LSS, rank_LS[:-1], rank_LS[1:], strict=True)
    return float(sum((flow_SS * chain.cost_RR[np.ix_(one_S, two_S)]).sum() for flow_SS, one_S, two_S in pairs))


def layer_costs(rank_LS: np.ndarray, chain: Chain, layer: int) -> np.ndarray:
    """(S, R) traffic of each entry of a layer on each rank, neighbours fixed."""
    cost_SR = np.zeros((rank_LS.shape[1], len(chain.cost_RR)))
    if layer:
        cost_SR += chain.transitions_LSS[layer - 1].T @ chain.cost_RR[rank_LS[layer - 1]]
    if layer + 1 < len(rank_LS):
        cost_SR += chain.transitions_LSS[layer] @ chain.cost_RR.T[rank_LS[layer + 1]]
    return cost_SR


def polish(
    rank_LS: np.ndarray, chain: Chain, expired: Expired, *, looser: float = 1.0, first: Sequence[int] | None = None
) -> int:
    """Steps in place until no layer gains, or time is up; a layer is tried again when a neighbour has changed.

    A step is taken if it costs less, or where the layer is above its limits and the step less so.

    Args:
        rank_LS: (L, S) the plan.
        chain: its objective and limits.
        expired: whether time is up.
        looser: factor on limits.
        first: layers to begin with, by default all.

    Returns:
        layers that are not proven to be at their best: 0 = nothing is left for exact steps to gain.
    """
    layers, entries = len(rank_LS), np.arange(rank_LS.shape[1])
    close = rank_LS.shape[1] * len(chain.cost_RR) <= CLOSED_CHOICES
    waiting = dict.fromkeys(range(layers) if first is None else first)
    unproven: set[int] = set()
    while waiting and not expired():
        layer = next(iter(waiting))
        del waiting[layer]
        costs_SR = layer_costs(rank_LS, chain, layer)
        limit_R = chain.limit_LR[layer] * looser
        found = assign_capped(costs_SR, chain.load_LS[layer], limit_R, rank_LS[layer], close=close)
        (unproven.discard if found.proven else unproven.add)(layer)
        now = (_overload(rank_LS[layer], chain, layer, looser), float(costs_SR[entries, rank_LS[layer]].sum()))
        if (_overload(found.rank_S, chain, layer, looser), found.cost + 1e-6) < now:
            rank_LS[layer] = found.rank_S
            waiting |= dict.fromkeys(x for x in (layer + 1, layer - 1) if 0 <= x < layers)
    return len(unproven) + len(waiting)


def tightened(rank_LS: np.ndarray, chain: Chain, expired: Expired) -> np.ndarray:
    """A plan that keeps the caps, from steps under looser ones: each factor of `LOOSER` in turn, then none."""
    rank_LS = rank_LS.copy()
    for looser in (*LOOSER[::-1], 1.0):
        if not expired():
            polish(rank_LS, chain, expired, looser=looser)
    return rank_LS


def refined(rank_LS: np.ndarray, chain: Chain, rng: np.random.Generator, shakes: int, expired: Expired) -> np.ndarray:
    """The best plan after steps from `rank_LS`, from its tightening, and from so many shakes of the better one."""
    plans = []
    for looser in (False, True):
        plan = tightened(rank_LS, chain, expired) if looser else rank_LS.copy()
        polish(plan, chain, expired)
        plans.append(plan)
    best = _best([rank_LS, *plans], chain)
    for _ in range(shakes):
        if expired():
            break
        best = _best([best, _shaken(best, chain, rng, expired)], chain)
    return best


def _shaken(rank_LS: np.ndarray, chain: Chain, rng: np.random.Generator, expired: Expired) -> np.ndarray:
    """A window of one to three layers takes steps under looser limits, one by one; then all that this touches."""
    rank_LS, layers = rank_LS.copy(), len(rank_LS)
    width = int(rng.integers(1, min(3, layers) + 1))
    start = int(rng.integers(0, layers - width + 1))
    looser = float(rng.choice([*LOOSER, 1.3]))
    window = rng.permutation(np.arange(start, start + width))
    for layer in window:
        costs_SR, limit_R = layer_costs(rank_LS, chain, layer), chain.limit_LR[layer] * looser
        if looser < 1.1:  # what the neighbours wish for, blurred: else the step would only be undone
            costs_SR = np.rint(costs_SR * rng.uniform(0.8, 1.2, costs_SR.shape))
        rank_LS[layer] = assign_capped(costs_SR, chain.load_LS[layer], limit_R, rank_LS[layer], close=False).rank_S
    around = [x for x in range(start - 1, start + width + 1) if 0 <= x < layers]
    polish(rank_LS, chain, expired, first=around)
    return rank_LS


def _best(plans: Sequence[np.ndarray], chain: Chain) -> np.ndarray:
    """Of plans, the one above its limits least; of equal ones the one of least traffic, the first of them."""

    def key(rank_LS: np.ndarray) -> tuple[float, float]:
        over = sum(_overload(rank_S, chain, layer, 1.0) for layer, rank_S in enumerate(rank_LS))
        return over, round(moved_tokens(rank_LS, chain), 6)

    return min(plans, key=key)


def keeps(rank_LS: np.ndarray, chain: Chain) -> bool:
    """Whether every layer keeps its limits."""
    return not any(_overload(rank_S, chain, layer, 1.0) for layer, rank_S in enumerate(rank_LS))


def _overload(rank_S: np.ndarray, chain: Chain, layer: int, looser: float) -> float:
    load_R = np.bincount(rank_S, chain.load_LS[layer], minlength=len(chain.cost_RR))
    return float(np.maximum(load_R - looser * chain.limit_LR[layer] - 1e-6, 0.0).sum())
