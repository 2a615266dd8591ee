""" "connectivity": the exact dispatch objective, one layer at a time.

    min  sum_t ( d_t + w dn_t )      d_t, dn_t = ranks and nodes that hold an expert of token t's k-set
    s.t. C_r experts on rank r,  load of rank r <= cap of the layer

which is hypergraph connectivity with k-sets as nets. Search: simulated annealing over swaps of two experts, with load
above the cap priced rather than forbidden until the end, because swaps of equal load hardly exist under a cap of 1 %.

Swapping expert a on part g with b on part h changes sum d by

    - G(a) - G(b) + N(a, h) + N(b, g) + B(a, b) + B(b, a)

    G(e)    tokens of e in which e is alone on its part
    N(e, p) tokens of e with no expert on part p
    B(a, b) tokens of a and b in which a is alone on its part

so a proposal costs a few table look-ups; only an accepted swap touches tokens. The tables are kept per level (ranks,
and nodes where there are several). An empty slot is an expert without tokens.

Shape letters: T tokens, E experts, K top-k, R ranks, N nodes, S slots.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from moeplace.placement.search.annealing import (
    COOLING_STEPS,
    accepts,
    overload_change,
    random_below,
)


class LayerNets(NamedTuple):
    """k-sets of one layer.

    Attributes:
        ids_TK: (T, K) int32 expert ids, -1 = none.
        first_E: (S + 1,) int64, where each expert's tokens start in `token_of`.
        token_of: (assignments,) int32 tokens, grouped by expert.
        load_E: (S,) float64 assignments of each expert; entries beyond the layer's experts are empty slots.
        risk_EE: (S, S) float64 hedge: the sum over pairs of experts on one rank is added to the objective.
    """

    ids_TK: np.ndarray
    first_E: np.ndarray
    token_of: np.ndarray
    load_E: np.ndarray
    risk_EE: np.ndarray


def layer_nets(ids_TK: np.ndarray, num_slots: int, risk_EE: np.ndarray | None = None) -> LayerNets:
    """The nets of a layer from its (T, K) expert ids, -1 = none."""
    risk_EE = np.zeros((num_slots, num_slots)) if risk_EE is None else risk_EE
    ids_TK = np.ascontiguousarray(ids_TK, dtype=np.int16)
    token, slot = np.nonzero(ids_TK >= 0)
    expert = ids_TK[token, slot]
    order = np.argsort(expert, kind="stable")
    load_E = np.bincount(expert, minlength=num_slots)
    first_E = np.concatenate([[0], np.cumsum(load_E)]).astype(np.int64)
    return LayerNets(ids_TK, first_E, token[order].astype(np.int32), load_E.astype(np.float64), risk_EE)


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
) -> float:
    """Improve `rank_E` in place; returns sum over tokens of d + node_weight * dn.

    Args:
        nets: the layer's k-sets.
        rank_E: (S,) int64 rank of every expert and empty slot.
        node_R: (R,) node of each rank.
        limit_R: (R,) most load of each rank.
        node_weight: price of a node beside a rank.
        sweeps: proposals per pair of experts and temperature.
        hot: first temperature, as a share of the mean expert's load; 0 = descent only.
        stop: (1,) uint8, set from outside when time is up.
        state: (1,) uint64 generator state.
    """
    parts = [(rank_E, len(node_R), 1.0)]
    if node_weight > 0 and node_R[-1] > 0:
        parts.append((node_R[rank_E], int(node_R[-1]) + 1, node_weight))
    levels = [_tables(nets, part_E, size) for part_E, size, _ in parts]
    second = levels[-1]
    first = levels[0]
    node_E = parts[-1][0] if len(parts) > 1 else np.zeros_like(rank_E)
    return float(
        _anneal(
            nets.ids_TK, nets.first_E, nets.token_of, nets.load_E, nets.risk_EE, rank_E, node_E, node_R, limit_R,
            *first, *second, node_weight if len(parts) > 1 else 0.0, sweeps, hot, stop, state,
        )
    )  # fmt: skip


def connectivity(nets: LayerNets, rank_E: np.ndarray, node_R: np.ndarray, node_weight: float) -> float:
    """sum over tokens of d + node_weight * dn, without replicas."""
    total = 0.0
    for part_E, size, weight in ((rank_E, len(node_R), 1.0), (node_R[rank_E], int(node_R[-1]) + 1, node_weight)):
        if weight:
            total += weight * float((_tables(nets, part_E, size)[0] > 0).sum())
    return total


def _tables(nets: LayerNets, part_E: np.ndarray, num_parts: int) -> tuple[np.ndarray, ...]:
    """(count_TP uint8, G (S,), N (S, P), B (S, S)) of one level."""
    tokens, slots = len(nets.ids_TK), len(part_E)
    count_TP = np.zeros((tokens, num_parts), np.uint8)
    alone_E, absent_EP = np.zeros(slots, np.int32), np.zeros((slots, num_parts), np.int32)
    beside_EE = np.zeros((slots, slots), np.int32)
    _fill_tables(nets.ids_TK, part_E, count_TP, alone_E, absent_EP, beside_EE)
    return count_TP, alone_E, absent_EP, beside_EE


@njit(cache=True, nogil=True)
def _fill_tables(ids_TK, part_E, count_TP, alone_E, absent_EP, beside_EE):  # type: ignore[no-untyped-def]
    top_k, num_parts = ids_TK.shape[1], count_TP.shape[1]
    for t in range(len(ids_TK)):
        for k in range(top_k):
            if ids_TK[t, k] >= 0:
                count_TP[t, part_E[ids_TK[t, k]]] += 1
        for k in range(top_k):
            e = ids_TK[t, k]
            if e < 0:
                continue
            for p in range(num_parts):
                if count_TP[t, p] == 0:
                    absent_EP[e, p] += 1
            if count_TP[t, part_E[e]] == 1:
                alone_E[e] += 1
                for j in range(top_k):
                    if ids_TK[t, j] >= 0:
                        beside_EE[e, ids_TK[t, j]] += 1


@njit(cache=True, nogil=True)
def _move(a, g, h, ids_TK, first_E, token_of, part_E, count_TP, alone_E, absent_EP, beside_EE):  # type: ignore[no-untyped-def]
    """Move expert `a` from part g to part h in the tables of one level."""
    top_k = ids_TK.shape[1]
    for i in range(first_E[a], first_E[a + 1]):
        t = token_of[i]
        count_TP[t, g] -= 1
        left = count_TP[t, g]
        if left == 0:  # a was alone on g
            alone_E[a] -= 1
            for k in range(top_k):
                e = ids_TK[t, k]
                if e >= 0:
                    absent_EP[e, g] += 1
                    beside_EE[a, e] -= 1
        elif left == 1:  # another expert is alone on g now
            f = -1
            for k in range(top_k):
                e = ids_TK[t, k]
                if e >= 0 and e != a and part_E[e] == g:
                    f = e
            alone_E[f] += 1
            for k in range(top_k):
                if ids_TK[t, k] >= 0:
                    beside_EE[f, ids_TK[t, k]] += 1
        there = count_TP[t, h]
        count_TP[t, h] += 1
        if there == 0:
            alone_E[a] += 1
            for k in range(top_k):
                e = ids_TK[t, k]
                if e >= 0:
                    absent_EP[e, h] -= 1
                    beside_EE[a, e] += 1
        elif there == 1:
            f = -1
            for k in range(top_k):
                e = ids_TK[t, k]
                if e >= 0 and e != a and part_E[e] == h:
                    f = e
            alone_E[f] -= 1
            for k in range(top_k):
                if ids_TK[t, k] >= 0:
                    beside_EE[f, ids_TK[t, k]] -= 1
    part_E[a] = h


@njit(cache=True, nogil=True, inline="always")
def _swap_gain(a, b, g, h, alone_E, absent_EP, beside_EE):  # type: ignore[no-untyped-def]
    return absent_EP[a, h] + absent_EP[b, g] - alone_E[a] - alone_E[b] + beside_EE[a, b] + beside_EE[b, a]


@njit(cache=True, nogil=True)
def _anneal(  # type: ignore[no-untyped-def]
    ids_TK, first_E, token_of, load_E, risk_EE, rank_E, node_E, node_R, limit_R,
    count_TR, alone_E, absent_ER, beside_EE, count_TN, node_alone_E, absent_EN, node_beside_EE,
    node_weight, sweeps, hot, stop, state,
):  # fmt: skip
    slots, num_ranks = len(rank_E), len(node_R)
    load_R = np.zeros(num_ranks)
    for e in range(slots):
        load_R[rank_E[e]] += load_E[e]
    risk_ER = np.zeros((slots, num_ranks))  # risk of each expert with the members of each rank
    for e in range(slots):
        for f in range(slots):
            risk_ER[e, rank_E[f]] += risk_EE[e, f]
    risk_R = np.zeros(num_ranks)
    for e in range(slots):
        risk_R[rank_E[e]] += risk_ER[e, rank_E[e]]
    cost = float((count_TR > 0).sum())
    if node_weight > 0:
        cost += node_weight * (count_TN > 0).sum()
    mean_load = load_E.sum() / slots
    best_cost, best_rank_E, have_best = np.inf, rank_E.copy(), False
    pairs = slots * (slots - 1) // 2
    steps = COOLING_STEPS if hot > 0 else 0
    for step in range(steps + 1):
        last = step == steps
        temperature = 0.0 if last else hot * mean_load * (0.03 ** (step / (steps - 1.0)))
        # Price of a token above the cap: lenient while hot, prohibitive at the end.
        price = 1e6 if last else (1.0 + node_weight) * 2.0 * (3.0 ** (step / (steps - 1.0)))
        quiet = 0
        proposals = pairs * 40 if last else int(pairs * sweeps * 0.1) + 1
        for _ in range(proposals):
            if stop[0]:
                break
            a, b = random_below(state, slots), random_below(state, slots)
            g, h = rank_E[a], rank_E[b]
            if g == h:
                continue
            delta = float(_swap_gain(a, b, g, h, alone_E, absent_ER, beside_EE))
            if node_weight > 0 and node_E[a] != node_E[b]:
                delta += node_weight * _swap_gain(a, b, node_E[a], node_E[b], node_alone_E, absent_EN, node_beside_EE)
            # Variance of g and h after the swap.
            pair = risk_EE[a, a] + risk_EE[b, b] - 2.0 * risk_EE[a, b]
            new_g = risk_R[g] + 2.0 * (risk_ER[b, g] - risk_ER[a, g]) + pair
            new_h = risk_R[h] + 2.0 * (risk_ER[a, h] - risk_ER[b, h]) + pair
            delta += new_g**2 + new_h**2 - risk_R[g] ** 2 - risk_R[h] ** 2
            over = overload_change(load_R, limit_R, g, h, load_E[a] - load_E[b])
            if last and delta + price * over >= 0.0:
                quiet += 1
                if quiet > 6 * pairs:
                    break
                continue
            if not accepts(delta + price * over, temperature, state):
                continue
            quiet = 0
            _move(a, g, h, ids_TK, first_E, token_of, rank_E, count_TR, alone_E, absent_ER, beside_EE)
            _move(b, h, g, ids_TK, first_E, token_of, rank_E, count_TR, alone_E, absent_ER, beside_EE)
            if node_weight > 0 and node_E[a] != node_E[b]:
                u, v = node_E[a], node_E[b]
                _move(a, u, v, ids_TK, first_E, token_of, node_E, count_TN, node_alone_E, absent_EN, node_beside_EE)
                _move(b, v, u, ids_TK, first_E, token_of, node_E, count_TN, node_alone_E, absent_EN, node_beside_EE)
            risk_R[g], risk_R[h] = new_g, new_h
            for e in range(slots):
                shift = risk_EE[e, b] - risk_EE[e, a]
                risk_ER[e, g] += shift
                risk_ER[e, h] -= shift
            load_R[g] += load_E[b] - load_E[a]
            load_R[h] += load_E[a] - load_E[b]
            cost += delta
            if cost < best_cost and (load_R <= limit_R + 1e-9).all():
                best_cost, have_best = cost, True
                best_rank_E[:] = rank_E
    if have_best:
        rank_E[:] = best_rank_E
        return best_cost
    return cost


def descend_within(
    nets: LayerNets,
    rank_E: np.ndarray,
    node_R: np.ndarray,
    limit_R: np.ndarray,
    *,
    node_weight: float,
    max_swaps: int,
) -> None:
    """At most `max_swaps` swaps in place, each the one that lowers traffic plus the price of overload the most.

    Overload comes first (its price is prohibitive), so that a cap broken by drift is mended before traffic is.
    """
    slots = len(rank_E)
    for _ in range(max_swaps):
        gain = _all_swap_gains(nets, rank_E, len(node_R)).astype(np.float64)
        if node_weight > 0:
            node_E = node_R[rank_E]
            gain += node_weight * _all_swap_gains(nets, node_E, int(node_R[-1]) + 1)
        load_R = np.bincount(rank_E, nets.load_E, minlength=len(node_R))
        shift = nets.load_E[:, None] - nets.load_E[None, :]
        source, target = rank_E[:, None], rank_E[None, :]
        with np.errstate(invalid="ignore"):
            over = (
                np.maximum(load_R[source] - shift - limit_R[source], 0)
                + np.maximum(load_R[target] + shift - limit_R[target], 0)
                - np.maximum(load_R[source] - limit_R[source], 0)
                - np.maximum(load_R[target] - limit_R[target], 0)
            )
        total = gain + 1e3 * np.nan_to_num(over)
        total[source == target] = 0.0
        a, b = np.unravel_index(int(total.argmin()), (slots, slots))
        if total[a, b] >= -1e-9:
            return
        rank_E[a], rank_E[b] = rank_E[b], rank_E[a]


def _all_swap_gains(nets: LayerNets, part_E: np.ndarray, num_parts: int) -> np.ndarray:
    """(S, S) change of sum d by swapping a and b, 0 where they share a part."""
    _, alone_E, absent_EP, beside_EE = _tables(nets, part_E, num_parts)
    to_part = absent_EP[:, part_E]
    gain = to_part + to_part.T - alone_E[:, None] - alone_E[None, :] + beside_EE + beside_EE.T
    gain[part_E[:, None] == part_E[None, :]] = 0
    return gain
