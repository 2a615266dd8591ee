"""Replicas for the dispatch objective, one layer at a time, under the replica choice that the runtime uses.

A token's cost is what `rule` makes of it: the ranks of its single-slot experts, plus the ranks opened for replicated
experts that none of those holds. A move (see `seats`) is evaluated exactly on the tokens of the experts it touches.

Shape letters: T tokens, E experts, K top-k, R ranks, S slots.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.search.annealing import next_random
from moeplace.placement.search.nets import LayerNets
from moeplace.placement.search.swaps import Near
from moeplace.placement.solvers.replicas.rule import Rule, Served, replay, serve
from moeplace.placement.solvers.replicas.seats import (
    Seats,
    all_risks,
    changed_bias,
    changed_risk,
    count_moves,
    further_moves,
    make_move,
    propose,
    take_back,
)
from moeplace.profiling.kernel_cache import njit

FINAL_SHARE = 0.15
"""Share of the work that only improves."""
FINAL_PRICE = 20.0
"""Price of a token above a limit at the end, in ranks: the limits are kept before traffic is."""


class Schedule(NamedTuple):
    """How a search cools, and what it keeps.

    Attributes:
        hot, end: first and last temperature in tokens; hot = 0 is descent only.
        work: to do, in tokens evaluated (exact search) or moves evaluated (search on bits).
        min_replicas: replicas that every expert keeps.
        min_nodes: nodes that every expert keeps a replica on, if it starts on so many.
    """

    hot: float
    end: float
    work: float
    min_replicas: int = 1
    min_nodes: int = 1


@njit(cache=True, nogil=True, inline="always")
def _is_of(a, t, ids_TK):  # type: ignore[no-untyped-def]
    found = False
    for k in range(ids_TK.shape[1]):
        found |= ids_TK[t, k] == a
    return found


@njit(cache=True, nogil=True)
def _change(move, nets, rule, holders, cost_T):  # type: ignore[no-untyped-def]
    """Change of cost over the tokens of the experts that moved."""
    asked_TX, node_R, place_PR, weight, mark_X = rule
    rank_EH, count_E, held_ER = holders
    first_E, token_of, rank_K, delta = nets.first_E, nets.token_of, np.empty(nets.ids_TK.shape[1], np.int64), 0.0
    for part in range(2):
        e = move.a if part == 0 else move.b
        if e < 0:
            break
        for i in range(first_E[e], first_E[e + 1]):
            t = token_of[i]
            if part == 0 or not _is_of(move.a, t, nets.ids_TK):
                cost = serve(t, asked_TX, node_R, place_PR, weight, mark_X, count_E, rank_EH, held_ER, rank_K)
                delta += cost - cost_T[t]
    return delta


@njit(cache=True, nogil=True)
def _serve_again(move, nets, rule, holders, served, load_R, commit):  # type: ignore[no-untyped-def]
    """The tokens of the experts that moved: their loads change in `load_R`, costs and ranks only if `commit`."""
    asked_TX, node_R, place_PR, weight, mark_X = rule
    rank_EH, count_E, held_ER = holders
    first_E, token_of, rank_TK, rank_K = (
        nets.first_E,
        nets.token_of,
        served.rank_TK,
        np.empty(nets.ids_TK.shape[1], np.int64),
    )
    for part in range(2):
        e = move.a if part == 0 else move.b
        if e < 0:
            break
        for i in range(first_E[e], first_E[e + 1]):
            t = token_of[i]
            if part == 1 and _is_of(move.a, t, nets.ids_TK):
                continue
            cost = serve(t, asked_TX, node_R, place_PR, weight, mark_X, count_E, rank_EH, held_ER, rank_K)
            for k in range(len(rank_K)):
                if rank_K[k] != rank_TK[t, k]:
                    load_R[rank_TK[t, k]] -= 1.0
                    load_R[rank_K[k]] += 1.0
                    if commit:
                        rank_TK[t, k] = rank_K[k]
            if commit:
                served.cost_T[t] = cost


@njit(cache=True, nogil=True)
def _nodes_of(e, holders, node_R):  # type: ignore[no-untyped-def]
    """Number of nodes that hold expert e; 0 for none."""
    nodes = 0
    for i in range(holders.count_E[e] if e >= 0 else 0):
        first = True
        for j in range(i):
            first &= node_R[holders.rank_EH[e, j]] != node_R[holders.rank_EH[e, i]]
        nodes += first
    return nodes


@njit(cache=True, nogil=True)
def _make_if_spread(move, seats, node_R, min_nodes):  # type: ignore[no-untyped-def]
    """Carry the move out unless it takes an expert from one of the nodes it must be on; returns whether it did."""
    if min_nodes <= 1:
        make_move(move, seats)
        return True
    was_a, was_b = _nodes_of(move.a, seats.holders, node_R), _nodes_of(move.b, seats.holders, node_R)
    make_move(move, seats)
    now_a, now_b = _nodes_of(move.a, seats.holders, node_R), _nodes_of(move.b, seats.holders, node_R)
    if (now_a < was_a and now_a < min_nodes) or (now_b < was_b and now_b < min_nodes):
        take_back(move, seats)
        return False
    return True


@njit(cache=True, nogil=True, inline="always")
def overload(load_R, limit_R):  # type: ignore[no-untyped-def]
    """Load above the limits over all ranks."""
    total = 0.0
    for r in range(len(load_R)):
        total += max(load_R[r] - limit_R[r], 0.0)
    return total


@njit(cache=True, nogil=True)
def anneal_replicas(  # type: ignore[no-untyped-def]
    nets: LayerNets, rule: Rule, seats: Seats, served: Served, limit_R, schedule: Schedule, near: Near, stop, state
):
    """Improve the seats in place by exact moves; returns (best cost, or with a price on overload; tokens touched).

    One function, because its loop lives on a dozen scalars; what it calls is above and in `seats` and `rule`.

    Args:
        nets: the layer's k-sets and hedge.
        rule: the same tokens.
        seats: where experts are; `slots_S` is changed in place, the other tables are left anyhow.
        served: tables for the replay, written.
        limit_R: (R,) most load of each rank.
        schedule: temperatures, work, and what is kept.
        near: ties to ranks; no move leads above their cap on moves.
        stop: (1,) uint8, set from outside when time is up.
        state: (1,) uint64.
    """
    load_R, slots_S, rank_S, (_, count_E, held_ER) = served.load_R, seats.slots_S, seats.rank_S, seats.holders
    trial_R, risk_R, new_risk_R = np.zeros_like(load_R), np.zeros_like(load_R), np.zeros_like(load_R)
    cost = replay(rule, seats.holders, served) + all_risks(seats, nets.risk_EE, risk_R)
    best_S, best_cost, room_R = slots_S.copy(), np.inf, limit_R - load_R
    over = overload(load_R, limit_R)
    if over <= 0.0:
        best_cost = cost
    moves, tied = count_moves(slots_S, rank_S, near.new_ER), len(near.new_ER) > 0
    done, more = 0, 0
    while done < schedule.work and not stop[0]:
        share = done / schedule.work
        cooled = share / (1.0 - FINAL_SHARE)
        last = schedule.hot <= 0 or share > 1.0 - FINAL_SHARE
        temperature = 0.0 if last else schedule.hot * (schedule.end / schedule.hot) ** cooled
        price = (1.0 + rule.node_weight) * (FINAL_PRICE if last else 2.0 * 3.0**cooled)
        done += 1
        move = propose(slots_S, rank_S, count_E, held_ER, seats.num_real, schedule.min_replicas, room_R, over, state)
        if move.x < 0 or not _make_if_spread(move, seats, rule.node_R, schedule.min_nodes):
            continue
        if tied:
            more = further_moves(move, near.new_ER)
            if more > 0 and moves + more > near.most_moves:
                take_back(move, seats)
                continue
        work = nets.first_E[move.a + 1] - nets.first_E[move.a]
        if move.b >= 0:
            work += nets.first_E[move.b + 1] - nets.first_E[move.b]
        done += work
        delta = _change(move, nets, rule, seats.holders, served.cost_T)
        delta += changed_risk(move, seats, nets.risk_EE, risk_R, new_risk_R)
        if tied:
            delta += changed_bias(move, near.bias_ER)
        draw = max(float(next_random(state) >> np.uint64(11)) * (1.0 / 9007199254740992.0), 1e-12)
        allowed = -temperature * np.log(draw) if temperature > 0 else -1e-9
        take, new_over = delta <= allowed + price * over, 0.0  # even if it ended all overload
        if take:
            trial_R[:] = load_R
            _serve_again(move, nets, rule, seats.holders, served, trial_R, False)
            done += work
            new_over = overload(trial_R, limit_R)
            take = delta + price * (new_over - over) <= allowed and not (last and over <= 0.0 and new_over > 0.0)
        if not take:
            take_back(move, seats)
            continue
        _serve_again(move, nets, rule, seats.holders, served, load_R, True)
        over = new_over
        moves += more
        room_R[:] = limit_R - load_R
        cost += delta
        risk_R[:] = new_risk_R
        if over <= 0.0 and cost < best_cost:
            best_cost = cost
            best_S[:] = slots_S
    if best_cost < np.inf:
        slots_S[:] = best_S
        return best_cost, done
    return cost + FINAL_PRICE * (1.0 + rule.node_weight) * over, done
