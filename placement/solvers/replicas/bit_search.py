"""Replicas for the dispatch objective, many moves a second: annealing on the bit rows of `token_bits`.

A move (swap two slots, or re-point a slot whose expert has another one) costs a few passes over words, and a bound
dismisses most moves before that. Counts are exact but for tokens that could merge twice, so a search ends with
`replicas.anneal_replicas`, which is exact.

Shape letters: T tokens, E experts, R ranks, N nodes, S slots, W words of 64 tokens, P words of rotation numbers.
"""

import numpy as np
from numba import njit

from moeplace.placement.search.annealing import next_random, random_below
from moeplace.placement.solvers.replicas.slot_moves import make_move, take_back
from moeplace.placement.solvers.replicas.token_bits import (
    bits_loads,
    bits_traffic,
    count_alone,
    count_open,
    count_row,
    mark_singles,
)
from moeplace.placement.solvers.replicas.words import lowest_bit

FINAL_SHARE = 0.15
"""Share of the work that only improves."""
DISMISSED = 0.03
"""Work of a move that a bound dismisses, in evaluations."""
LEAST_SHARE = 0.15
"""Share of an expert's tokens that its first slot gets at least when its second one goes."""
SLACK = 0.05
"""Share of two experts' load that replicated ones may shift when the two change places."""


@njit(cache=True, nogil=True)
def _newly(a, b, h, slots_S, start_R, together_EE):  # type: ignore[no-untyped-def]
    """At least so many tokens of expert a have no expert on rank h once b has left it (union bound)."""
    absent = together_EE[a, a]
    for s in range(start_R[h], start_R[h + 1]):
        f = slots_S[s]
        if f >= 0 and f != b and f != a:
            absent -= together_EE[a, f]
    return max(absent, 0)


@njit(cache=True, nogil=True)
def _rank_risk(first, last, slots_S, copies_E, risk_EE):  # type: ignore[no-untyped-def]
    """Quadratic form of the hedge over the slots first..last-1, each expert with its share 1/slots."""
    total = 0.0
    for x in range(first, last):
        if slots_S[x] >= 0:
            row = 0.0
            for y in range(first, last):
                if slots_S[y] >= 0:
                    row += risk_EE[slots_S[x], slots_S[y]] / copies_E[slots_S[y]]
            total += row / copies_E[slots_S[x]]
    return total


@njit(cache=True, nogil=True)
def anneal_bits(  # type: ignore[no-untyped-def]
    bits_EW, prefer_RRP, size_E, together_EE, num_real, slots_S, start_R, node_R, limit_R, risk_EE, weight, hot, end,
    evaluations, min_copies, stop, state,
):  # fmt: skip
    """Improve `slots_S` in place; returns (best cost with hedge, or with overload priced; loads).

    Args:
        bits_EW, prefer_RRP, size_E, together_EE: see `TokenBits`.
        num_real: experts of the layer.
        slots_S: (S,) int32 slot -> expert, -1 = empty.
        start_R: (R + 1,) first slot of each rank.
        node_R: (R,) node of each rank.
        limit_R: (R,) most load of each rank.
        risk_EE: hedge, see `robust`; a replicated expert counts with its share on each rank.
        weight: price of a node beside a rank.
        hot, end: first and last temperature in tokens; hot = 0 is descent only.
        evaluations: work to do: moves that are evaluated; one that a bound dismisses counts DISMISSED.
        min_copies: slots that every expert keeps.
        stop: (1,) uint8, set from outside when time is up.
        state: (1,) uint64.
    """
    slots, num_experts, words = len(slots_S), len(bits_EW), bits_EW.shape[1]
    num_ranks, num_nodes = len(node_R), node_R[-1] + 1
    one, zero = np.uint64(1), np.uint64(0)
    rank_S = np.empty(slots, np.int64)
    for r in range(num_ranks):
        rank_S[start_R[r] : start_R[r + 1]] = r
    node_start_N = np.zeros(num_nodes + 1, np.int64)
    for r in range(num_ranks):
        node_start_N[node_R[r] + 1] = start_R[r + 1]
    mask_E, copies_E = np.zeros(num_experts, np.uint64), np.zeros(num_experts, np.int64)
    for s in range(slots):
        if slots_S[s] >= 0:
            mask_E[slots_S[s]] |= one << np.uint64(rank_S[s])
            copies_E[slots_S[s]] += 1
    most_several = slots // 2 + 1
    open_JW, far_JW = np.zeros((most_several, words), np.uint64), np.zeros((most_several, words), np.uint64)
    free_CW = np.zeros((num_ranks + 3, words), np.uint64)
    twice_RW = np.zeros((num_ranks, words), np.uint64)
    place_E = np.full(num_experts, -1, np.int64)
    rows_BW, size_B = np.zeros((num_ranks + 4, words), np.uint64), np.zeros(num_ranks + 4)
    row_R, spare = np.arange(num_ranks), np.arange(num_ranks, num_ranks + 4)
    node_rows_BW, node_size_B = np.zeros((num_nodes + 4, words), np.uint64), np.zeros(num_nodes + 4)
    node_row_N, node_spare = np.arange(num_nodes), np.arange(num_nodes, num_nodes + 4)
    for r in range(num_ranks):
        size_B[r] = mark_singles(r, slots_S, start_R, copies_E, bits_EW, rows_BW[r])
        if weight > 0:
            for w in range(words):
                node_rows_BW[node_R[r], w] |= rows_BW[r, w]
    for n in range(num_nodes):
        node_size_B[n] = count_row(node_rows_BW[n])
    load_R, trial_R = np.zeros(num_ranks), np.zeros(num_ranks)
    cost = bits_traffic(
        slots_S, start_R, node_start_N, node_R, mask_E, copies_E, bits_EW, prefer_RRP, size_E, row_R, rows_BW, size_B,
        node_row_N, node_rows_BW, node_size_B, weight, open_JW, far_JW, twice_RW, free_CW, place_E,
    )  # fmt: skip
    bits_loads(
        slots_S, start_R, node_R, mask_E, bits_EW, prefer_RRP, size_E, row_R, rows_BW, node_row_N, node_rows_BW,
        weight, open_JW, twice_RW, free_CW, place_E, load_R,
    )  # fmt: skip
    alone_E, once_W, twice_W = np.zeros(num_experts, np.int64), np.zeros(words, np.uint64), np.zeros(words, np.uint64)
    for r in range(num_ranks):
        count_alone(r, slots_S, start_R, copies_E, bits_EW, once_W, twice_W, alone_E)
    count_open(place_E, open_JW, alone_E)
    hedged = risk_EE.any()
    risk_R, new_risk_R = np.zeros(num_ranks), np.zeros(num_ranks)
    risk = 0.0
    if hedged:
        for r in range(num_ranks):
            risk_R[r] = _rank_risk(start_R[r], start_R[r + 1], slots_S, copies_E, risk_EE)
            risk += risk_R[r] ** 2
    over = np.maximum(load_R - limit_R, 0.0).sum()
    best_S, best_cost, best_R = slots_S.copy(), np.inf, load_R.copy()
    if over <= 0.0:
        best_cost = cost + risk
    touched, touched_nodes = np.empty(4, np.int64), np.empty(4, np.int64)
    done = 0.0
    while done < evaluations and not stop[0]:
        share = done / evaluations
        last = hot <= 0 or share > 1.0 - FINAL_SHARE
        cooled = share / (1.0 - FINAL_SHARE)
        temperature = 0.0 if last else hot * (end / hot) ** cooled
        price = (1.0 + weight) * (50.0 if last else 2.0 * 3.0**cooled)
        done += DISMISSED
        x = random_below(state, slots)
        if over > 0.0 and random_below(state, 2):  # look for moves where load must go
            for _ in range(slots):
                if load_R[rank_S[x]] > limit_R[rank_S[x]]:
                    break
                x = (x + 1) % slots
        a = slots_S[x]
        if a < 0:
            continue
        g = rank_S[x]
        bit_g = one << np.uint64(g)
        y, b, bit_h, risky = -1, -1, zero, zero
        if copies_E[a] > min_copies and random_below(state, 5) < 3:
            b = random_below(state, num_real)  # slot x gets expert b instead of a
            if b == a or mask_E[b] & bit_g != zero:
                continue
            risky = mask_E[a] | mask_E[b] | bit_g
        else:
            y = random_below(state, slots)
            h = rank_S[y]
            b = slots_S[y]
            bit_h = one << np.uint64(h)
            if g == h or mask_E[a] & bit_h != zero or (b >= 0 and mask_E[b] & bit_g != zero) or a == b:
                continue
            if (copies_E[a] > 1 or (b >= 0 and copies_E[b] > 1)) and random_below(state, 2):
                continue  # no bound dismisses most of these, and few are taken
            risky = bit_g | bit_h
        allowed = -1e-9
        if not last:
            draw = float(next_random(state) >> np.uint64(11)) * (1.0 / 9007199254740992.0)
            allowed = -temperature * np.log(max(draw, 1e-300))
        least = -(1.0 + weight) * alone_E[b] if b >= 0 else 0.0
        if y < 0:
            if copies_E[a] == 2:
                other = lowest_bit(mask_E[a] & ~bit_g)
                least += max(_newly(a, -1, other, slots_S, start_R, together_EE) - alone_E[a], 0)
                least += price * (max(load_R[other] + LEAST_SHARE * size_E[a] - limit_R[other], 0.0) - over)
        else:
            least -= (1.0 + weight) * alone_E[a]
            shift, slack = -size_E[a] / copies_E[a], (SLACK if copies_E[a] == 1 else 0.5) * size_E[a] / copies_E[a]
            if copies_E[a] == 1:
                least += _newly(a, b, h, slots_S, start_R, together_EE)
            if b >= 0:
                shift += size_E[b] / copies_E[b]
                slack += (SLACK if copies_E[b] == 1 else 0.5) * size_E[b] / copies_E[b]
                if copies_E[b] == 1:
                    least += _newly(b, a, g, slots_S, start_R, together_EE)
            least += price * (max(load_R[g] + shift - slack - limit_R[g], 0.0) - max(load_R[g] - limit_R[g], 0.0))
            least += price * (max(load_R[h] - shift - slack - limit_R[h], 0.0) - max(load_R[h] - limit_R[h], 0.0))
        if least > allowed:
            continue
        done += 1.0 - DISMISSED
        old_a, old_b = mask_E[a], mask_E[b] if b >= 0 else zero
        make_move(x, y, a, b, bit_g, bit_h, slots_S, mask_E, copies_E)
        count = 0
        if y < 0:
            for r in range(num_ranks):
                if (copies_E[a] == 1 and mask_E[a] >> np.uint64(r) & one) or (
                    copies_E[b] == 2 and old_b >> np.uint64(r) & one
                ):
                    touched[count] = r
                    count += 1
        elif copies_E[a] == 1 or (b >= 0 and copies_E[b] == 1):
            touched[0], touched[1] = g, h
            count = 2
        nodes = 0
        for i in range(count):
            r = touched[i]
            row_R[r], spare[i] = spare[i], row_R[r]
            size_B[row_R[r]] = mark_singles(r, slots_S, start_R, copies_E, bits_EW, rows_BW[row_R[r]])
            if weight > 0 and (i == 0 or node_R[touched[0]] != node_R[r]):
                touched_nodes[nodes] = node_R[r]
                nodes += 1
        for i in range(nodes):
            n = touched_nodes[i]
            node_row_N[n], node_spare[i] = node_spare[i], node_row_N[n]
            node_W = node_rows_BW[node_row_N[n]]
            node_W[:] = zero
            for r in range(num_ranks):
                if node_R[r] == n:
                    for w in range(words):
                        node_W[w] |= rows_BW[row_R[r], w]
            node_size_B[node_row_N[n]] = count_row(node_W)
        new_cost = bits_traffic(
            slots_S, start_R, node_start_N, node_R, mask_E, copies_E, bits_EW, prefer_RRP, size_E, row_R, rows_BW,
            size_B, node_row_N, node_rows_BW, node_size_B, weight, open_JW, far_JW, twice_RW, free_CW, place_E,
        )  # fmt: skip
        new_risk, new_over = risk, 0.0
        if hedged:
            for r in range(num_ranks):
                new_risk_R[r] = risk_R[r]
                if risky >> np.uint64(r) & one:
                    new_risk_R[r] = _rank_risk(start_R[r], start_R[r + 1], slots_S, copies_E, risk_EE)
                    new_risk += new_risk_R[r] ** 2 - risk_R[r] ** 2
        delta = new_cost - cost + new_risk - risk - price * over
        if delta <= allowed:  # even if it ended all overload it would not be taken otherwise
            bits_loads(
                slots_S, start_R, node_R, mask_E, bits_EW, prefer_RRP, size_E, row_R, rows_BW, node_row_N,
                node_rows_BW, weight, open_JW, twice_RW, free_CW, place_E, trial_R,
            )  # fmt: skip
            for r in range(num_ranks):
                new_over += max(trial_R[r] - limit_R[r], 0.0)
            delta += price * new_over
        if delta <= allowed:
            cost, risk, over = new_cost, new_risk, new_over
            load_R[:] = trial_R
            risk_R[:] = new_risk_R
            for i in range(count):
                count_alone(touched[i], slots_S, start_R, copies_E, bits_EW, once_W, twice_W, alone_E)
            count_open(place_E, open_JW, alone_E)
            if over <= 0.0 and cost + risk < best_cost:
                best_cost = cost + risk
                best_S[:] = slots_S
                best_R[:] = load_R
            continue
        take_back(x, y, a, b, old_a, old_b, slots_S, mask_E, copies_E)
        for i in range(count):
            row_R[touched[i]], spare[i] = spare[i], row_R[touched[i]]
        for i in range(nodes):
            n = touched_nodes[i]
            node_row_N[n], node_spare[i] = node_spare[i], node_row_N[n]
    if best_cost < np.inf:
        slots_S[:] = best_S
        return best_cost, best_R
    return cost + risk + 50.0 * (1.0 + weight) * over, load_R
