"""Gathering: swaps of slots that bring the experts of a token together, within limits on load and on what is fetched.

    min  sum_t ( d_t + w dn_t ) + p moves      d_t, dn_t = ranks and nodes that serve token t, w, p = prices
    s.t. load of every rank <= its limit,  experts fetched in all, by each rank and over nodes <= their limits

What changes places are *items*: the slots of a layer with what they hold. How many slots an expert has is given, and
which of them serves a token is drawn beforehand, as an engine's replica rule does without regard to the token's other
experts; so a layer with replicas is one without, and the tables of `search/nets` price a swap exactly.

Simulated annealing, then sweeps over pairs until none gains or a third more work is done. Load above a limit is priced,
dearer and dearer; moves above theirs too, by a price that finds its own height (`search/annealing`) and, late, by one
like that of load. Only arrangements within all limits are kept.

Shape letters: I items = S slots, R ranks, N nodes.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.rebalancing.seating import across_of, moves_of
from moeplace.placement.search.annealing import (
    COOLING_STEPS,
    FIRST_PULL,
    WALLED,
    accepts,
    next_pull,
    overload_change,
    random_below,
)
from moeplace.placement.search.nets import LayerNets, level_of, swap_gain, swap_parts
from moeplace.profiling.kernel_cache import njit

FORBIDDEN = -1
"""In a table of codes: the item must not go to that rank."""
COLD = 0.03
"""Last temperature as a share of the first."""
SWEEPS = 6
"""Most sweeps over all pairs at the end."""
SWEPT = 1.0 / 3.0
"""Most pairs tried in them, as a share of the proposals before."""


class Bounds(NamedTuple):
    """What an arrangement may cost.

    Attributes:
        limit_R: (R,) float64 most load of each rank.
        code_IR: (I, R) int32 code of the move (`rebalancing/seating`) that brings an item to a rank, or FORBIDDEN.
        moves: most experts fetched.
        per_rank: most of them by one rank.
        across: most of them that are new to their node.
    """

    limit_R: np.ndarray
    code_IR: np.ndarray
    moves: int
    per_rank: int
    across: int


class Search(NamedTuple):
    """How to anneal.

    Attributes:
        hot: first temperature, as a share of the mean item's tokens; 0 = sweeps only.
        proposals: at each temperature.
        node_weight: price of a node beside a rank.
        move_price: price of a move, in ranks of one token.
        state: (1,) uint64 generator state.
    """

    hot: float
    proposals: int
    node_weight: float
    move_price: float
    state: np.ndarray


class _Done(NamedTuple):
    """Load of each rank (R,), experts that it fetched (R,), sum of the codes of all moves (1,)."""

    load_R: np.ndarray
    fetched_R: np.ndarray
    code: np.ndarray


def gather(nets: LayerNets, rank_I: np.ndarray, node_R: np.ndarray, bounds: Bounds, search: Search) -> bool:
    """Improve `rank_I` (int64) in place; whether it is within all bounds, which at the beginning it need not be."""
    ranks = level_of(nets, rank_I, len(node_R))
    two_levels = search.node_weight > 0 and node_R[-1] > 0
    nodes = level_of(nets, node_R[rank_I], int(node_R[-1]) + 1) if two_levels else ranks
    weight = float(search.node_weight) if two_levels else 0.0
    return bool(_gather(nets, ranks, nodes, bounds, search._replace(node_weight=weight)))


@njit(cache=True, nogil=True)
def _gather(nets, ranks, nodes, bounds, search):  # type: ignore[no-untyped-def]
    rank_I, node_I, load_I = ranks.part_E, nodes.part_E, nets.load_E
    limit_R, code_IR, state, weight = bounds.limit_R, bounds.code_IR, search.state, search.node_weight
    done, items = _begin(rank_I, load_I, bounds), len(rank_I)
    load_R = done.load_R
    mean = load_I.sum() / items
    cost, best_cost, best_I = search.move_price * moves_of(done.code[0]), np.inf, rank_I.copy()
    if _within(done, bounds):
        best_cost = cost
    pull, pull_across = 0.0, 0.0
    if bounds.moves < items:
        pull = FIRST_PULL * search.hot * mean
    if bounds.across < items:
        pull_across = FIRST_PULL * search.hot * mean
    for step in range(COOLING_STEPS if search.hot > 0 else 0):
        late = step / (COOLING_STEPS - 1.0)
        temperature = search.hot * mean * COLD**late
        price = (1.0 + weight) * 2.0 * 3.0**late  # of a token above the limit
        pull = next_pull(pull, moves_of(done.code[0]), bounds.moves)
        pull_across = next_pull(pull_across, across_of(done.code[0]), bounds.across)
        wall = price * mean if late > WALLED else 0.0
        for _ in range(search.proposals):
            a, b = random_below(state, items), random_below(state, items)
            g, h = rank_I[a], rank_I[b]
            if g == h or code_IR[a, h] < 0 or code_IR[b, g] < 0:
                continue
            delta = float(swap_gain(a, b, g, h, ranks))
            if weight > 0 and node_I[a] != node_I[b]:
                delta += weight * swap_gain(a, b, node_I[a], node_I[b], nodes)
            paid = price * overload_change(load_R, limit_R, g, h, load_I[a] - load_I[b])
            code = code_IR[a, h] - code_IR[a, g] + code_IR[b, g] - code_IR[b, h]
            delta += search.move_price * moves_of(code)
            paid += pull * moves_of(code) + pull_across * across_of(code)
            if wall > 0.0:
                paid += wall * _more_excess(a, b, g, h, code, done, bounds)
            if not accepts(delta + paid, temperature, state):
                continue
            _swap(a, b, g, h, nets, ranks, nodes, weight, done, bounds)
            cost += delta
            if cost < best_cost and _within(done, bounds):
                best_cost = cost
                best_I[:] = rank_I
    cost = _sweep(cost, nets, ranks, nodes, bounds, search, done)
    if _within(done, bounds) and cost < best_cost:
        return True
    rank_I[:] = best_I
    return best_cost < np.inf


@njit(cache=True, nogil=True)
def _sweep(cost, nets, ranks, nodes, bounds, search, done):  # type: ignore[no-untyped-def]
    """Swap every pair that gains, excess before overload before cost, until none does; returns the cost."""
    rank_I, node_I, load_I = ranks.part_E, nodes.part_E, nets.load_E
    code_IR, weight, items = bounds.code_IR, search.node_weight, len(nets.load_E)
    price = 1e3 * (1.0 + weight)
    wall = 1e3 * price * load_I.sum()
    left, first = int(SWEPT * COOLING_STEPS * search.proposals), random_below(search.state, items)
    for _ in range(SWEEPS):
        gained = False
        for number in range(items):
            a = (first + number) % items
            if left <= 0:
                return cost
            left -= a
            for b in range(a):
                g, h = rank_I[a], rank_I[b]
                if g == h or code_IR[a, h] < 0 or code_IR[b, g] < 0:
                    continue
                delta = float(swap_gain(a, b, g, h, ranks))  # as above: a function for both costs 3 times the time
                if weight > 0 and node_I[a] != node_I[b]:
                    delta += weight * swap_gain(a, b, node_I[a], node_I[b], nodes)
                over = overload_change(done.load_R, bounds.limit_R, g, h, load_I[a] - load_I[b])
                code = code_IR[a, h] - code_IR[a, g] + code_IR[b, g] - code_IR[b, h]
                delta += search.move_price * moves_of(code)
                if delta + price * over >= -1e-9 * load_I.sum() and code >= 0:
                    continue
                if delta + price * over + wall * _more_excess(a, b, g, h, code, done, bounds) < -1e-9 * load_I.sum():
                    _swap(a, b, g, h, nets, ranks, nodes, weight, done, bounds)
                    cost += delta
                    gained = True
        if not gained:
            break
    return cost


@njit(cache=True, nogil=True)
def _begin(rank_I, load_I, bounds):  # type: ignore[no-untyped-def]
    ranks = len(bounds.limit_R)
    done = _Done(np.zeros(ranks), np.zeros(ranks, np.int64), np.zeros(1, np.int64))
    for i in range(len(rank_I)):
        r = rank_I[i]
        done.load_R[r] += load_I[i]
        done.code[0] += bounds.code_IR[i, r]
        done.fetched_R[r] += bounds.code_IR[i, r] != 0
    return done


@njit(cache=True, nogil=True)
def _within(done, bounds):  # type: ignore[no-untyped-def]
    if moves_of(done.code[0]) > bounds.moves or across_of(done.code[0]) > bounds.across:
        return False
    for r in range(len(done.load_R)):
        if done.load_R[r] > bounds.limit_R[r] or done.fetched_R[r] > bounds.per_rank:
            return False
    return True


@njit(cache=True, nogil=True, inline="always")
def _above(value, limit):  # type: ignore[no-untyped-def]
    return max(value - limit, 0)


@njit(cache=True, nogil=True)
def _more_excess(a, b, g, h, code, done, bounds):  # type: ignore[no-untyped-def]
    """Change of the moves above their limits."""
    moves, across, code_IR = moves_of(done.code[0]), across_of(done.code[0]), bounds.code_IR
    more = _above(moves + moves_of(code), bounds.moves) - _above(moves, bounds.moves)
    more += _above(across + across_of(code), bounds.across) - _above(across, bounds.across)
    at_g, at_h = done.fetched_R[g], done.fetched_R[h]
    new_g = at_g + (code_IR[b, g] != 0) - (code_IR[a, g] != 0)
    new_h = at_h + (code_IR[a, h] != 0) - (code_IR[b, h] != 0)
    more += _above(new_g, bounds.per_rank) - _above(at_g, bounds.per_rank)
    return more + _above(new_h, bounds.per_rank) - _above(at_h, bounds.per_rank)


@njit(cache=True, nogil=True)
def _swap(a, b, g, h, nets, ranks, nodes, weight, done, bounds):  # type: ignore[no-untyped-def]
    """Item a of rank g and b of rank h change places, in all tables."""
    code_IR, shift = bounds.code_IR, nets.load_E[a] - nets.load_E[b]
    done.load_R[g] -= shift
    done.load_R[h] += shift
    done.code[0] += code_IR[a, h] - code_IR[a, g] + code_IR[b, g] - code_IR[b, h]
    done.fetched_R[g] += np.int64(code_IR[b, g] != 0) - np.int64(code_IR[a, g] != 0)
    done.fetched_R[h] += np.int64(code_IR[a, h] != 0) - np.int64(code_IR[b, h] != 0)
    swap_parts(a, b, g, h, nets, ranks)
    if weight > 0:
        u, v = nodes.part_E[a], nodes.part_E[b]
        if u != v:
            swap_parts(a, b, u, v, nets, nodes)
