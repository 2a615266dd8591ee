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

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplace.placement.search.annealing import (
    COOLING_STEPS,
    FIRST_PULL,
    WALLED,
    accepts,
    more_moves,
    next_pull,
    overload_change,
    random_below,
)
from moeplace.profiling.kernel_cache import njit

OVERLOAD = 1e3
"""Price of a token above the cap when runs are compared: any feasible run beats any other."""
LAST_PRICE = 4.0
"""The same at the last temperature, rising from 1 at the first one."""
LAST_PRICE_TIED = 200.0
"""The same where moves are limited: a rank above its limit may then need several moves at once, each worth a hundred
tokens and more, and the closing descent makes one after another."""


class Chain(NamedTuple):
    """The objective of the module's docstring.

    Attributes:
        transitions_LSS: (L-1, S, S) float64 tokens between experts of consecutive layers.
        cost_RR: (R, R) float64 cost of a token from rank to rank, zero diagonal.
        load_LS: (L, S) float64 load of each expert, 0 of an empty slot.
        limit_LR: (L, R) most load of each rank.
        risk_LSS: (L, S, S) hedge, see `search.hedge`.
        bias_LSR: (L, S, R) float64 cost, in tokens, of expert e on rank r, whatever its neighbours; (0, S, R) = none.
        new_LSR: (L, S, R) uint8, 1 where having expert e on rank r is a move; (0, S, R) = none is counted.
        most_moves: most of them in a layer.
    """

    transitions_LSS: np.ndarray
    cost_RR: np.ndarray
    load_LS: np.ndarray
    limit_LR: np.ndarray
    risk_LSS: np.ndarray
    bias_LSR: np.ndarray
    new_LSR: np.ndarray
    most_moves: float


class Cooling(NamedTuple):
    """Part of an annealing run.

    Attributes:
        hot, end: temperature of the first and of the last cooling step, in tokens.
        first, until: the steps of this call, so that the caller can look at the clock in between.
        proposals: number of swaps that all steps together try.
        pull_L: (L,) float64 price of a move in each layer, changed in place from step to step; see `first_pull`.
    """

    hot: float
    end: float
    first: int
    until: int
    proposals: int
    pull_L: np.ndarray


class _Held(NamedTuple):
    """Of ranks: load (L, R), risk of each expert beside their members (L, S, R), their own risk (L, R); moves (L,)."""

    load_LR: np.ndarray
    risk_LSR: np.ndarray
    risk_LR: np.ndarray
    moves_L: np.ndarray


def untied(slots: int, ranks: int) -> tuple[np.ndarray, np.ndarray, float]:
    """`bias_LSR`, `new_LSR` and `most_moves` of a chain without ties to a placement in force."""
    return np.zeros((0, slots, ranks)), np.zeros((0, slots, ranks), np.uint8), np.inf


def first_pull(chain: Chain, hot: float) -> np.ndarray:
    """(L,) price of a move at the first temperature, zeros where moves are not limited."""
    layers, slots = chain.load_LS.shape
    limited = len(chain.new_LSR) > 0 and chain.most_moves < slots
    return np.full(layers, FIRST_PULL * hot if limited else 0.0)


def chain_value(rank_LS: np.ndarray, chain: Chain) -> float:
    """What the chain search minimises: traffic and hedge, overload at a prohibitive price."""
    total, ranks = 0.0, len(chain.cost_RR)
    entries = np.arange(rank_LS.shape[1])
    for layer, rank_S in enumerate(rank_LS):
        if len(chain.new_LSR):
            excess = max(float(chain.new_LSR[layer, entries, rank_S].sum()) - chain.most_moves, 0.0)
            total += OVERLOAD * float(chain.load_LS[layer].sum()) * excess
            total += float(chain.bias_LSR[layer, entries, rank_S].sum())
        load_R = np.bincount(rank_S, chain.load_LS[layer], minlength=ranks)
        total += OVERLOAD * float(np.maximum(load_R - chain.limit_LR[layer], 0.0).sum())
        on_SR = (rank_S[:, None] == np.arange(ranks)).astype(np.float64)
        total += float((np.einsum("sr,st,tr->r", on_SR, chain.risk_LSS[layer], on_SR, optimize=True) ** 2).sum())
        if layer + 1 < len(rank_LS):
            flow_SS = chain.transitions_LSS[layer]
            total += float((flow_SS * chain.cost_RR[np.ix_(rank_S, rank_LS[layer + 1])]).sum())
    return total


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
def anneal_chain(rank_LS, chain, table_LSR, cooling, stop, state):  # type: ignore[no-untyped-def]
    """Carry out the cooling steps first..until-1 of COOLING_STEPS in place; `until > COOLING_STEPS` ends with descent.

    Args:
        rank_LS: (L, S) int64.
        chain: the objective and its limits.
        table_LSR: (L, S, R) float64 from `attraction`, with `bias_LSR` added, kept up to date.
        cooling: temperatures, steps and proposals of this call.
        stop: (1,) uint8, set from outside when time is up.
        state: (1,) uint64.
    """
    layers, slots = rank_LS.shape
    held = _hold(rank_LS, chain)
    load_LR, risk_LSR, risk_LR, moves_L = held
    transitions_LSS, cost_RR, load_LS, limit_LR, risk_LSS, _, new_LSR, most_moves = chain
    counted, mean_load = len(new_LSR) > 0, load_LS.sum() / (layers * slots)
    for step in range(cooling.first, cooling.until):
        last = step == COOLING_STEPS
        share = step / (COOLING_STEPS - 1.0)
        temperature = 0.0 if last else cooling.hot * (cooling.end / cooling.hot) ** share
        price = 1e6 if last else (LAST_PRICE_TIED if counted else LAST_PRICE) ** share
        # The cap on moves can always be kept, so that at the end it goes before the load.
        wall = price * mean_load * (1e3 * slots if last else 1.0 if share > WALLED else 0.0)
        for layer in range(layers):
            pull = next_pull(cooling.pull_L[layer], moves_L[layer], most_moves)
            cooling.pull_L[layer] = 0.0 if last else pull
        tries = cooling.proposals
        count = max(tries // 4, 40 * layers * slots) if last else tries * 3 // (4 * COOLING_STEPS)
        for _ in range(count):
            if stop[0]:
                break
            layer = random_below(state, layers)
            a, b = random_below(state, slots), random_below(state, slots)
            g, h = rank_LS[layer, a], rank_LS[layer, b]
            if g == h:
                continue
            delta = table_LSR[layer, a, h] - table_LSR[layer, a, g] + table_LSR[layer, b, g] - table_LSR[layer, b, h]
            new_g, new_h = _risks_after(layer, a, b, g, h, risk_LSS, risk_LSR, risk_LR)
            delta += new_g * new_g + new_h * new_h - risk_LR[layer, g] ** 2 - risk_LR[layer, h] ** 2
            amount = load_LS[layer, a] - load_LS[layer, b]
            paid, more = price * overload_change(load_LR[layer], limit_LR[layer], g, h, amount), 0
            if counted:
                more = more_moves(a, b, g, h, new_LSR[layer])
                above = max(moves_L[layer] + more - most_moves, 0.0) - max(moves_L[layer] - most_moves, 0.0)
                paid += cooling.pull_L[layer] * more + wall * above
            if last and delta + paid >= 0.0:
                continue
            if not accepts(delta + paid, temperature, state):
                continue
            risk_LR[layer, g], risk_LR[layer, h] = new_g, new_h
            for e in range(slots):
                shift = risk_LSS[layer, e, b] - risk_LSS[layer, e, a]
                risk_LSR[layer, e, g] += shift
                risk_LSR[layer, e, h] -= shift
            _exchange(layer, a, b, rank_LS, transitions_LSS, cost_RR, table_LSR)
            moves_L[layer] += more
            load_LR[layer, g] -= amount
            load_LR[layer, h] += amount


@njit(cache=True, nogil=True)
def _hold(rank_LS, chain):  # type: ignore[no-untyped-def]
    layers, slots = rank_LS.shape
    num_ranks = len(chain.cost_RR)
    load_LR, risk_LR = np.zeros((layers, num_ranks)), np.zeros((layers, num_ranks))
    risk_LSR, moves_L = np.zeros((layers, slots, num_ranks)), np.zeros(layers, np.int64)
    for layer in range(layers):
        for e in range(slots):
            load_LR[layer, rank_LS[layer, e]] += chain.load_LS[layer, e]
            if len(chain.new_LSR):
                moves_L[layer] += chain.new_LSR[layer, e, rank_LS[layer, e]]
            for f in range(slots):
                risk_LSR[layer, e, rank_LS[layer, f]] += chain.risk_LSS[layer, e, f]
        for e in range(slots):
            risk_LR[layer, rank_LS[layer, e]] += risk_LSR[layer, e, rank_LS[layer, e]]
    return _Held(load_LR, risk_LSR, risk_LR, moves_L)


@njit(cache=True, nogil=True, inline="always")
def _risks_after(layer, a, b, g, h, risk_LSS, risk_LSR, risk_LR):  # type: ignore[no-untyped-def]
    """Risk of ranks g and h after the swap."""
    pair = risk_LSS[layer, a, a] + risk_LSS[layer, b, b] - 2.0 * risk_LSS[layer, a, b]
    new_g = risk_LR[layer, g] + 2.0 * (risk_LSR[layer, b, g] - risk_LSR[layer, a, g]) + pair
    new_h = risk_LR[layer, h] + 2.0 * (risk_LSR[layer, a, h] - risk_LSR[layer, b, h]) + pair
    return new_g, new_h


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
