"""Swap search on the exact dispatch objective, one layer at a time.

    min  sum_t ( d_t + w dn_t ) + sum_e b[e, rank of e]      d_t, dn_t = ranks and nodes of token t's k-set, b = bias
    s.t. C_r experts on rank r,  load of rank r <= cap of the layer,  experts off their old ranks <= most moves

which is hypergraph connectivity with k-sets as nets. Search: simulated annealing over swaps of two experts, with load
above the cap priced rather than forbidden until the end, because swaps of equal load hardly exist under a cap of 1 %;
moves have a price that rises or falls until there are as many as allowed.

Shape letters: E experts, R ranks, N nodes, S slots.
"""

from typing import NamedTuple

import numpy as np

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
from moeplace.placement.search.nets import LayerNets, level_of, swap_gain, swap_parts
from moeplace.profiling.kernel_cache import njit


class Near(NamedTuple):
    """What ties a layer to ranks: a price for every expert on every rank, and a cap on moves.

    Attributes:
        bias_ER: (S, R) float64 cost, in tokens, of expert e on rank r; (0, R) = no ties at all.
        new_ER: (S, R) uint8, 1 where having expert e on rank r is a move.
        most_moves: most of them.
    """

    bias_ER: np.ndarray
    new_ER: np.ndarray
    most_moves: float


class Run(NamedTuple):
    """How long and how hot to anneal.

    Attributes:
        sweeps: proposals per pair of experts and temperature, in tenths.
        hot: first temperature, as a share of the mean expert's load; 0 = descent only.
        stop: (1,) uint8, set from outside when time is up.
        state: (1,) uint64 generator state.
    """

    sweeps: int
    hot: float
    stop: np.ndarray
    state: np.ndarray


class Held(NamedTuple):
    """What ranks hold now: load (R,), risk of each expert beside their members (S, R), their own (R,); moves (1,)."""

    load_R: np.ndarray
    risk_ER: np.ndarray
    risk_R: np.ndarray
    moves: np.ndarray


def no_ties(num_ranks: int) -> Near:
    """Every expert may go anywhere at no cost."""
    return Near(np.zeros((0, num_ranks)), np.zeros((0, num_ranks), np.uint8), np.inf)


def anneal_layer(
    nets: LayerNets,
    rank_E: np.ndarray,
    node_R: np.ndarray,
    limit_R: np.ndarray,
    *,
    node_weight: float,
    sweeps: int,
    hot: float,
    stop: np.ndarray,
    state: np.ndarray,
    near: Near | None = None,
) -> float:
    """Improve `rank_E` in place; returns sum over tokens of d + node_weight * dn, and the hedge and bias of the change.

    Args:
        nets: the layer's k-sets.
        rank_E: (S,) int64 rank of every expert and empty slot.
        node_R: (R,) node of each rank.
        limit_R: (R,) most load of each rank.
        node_weight: price of a node beside a rank.
        sweeps, hot, stop, state: see `Run`.
        near: ties to ranks, None = none.
    """
    ranks = level_of(nets, rank_E, len(node_R))
    two_levels = node_weight > 0 and node_R[-1] > 0
    nodes = level_of(nets, node_R[rank_E], int(node_R[-1]) + 1) if two_levels else ranks
    weight = float(node_weight) if two_levels else 0.0
    near = no_ties(len(node_R)) if near is None else near
    return float(_anneal(nets, ranks, nodes, limit_R, near, weight, Run(sweeps, float(hot), stop, state)))


@njit(cache=True, nogil=True)
def _anneal(nets, ranks, nodes, limit_R, near, node_weight, run):  # type: ignore[no-untyped-def]
    rank_E, node_E, load_E, risk_EE = ranks.part_E, nodes.part_E, nets.load_E, nets.risk_EE
    slots = len(rank_E)
    held = _hold(nets, rank_E, near, len(limit_R))
    load_R, risk_ER, risk_R, moves = held
    tied, stop, state = len(near.bias_ER) > 0, run.stop, run.state
    cost = float((ranks.count_TP > 0).sum())
    if node_weight > 0:
        cost += node_weight * (nodes.count_TP > 0).sum()
    mean_load = load_E.sum() / slots
    best_rank_E = rank_E.copy()
    have_best = (load_R <= limit_R + 1e-9).all() and moves[0] <= near.most_moves
    best_cost = cost if have_best else np.inf
    pairs = slots * (slots - 1) // 2
    steps = COOLING_STEPS if run.hot > 0 else 0
    pull = FIRST_PULL * run.hot * mean_load if tied and near.most_moves < slots else 0.0
    for step in range(steps + 1):
        last = step == steps
        pull = 0.0 if last else next_pull(pull, moves[0], near.most_moves)
        temperature = 0.0 if last else run.hot * mean_load * (0.03 ** (step / (steps - 1.0)))
        # Price of a token above the cap: lenient while hot, prohibitive at the end.
        price = 1e6 if last else (1.0 + node_weight) * 2.0 * (3.0 ** (step / (steps - 1.0)))
        # The cap on moves can always be kept, so that at the end it goes before the load.
        wall = price * mean_load * (1e3 * slots if last else 1.0 if step > WALLED * steps else 0.0)
        quiet = 0
        proposals = pairs * 40 if last else int(pairs * run.sweeps * 0.1) + 1
        for _ in range(proposals):
            if stop[0]:
                break
            a, b = random_below(state, slots), random_below(state, slots)
            g, h = rank_E[a], rank_E[b]
            if g == h:
                continue
            delta = float(swap_gain(a, b, g, h, ranks))
            if node_weight > 0 and node_E[a] != node_E[b]:
                delta += node_weight * swap_gain(a, b, node_E[a], node_E[b], nodes)
            new_g, new_h = _risks_after(a, b, g, h, risk_EE, risk_ER, risk_R)
            delta += new_g**2 + new_h**2 - risk_R[g] ** 2 - risk_R[h] ** 2
            over = overload_change(load_R, limit_R, g, h, load_E[a] - load_E[b])
            paid = price * over
            if tied:
                delta += near.bias_ER[a, h] - near.bias_ER[a, g] + near.bias_ER[b, g] - near.bias_ER[b, h]
                paid += pull * more_moves(a, b, g, h, near.new_ER) + wall * _moves_above(a, b, g, h, near, moves[0])
            if last and delta + paid >= 0.0:
                quiet += 1
                if quiet > 6 * pairs:
                    break
                continue
            if not accepts(delta + paid, temperature, state):
                continue
            quiet = 0
            _swap(a, b, g, h, nets, ranks, nodes, near, node_weight, held)
            cost += delta
            if cost < best_cost and (load_R <= limit_R + 1e-9).all() and moves[0] <= near.most_moves:
                best_cost, have_best = cost, True
                best_rank_E[:] = rank_E
    if have_best:
        rank_E[:] = best_rank_E
        return best_cost
    return cost


@njit(cache=True, nogil=True)
def _hold(nets, rank_E, near, num_ranks):  # type: ignore[no-untyped-def]
    slots = len(rank_E)
    load_R, risk_ER, risk_R = np.zeros(num_ranks), np.zeros((slots, num_ranks)), np.zeros(num_ranks)
    moves = np.zeros(1, np.int64)
    for e in range(slots):
        load_R[rank_E[e]] += nets.load_E[e]
        for f in range(slots):
            risk_ER[e, rank_E[f]] += nets.risk_EE[e, f]
        if len(near.new_ER):
            moves[0] += near.new_ER[e, rank_E[e]]
    for e in range(slots):
        risk_R[rank_E[e]] += risk_ER[e, rank_E[e]]
    return Held(load_R, risk_ER, risk_R, moves)


@njit(cache=True, nogil=True, inline="always")
def _risks_after(a, b, g, h, risk_EE, risk_ER, risk_R):  # type: ignore[no-untyped-def]
    """Risk of ranks g and h after the swap."""
    pair = risk_EE[a, a] + risk_EE[b, b] - 2.0 * risk_EE[a, b]
    new_g = risk_R[g] + 2.0 * (risk_ER[b, g] - risk_ER[a, g]) + pair
    new_h = risk_R[h] + 2.0 * (risk_ER[a, h] - risk_ER[b, h]) + pair
    return new_g, new_h


@njit(cache=True, nogil=True, inline="always")
def _moves_above(a, b, g, h, near, moves):  # type: ignore[no-untyped-def]
    """Change of the moves above the cap."""
    after = moves + more_moves(a, b, g, h, near.new_ER)
    return max(after - near.most_moves, 0.0) - max(moves - near.most_moves, 0.0)


@njit(cache=True, nogil=True)
def _swap(a, b, g, h, nets, ranks, nodes, near, node_weight, held):  # type: ignore[no-untyped-def]
    """Swap expert a on rank g with b on rank h in all tables."""
    risk_EE = nets.risk_EE
    if len(near.new_ER):
        held.moves[0] += more_moves(a, b, g, h, near.new_ER)
    new_g, new_h = _risks_after(a, b, g, h, risk_EE, held.risk_ER, held.risk_R)
    held.risk_R[g], held.risk_R[h] = new_g, new_h
    for e in range(len(risk_EE)):
        shift = risk_EE[e, b] - risk_EE[e, a]
        held.risk_ER[e, g] += shift
        held.risk_ER[e, h] -= shift
    held.load_R[g] += nets.load_E[b] - nets.load_E[a]
    held.load_R[h] += nets.load_E[a] - nets.load_E[b]
    swap_parts(a, b, g, h, nets, ranks)
    if node_weight > 0:
        u, v = nodes.part_E[a], nodes.part_E[b]
        if u != v:
            swap_parts(a, b, u, v, nets, nodes)
