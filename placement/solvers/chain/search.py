""" "chain": the coherent objective for one expert per token, all layers together.

    min  sum_l sum_ij n_l(i, j) c[rank of (l, i), rank of (l+1, j)]        c = cost of a token from rank to rank
    s.t. C_r experts on rank r,  load of rank r <= cap of the layer        (ExFlow's objective with c = 1 off-diagonal)

Two searches, both exact in their evaluation:

* block coordinate descent: one layer given its neighbours is an assignment problem (`linear_sum_assignment` over
  slots), with the load as a price per rank;
* simulated annealing over swaps of two experts of one layer. With the table

    A[l, e, r] = cost of the tokens of expert (l, e) if it sat on rank r, neighbours fixed

  a swap changes the objective by A[a, h] - A[a, g] + A[b, g] - A[b, h] exactly, because experts of one layer do not
  exchange tokens; an accepted swap updates the tables of the two neighbouring layers.

An empty slot is an expert without tokens. The layer's load above the cap is priced while hot, forbidden at the end.

Shape letters: L MoE layers, E experts, R ranks, S slots per layer.
"""

import numpy as np
from numba import njit
from scipy.optimize import linear_sum_assignment

from moeplace.placement.search.annealing import COOLING_STEPS, accepts, overload_change, random_below


def descend_chain(
    rank_LS: np.ndarray,
    transitions_LSS: np.ndarray,
    cost_RR: np.ndarray,
    price_LSR: np.ndarray,
    *,
    max_sweeps: int = 30,
) -> None:
    """Block coordinate descent in place: every layer in turn gets its exact best assignment to the slots.

    Args:
        rank_LS: (L, S) rank of every expert and empty slot.
        transitions_LSS: (L-1, S, S) tokens between primary experts.
        cost_RR: (R, R) cost of a token from rank to rank.
        price_LSR: (L, S, R) further cost of an expert on a rank, such as the price of load.
    """
    layers = len(rank_LS)
    for sweep in range(max_sweeps):
        changed = False
        order = range(layers) if sweep % 2 == 0 else range(layers - 1, -1, -1)
        for layer in order:
            cost_SR = price_LSR[layer].astype(np.float64)
            if layer:
                cost_SR = cost_SR + transitions_LSS[layer - 1].T @ cost_RR[rank_LS[layer - 1]]
            if layer + 1 < layers:
                cost_SR = cost_SR + transitions_LSS[layer] @ cost_RR.T[rank_LS[layer + 1]]
            new_S = assign(cost_SR, rank_LS[layer])
            if (
                cost_SR[np.arange(len(new_S)), new_S].sum()
                < cost_SR[np.arange(len(new_S)), rank_LS[layer]].sum() - 1e-9
            ):
                rank_LS[layer] = new_S
                changed = True
        if not changed:
            break


def assign(cost_SR: np.ndarray, rank_S: np.ndarray) -> np.ndarray:
    """(S,) rank of each row at least total cost, every rank as often as in `rank_S`: an assignment problem."""
    columns = np.sort(rank_S)
    rows, slots = linear_sum_assignment(cost_SR[:, columns])
    new_S = np.empty(len(rank_S), np.int64)
    new_S[rows] = columns[slots]
    return new_S


def chain_cost(rank_LS: np.ndarray, transitions_LSS: np.ndarray, cost_RR: np.ndarray) -> float:
    """The objective: tokens times cost over all boundaries."""
    total = 0.0
    for layer, flow_SS in enumerate(transitions_LSS):
        i, j = np.nonzero(flow_SS)
        total += float((flow_SS[i, j] * cost_RR[rank_LS[layer, i], rank_LS[layer + 1, j]]).sum())
    return total


def attraction(rank_LS: np.ndarray, transitions_LSS: np.ndarray, cost_RR: np.ndarray) -> np.ndarray:
    """(L, S, R) table A of the module's docstring."""
    layers, slots = rank_LS.shape
    table = np.zeros((layers, slots, len(cost_RR)))
    for layer in range(layers):
        if layer:
            table[layer] += transitions_LSS[layer - 1].T @ cost_RR[rank_LS[layer - 1]]
        if layer + 1 < layers:
            table[layer] += transitions_LSS[layer] @ cost_RR.T[rank_LS[layer + 1]]
    return table


@njit(cache=True, nogil=True)
def anneal_chain(  # type: ignore[no-untyped-def]
    rank_LS, transitions_LSS, cost_RR, table_LSR, load_LS, limit_LR, risk_LSS, hot, end, first, until, proposals, stop,
    state,
):  # fmt: skip
    """Carry out the cooling steps first..until-1 of COOLING_STEPS in place; `until > COOLING_STEPS` ends with descent.

    Args:
        rank_LS: (L, S) int64.
        transitions_LSS: (L-1, S, S) float64.
        cost_RR: (R, R) float64, zero diagonal.
        table_LSR: (L, S, R) float64 from `attraction`, kept up to date.
        load_LS: (L, S) load of each expert. limit_LR: (L, R) most load of each rank.
        risk_LSS: (L, S, S) hedge, see `robust`.
        hot, end: temperature of the first and of the last cooling step, in tokens.
        first, until: the steps of this call, so that the caller can look at the clock in between.
        proposals: number of swaps that all steps together try.
        stop: (1,) uint8, set from outside when time is up.
        state: (1,) uint64.
    """
    layers, slots = rank_LS.shape
    num_ranks = len(cost_RR)
    load_LR = np.zeros((layers, num_ranks))
    risk_LSR = np.zeros((layers, slots, num_ranks))
    risk_LR = np.zeros((layers, num_ranks))
    for layer in range(layers):
        for e in range(slots):
            load_LR[layer, rank_LS[layer, e]] += load_LS[layer, e]
            for f in range(slots):
                risk_LSR[layer, e, rank_LS[layer, f]] += risk_LSS[layer, e, f]
        for e in range(slots):
            risk_LR[layer, rank_LS[layer, e]] += risk_LSR[layer, e, rank_LS[layer, e]]
    for step in range(first, until):
        last = step == COOLING_STEPS
        share = step / (COOLING_STEPS - 1.0)
        temperature = 0.0 if last else hot * (end / hot) ** share
        price = 1e6 if last else 4.0**share
        count = max(proposals // 4, 40 * layers * slots) if last else proposals * 3 // (4 * COOLING_STEPS)
        for _ in range(count):
            if stop[0]:
                break
            layer = random_below(state, layers)
            a, b = random_below(state, slots), random_below(state, slots)
            g, h = rank_LS[layer, a], rank_LS[layer, b]
            if g == h:
                continue
            delta = table_LSR[layer, a, h] - table_LSR[layer, a, g] + table_LSR[layer, b, g] - table_LSR[layer, b, h]
            pair = risk_LSS[layer, a, a] + risk_LSS[layer, b, b] - 2.0 * risk_LSS[layer, a, b]
            new_g = risk_LR[layer, g] + 2.0 * (risk_LSR[layer, b, g] - risk_LSR[layer, a, g]) + pair
            new_h = risk_LR[layer, h] + 2.0 * (risk_LSR[layer, a, h] - risk_LSR[layer, b, h]) + pair
            delta += new_g * new_g + new_h * new_h - risk_LR[layer, g] ** 2 - risk_LR[layer, h] ** 2
            amount = load_LS[layer, a] - load_LS[layer, b]
            over = overload_change(load_LR[layer], limit_LR[layer], g, h, amount)
            if last and delta + price * over >= 0.0:
                continue
            if not accepts(delta + price * over, temperature, state):
                continue
            for e in range(slots):
                shift = risk_LSS[layer, e, b] - risk_LSS[layer, e, a]
                risk_LSR[layer, e, g] += shift
                risk_LSR[layer, e, h] -= shift
            risk_LR[layer, g], risk_LR[layer, h] = new_g, new_h
            _exchange(layer, a, b, rank_LS, transitions_LSS, cost_RR, table_LSR)
            load_LR[layer, g] -= amount
            load_LR[layer, h] += amount


@njit(cache=True, nogil=True)
def _exchange(layer, a, b, rank_LS, transitions_LSS, cost_RR, table_LSR):  # type: ignore[no-untyped-def]
    """Swap experts a and b of a layer and update the tables of its neighbours."""
    layers, slots = rank_LS.shape
    num_ranks = len(cost_RR)
    g, h = rank_LS[layer, a], rank_LS[layer, b]
    rank_LS[layer, a], rank_LS[layer, b] = h, g
    if layer + 1 < layers:
        for j in range(slots):
            flow = transitions_LSS[layer, a, j] - transitions_LSS[layer, b, j]
            if flow != 0.0:
                for r in range(num_ranks):
                    table_LSR[layer + 1, j, r] += flow * (cost_RR[h, r] - cost_RR[g, r])
    if layer:
        for i in range(slots):
            flow = transitions_LSS[layer - 1, i, a] - transitions_LSS[layer - 1, i, b]
            if flow != 0.0:
                for r in range(num_ranks):
                    table_LSR[layer - 1, i, r] += flow * (cost_RR[r, h] - cost_RR[r, g])
