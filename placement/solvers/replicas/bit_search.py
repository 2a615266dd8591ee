"""Replicas for the dispatch objective, many moves a second: annealing on the bit rows of `token_bits`.

A move (see `seats`) costs a few passes over words, and a bound dismisses most moves before that. Counts are exact but
for tokens that could merge twice, so a search ends with `exact_search.anneal_replicas`, which is exact.

Shape letters: T tokens, E experts, R ranks, N nodes, S slots, W words of 64 tokens.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.search.annealing import (
    COOLING_STEPS,
    FIRST_PULL,
    WALLED,
    next_pull,
    next_random,
    random_below,
)
from moeplace.placement.search.swaps import Near
from moeplace.placement.solvers.replicas.bit_loads import bits_loads
from moeplace.placement.solvers.replicas.exact_search import FINAL_SHARE, Schedule, overload
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
from moeplace.placement.solvers.replicas.token_bits import (
    BitState,
    TokenBits,
    bits_traffic,
    count_alone,
    count_open,
    mark_node,
    mark_rank,
)
from moeplace.profiling.kernel_cache import njit

FINAL_PRICE = 50.0
"""Price of a token above a limit at the end, in ranks; higher than in the exact search, because counts are not."""
ABOVE = 1e6
"""Price of a move above their cap at the end, in mean experts above their limits."""
DISMISSED = 0.03
"""Work of a move that a bound dismisses, in evaluations (measured: 64 experts, 40,000 tokens, 72 slots)."""
LEAST_SHARE = 0.15
"""Share of an expert's tokens that its first slot gets at least when its second one goes."""
SLACK = 0.05
"""Share of two experts' load that replicated ones may shift when the two change places."""


class _Rooms(NamedTuple):
    """Room for counting, and lists of what a trial rewrote."""

    once_W: np.ndarray
    twice_W: np.ndarray
    ranks: np.ndarray
    nodes: np.ndarray
    sizes: np.ndarray


@njit(cache=True, nogil=True)
def _newly(a, b, h, slots_S, start_R, together_EE):  # type: ignore[no-untyped-def]
    """At least so many tokens of expert a have no expert on rank h once b has left it (union bound)."""
    absent = together_EE[a, a]
    for s in range(start_R[h], start_R[h + 1]):
        f = slots_S[s]
        if f >= 0 and f != b and f != a:
            absent -= together_EE[a, f]
    return max(absent, 0)


@njit(cache=True, nogil=True, inline="always")
def _least_repoint(move, size_E, alone_E, rank_EH, slots_S, start_R, together_EE, room_R, price):  # type: ignore[no-untyped-def]
    """What expert a, left with one slot, costs at least beside what expert b saves; all overload may end."""
    other = rank_EH[move.a, 0] if rank_EH[move.a, 1] == move.g else rank_EH[move.a, 1]
    newly = max(_newly(move.a, -1, other, slots_S, start_R, together_EE) - alone_E[move.a], 0)
    return newly + price * max(LEAST_SHARE * size_E[move.a] - room_R[other], 0.0)


@njit(cache=True, nogil=True, inline="always")
def _least_swap(move, size_E, count_E, alone_E, slots_S, start_R, together_EE, room_R, weight, price):  # type: ignore[no-untyped-def]
    """What a swap of slots x and y costs at least, beside what expert b saves."""
    a, b, g, h = move.a, move.b, move.g, move.h
    least = -(1.0 + weight) * alone_E[a]
    shift, slack = -size_E[a] / count_E[a], (SLACK if count_E[a] == 1 else 0.5) * size_E[a] / count_E[a]
    if count_E[a] == 1:
        least += _newly(a, b, h, slots_S, start_R, together_EE)
    if b >= 0:
        shift += size_E[b] / count_E[b]
        slack += (SLACK if count_E[b] == 1 else 0.5) * size_E[b] / count_E[b]
        if count_E[b] == 1:
            least += _newly(b, a, g, slots_S, start_R, together_EE)
    least += price * (max(shift - slack - room_R[g], 0.0) - max(-room_R[g], 0.0))
    return least + price * (max(-shift - slack - room_R[h], 0.0) - max(-room_R[h], 0.0))


@njit(cache=True, nogil=True, inline="always")
def _rewrite_rows(move, bits, seats, state, rooms):  # type: ignore[no-untyped-def]
    """Rows of the ranks (and their nodes) whose single-slot experts a move changed, in spare rows; see `_restore`."""
    ranks, nodes, count_E, held_ER = state.ranks, state.nodes, seats.holders.count_E, seats.holders.held_ER
    touched, node_R = rooms.ranks, state.node_R
    count, far = 0, 0
    if move.y < 0:  # a may have one slot now, b may have had one before
        for r in range(len(node_R)):
            left = count_E[move.a] == 1 and held_ER[move.a, r]
            if left or (count_E[move.b] == 2 and held_ER[move.b, r] and r != move.g):
                touched[count] = r
                count += 1
    elif count_E[move.a] == 1 or (move.b >= 0 and count_E[move.b] == 1):
        touched[0], touched[1] = move.g, move.h
        count = 2
    for i in range(count):
        r = touched[i]
        ranks.row_P[r], ranks.spare[i] = ranks.spare[i], ranks.row_P[r]
        mark_rank(r, bits, seats, ranks)
        if state.node_weight > 0 and (i == 0 or node_R[touched[0]] != node_R[r]):
            rooms.nodes[far] = node_R[r]
            far += 1
    for i in range(far):
        n = rooms.nodes[i]
        nodes.row_P[n], nodes.spare[i] = nodes.spare[i], nodes.row_P[n]
        mark_node(n, state)
    rooms.sizes[0], rooms.sizes[1] = count, far


@njit(cache=True, nogil=True, inline="always")
def _restore_rows(state, rooms):  # type: ignore[no-untyped-def]
    ranks, nodes = state.ranks, state.nodes
    for i in range(rooms.sizes[0]):
        r = rooms.ranks[i]
        ranks.row_P[r], ranks.spare[i] = ranks.spare[i], ranks.row_P[r]
    for i in range(rooms.sizes[1]):
        n = rooms.nodes[i]
        nodes.row_P[n], nodes.spare[i] = nodes.spare[i], nodes.row_P[n]


@njit(cache=True, nogil=True)
def _begin(bits, seats, state, alone_E, load_R):  # type: ignore[no-untyped-def]
    """Set all tables for the layout given; returns (traffic, rooms)."""
    for r in range(len(load_R)):
        mark_rank(r, bits, seats, state.ranks)
    if state.node_weight > 0:
        for n in range(len(state.node_start_N) - 1):
            mark_node(n, state)
    cost = bits_traffic(bits, seats, state)
    bits_loads(bits, seats, state, load_R)
    words = bits.tokens_EW.shape[1]
    rooms = _Rooms(
        np.zeros(words, np.uint64), np.zeros(words, np.uint64),
        np.empty(len(load_R), np.int64), np.empty(len(load_R), np.int64), np.zeros(2, np.int64),
    )  # fmt: skip
    for r in range(len(load_R)):
        count_alone(r, bits, seats, rooms.once_W, rooms.twice_W, alone_E)
    count_open(state, alone_E)
    return cost, rooms


@njit(cache=True, nogil=True)
def anneal_bits(  # type: ignore[no-untyped-def]
    bits: TokenBits, seats: Seats, state: BitState, limit_R, risk_EE, schedule: Schedule, near: Near, stop, random
):
    """Improve the seats in place; returns (best cost with hedge and bias, or with overload priced; loads).

    One function, because its loop lives on a dozen scalars; what it calls is above and in `seats` and `token_bits`.

    Args:
        bits: the tokens.
        seats: where experts are; `slots_S` is changed in place, the other tables are left anyhow.
        state: tables for the layout, written.
        limit_R: (R,) most load of each rank.
        risk_EE: hedge, see `search.hedge`; a replicated expert counts with its share on each rank.
        schedule: temperatures and work, in moves that are evaluated; one that a bound dismisses counts DISMISSED.
        near: ties to ranks. Seats within the cap on moves end within it.
        stop: (1,) uint8, set from outside when time is up.
        random: (1,) uint64 state.
    """
    weight, (rank_EH, count_E, held_ER), alone_E = state.node_weight, seats.holders, np.zeros_like(bits.size_E)
    slots_S, rank_S, start_R, size_E, together_EE = seats[0], seats[1], seats[2], bits.size_E, bits.together_EE
    load_R, trial_R = np.zeros(len(limit_R)), np.zeros(len(limit_R))
    risk_R, new_risk_R = np.zeros(len(limit_R)), np.zeros(len(limit_R))
    cost, rooms = _begin(bits, seats, state, alone_E, load_R)
    room_R = limit_R - load_R
    hedged, risk = risk_EE.any(), 0.0
    if hedged:
        risk = all_risks(seats, risk_EE, risk_R)
    over = overload(load_R, limit_R)
    best_S, best_cost, best_R = slots_S.copy(), np.inf, load_R.copy()
    moves, tied, bias, more = count_moves(slots_S, rank_S, near.new_ER), len(near.new_ER) > 0, 0.0, 0
    if over <= 0.0 and moves <= near.most_moves:
        best_cost = cost + risk
    pull, tempered = FIRST_PULL * schedule.hot if tied and near.most_moves < len(slots_S) else 0.0, 0.0
    done = 0.0
    while done < schedule.work and not stop[0]:
        share = done / schedule.work
        last = schedule.hot <= 0 or share > 1.0 - FINAL_SHARE
        cooled = share / (1.0 - FINAL_SHARE)
        price = (1.0 + weight) * (FINAL_PRICE if last else 2.0 * 3.0**cooled)
        while tempered < cooled * COOLING_STEPS:
            pull = next_pull(pull, moves, near.most_moves)
            tempered += 1.0
        done += DISMISSED
        move = propose(slots_S, rank_S, count_E, held_ER, seats.num_real, 1, room_R, over, random)
        if move.x < 0:
            continue
        swap, a, b = move.y >= 0, move.a, move.b
        if swap and (count_E[a] > 1 or (b >= 0 and count_E[b] > 1)) and random_below(random, 2):
            continue  # no bound dismisses most of these, and few are taken
        allowed, own = -1e-9, 0.0
        if tied:
            more = further_moves(move, near.new_ER)
            own = changed_bias(move, near.bias_ER)
        if not last:
            draw = float(next_random(random) >> np.uint64(11)) * (1.0 / 9007199254740992.0)
            allowed = -schedule.hot * (schedule.end / schedule.hot) ** cooled * np.log(max(draw, 1e-300))
        pulled = own
        if tied:
            above = max(moves + more - near.most_moves, 0.0) - max(moves - near.most_moves, 0.0)
            pulled += above * price * size_E.mean() * (ABOVE if last else 1.0 if cooled > WALLED else 0.0)
            pulled += 0.0 if last else pull * more
        least = (-(1.0 + weight) * alone_E[b] if b >= 0 else 0.0) + pulled
        if swap:
            least += _least_swap(move, size_E, count_E, alone_E, slots_S, start_R, together_EE, room_R, weight, price)
        elif count_E[a] == 2:
            least -= price * over
            least += _least_repoint(move, size_E, alone_E, rank_EH, slots_S, start_R, together_EE, room_R, price)
        if least > allowed:
            continue
        done += 1.0 - DISMISSED
        make_move(move, seats)
        _rewrite_rows(move, bits, seats, state, rooms)
        new_cost, new_risk, new_over = bits_traffic(bits, seats, state), risk, 0.0
        if hedged:
            new_risk += changed_risk(move, seats, risk_EE, risk_R, new_risk_R)
        delta = new_cost - cost + new_risk - risk + pulled - price * over
        if delta <= allowed:  # even if it ended all overload it would not be taken otherwise
            bits_loads(bits, seats, state, trial_R)
            new_over = overload(trial_R, limit_R)
            delta += price * new_over
        if delta > allowed:
            take_back(move, seats)
            _restore_rows(state, rooms)
            continue
        cost, risk, over = new_cost, new_risk, new_over
        moves += more
        bias += own
        load_R[:] = trial_R
        room_R[:] = limit_R - load_R
        risk_R[:] = new_risk_R
        for i in range(rooms.sizes[0]):
            count_alone(rooms.ranks[i], bits, seats, rooms.once_W, rooms.twice_W, alone_E)
        count_open(state, alone_E)
        if over <= 0.0 and moves <= near.most_moves and cost + risk + bias < best_cost:
            best_cost = cost + risk + bias
            best_S[:] = slots_S
            best_R[:] = load_R
    if best_cost < np.inf:
        slots_S[:] = best_S
        return best_cost, best_R
    return cost + risk + bias + FINAL_PRICE * (1.0 + weight) * over, load_R
