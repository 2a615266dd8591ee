"""Replicas for the dispatch objective, one layer at a time, under the replica choice that the runtime uses.

A token's cost is what the rule of `replica_choice` makes of it: the ranks of its single-slot experts, plus the ranks
opened for replicated experts that none of those holds. Ranks are bits of a word, so that a token costs a few
instructions; a move (swap two slots, or re-point a slot whose expert has another one) is evaluated exactly on the
tokens of the experts it touches. At most 64 ranks.

Shape letters: T tokens, E experts, K top-k, R ranks, S slots.
"""

import numpy as np
from numba import njit

from moeplace.placement.cost.replica_choice import preference_orders
from moeplace.placement.search.annealing import next_random, random_below
from moeplace.placement.search.nets import LayerNets
from moeplace.placement.solvers.replicas.slot_moves import make_move, take_back
from moeplace.placement.solvers.replicas.words import popcount

MOST_RANKS = 64


@njit(cache=True, nogil=True)
def _serve(t, ids_TK, mask_E, node_mask_N, orders_PR, rank_K):  # type: ignore[no-untyped-def]
    """Mask of the ranks that serve token t under the rule; writes the rank of every expert to `rank_K`."""
    one, zero = np.uint64(1), np.uint64(0)
    top_k = ids_TK.shape[1]
    used, remaining = zero, 0
    for k in range(top_k):
        e = ids_TK[t, k]
        rank_K[k] = -1
        if e >= 0:
            if mask_E[e] & (mask_E[e] - one) == zero:
                used |= mask_E[e]
                rank_K[k] = popcount(mask_E[e] - one)
            else:
                remaining += 1
    if remaining == 0:
        return used
    forced, order_R = used, orders_PR[t % len(orders_PR)]
    for k in range(top_k):
        if ids_TK[t, k] >= 0 and rank_K[k] < 0 and mask_E[ids_TK[t, k]] & forced != zero:
            for r in order_R:
                if (mask_E[ids_TK[t, k]] & forced) >> np.uint64(r) & one:
                    rank_K[k] = r
                    remaining -= 1
                    break
    while remaining > 0:
        best, best_score = -1, -1
        for r in order_R:
            held = 0
            for k in range(top_k):
                if ids_TK[t, k] >= 0 and rank_K[k] < 0 and mask_E[ids_TK[t, k]] >> np.uint64(r) & one:
                    held += 1
            if held == 0:
                continue
            near = 0
            for n in range(len(node_mask_N)):
                if node_mask_N[n] >> np.uint64(r) & one and node_mask_N[n] & used != zero:
                    near = 1
            if 4 * held + near > best_score:
                best, best_score = r, 4 * held + near
        used |= one << np.uint64(best)
        for k in range(top_k):
            if ids_TK[t, k] >= 0 and rank_K[k] < 0 and mask_E[ids_TK[t, k]] >> np.uint64(best) & one:
                rank_K[k] = best
                remaining -= 1
    return used


@njit(cache=True, nogil=True, inline="always")
def _price(used, node_mask_N, node_weight):  # type: ignore[no-untyped-def]
    """d + node_weight * dn of a mask of ranks."""
    cost = float(popcount(used))
    if node_weight > 0:
        for n in range(len(node_mask_N)):
            if node_mask_N[n] & used != np.uint64(0):
                cost += node_weight
    return cost


@njit(cache=True, nogil=True)
def replay_layer(ids_TK, mask_E, node_mask_N, orders_PR, node_weight, cost_T, rank_TK, load_R):  # type: ignore[no-untyped-def]
    """Cost and serving ranks of every token, loads of ranks; returns the sum of costs."""
    total = 0.0
    load_R[:] = 0.0
    for t in range(len(ids_TK)):
        used = _serve(t, ids_TK, mask_E, node_mask_N, orders_PR, rank_TK[t])
        cost_T[t] = _price(used, node_mask_N, node_weight)
        total += cost_T[t]
        for k in range(ids_TK.shape[1]):
            if rank_TK[t, k] >= 0:
                load_R[rank_TK[t, k]] += 1.0
    return total


@njit(cache=True, nogil=True)
def gain_of_copies(ids_TK, mask_E, node_mask_N, orders_PR, node_weight, cost_T, gain_ER):  # type: ignore[no-untyped-def]
    """Add to `gain_ER` what a further copy of expert e on rank r saves, counted exactly for one copy at a time."""
    one, num_ranks = np.uint64(1), orders_PR.shape[1]
    rank_K = np.empty(ids_TK.shape[1], np.int64)
    for t in range(len(ids_TK)):
        used = _serve(t, ids_TK, mask_E, node_mask_N, orders_PR, rank_K)
        for k in range(ids_TK.shape[1]):
            e = ids_TK[t, k]
            if e < 0:
                continue
            alone = True
            for j in range(ids_TK.shape[1]):
                if j != k and rank_K[j] == rank_K[k]:
                    alone = False
            if not alone:
                continue
            rest = used & ~(one << np.uint64(rank_K[k]))
            for r in range(num_ranks):
                if rest >> np.uint64(r) & one and not mask_E[e] >> np.uint64(r) & one:
                    gain_ER[e, r] += cost_T[t] - _price(rest, node_mask_N, node_weight)


@njit(cache=True, nogil=True)
def _touched(a, b, ids_TK, first_E, token_of, mask_E, node_mask_N, orders_PR, node_weight, cost_T):  # type: ignore[no-untyped-def]
    """Change of cost over the tokens of experts a and b (b = -1: none) under the present `mask_E`."""
    rank_K = np.empty(ids_TK.shape[1], np.int64)
    delta = 0.0
    for i in range(first_E[a], first_E[a + 1]):
        t = token_of[i]
        delta += _price(_serve(t, ids_TK, mask_E, node_mask_N, orders_PR, rank_K), node_mask_N, node_weight) - cost_T[t]
    if b >= 0:
        for i in range(first_E[b], first_E[b + 1]):
            t = token_of[i]
            both = False
            for k in range(ids_TK.shape[1]):
                if ids_TK[t, k] == a:
                    both = True
            if not both:
                used = _serve(t, ids_TK, mask_E, node_mask_N, orders_PR, rank_K)
                delta += _price(used, node_mask_N, node_weight) - cost_T[t]
    return delta


@njit(cache=True, nogil=True)
def _loads_after(a, b, ids_TK, first_E, token_of, mask_E, node_mask_N, orders_PR, node_weight, cost_T, rank_TK,  # type: ignore[no-untyped-def]
                 load_R, commit):  # fmt: skip
    """Apply the present `mask_E` to the tokens of a and b: loads always, costs and ranks only if `commit`."""
    rank_K = np.empty(ids_TK.shape[1], np.int64)
    for part in range(2):
        e = a if part == 0 else b
        if e < 0:
            continue
        for i in range(first_E[e], first_E[e + 1]):
            t = token_of[i]
            if part == 1:
                both = False
                for k in range(ids_TK.shape[1]):
                    if ids_TK[t, k] == a:
                        both = True
                if both:
                    continue
            used = _serve(t, ids_TK, mask_E, node_mask_N, orders_PR, rank_K)
            for k in range(ids_TK.shape[1]):
                if rank_K[k] != rank_TK[t, k]:
                    load_R[rank_TK[t, k]] -= 1.0
                    load_R[rank_K[k]] += 1.0
                    if commit:
                        rank_TK[t, k] = rank_K[k]
            if commit:
                cost_T[t] = _price(used, node_mask_N, node_weight)


@njit(cache=True, nogil=True)
def _rank_risk(r, slots_S, rank_S, copies_E, risk_EE):  # type: ignore[no-untyped-def]
    """Quadratic form of the hedge over the experts of rank r, each with its share 1/replicas."""
    total = 0.0
    for x in range(len(slots_S)):
        if rank_S[x] != r or slots_S[x] < 0:
            continue
        for y in range(len(slots_S)):
            if rank_S[y] == r and slots_S[y] >= 0:
                total += risk_EE[slots_S[x], slots_S[y]] / (copies_E[slots_S[x]] * copies_E[slots_S[y]])
    return total


@njit(cache=True, nogil=True)
def _loses_node(before, after, node_mask_N, min_nodes):  # type: ignore[no-untyped-def]
    """Whether an expert whose ranks change is on fewer nodes than before, and than it must be."""
    was, now = 0, 0
    for n in range(len(node_mask_N)):
        was += before & node_mask_N[n] != np.uint64(0)
        now += after & node_mask_N[n] != np.uint64(0)
    return now < was and now < min_nodes


@njit(cache=True, nogil=True)
def anneal_replicas(  # type: ignore[no-untyped-def]
    ids_TK, first_E, token_of, num_real, slots_S, rank_S, node_mask_N, orders_PR, limit_R, risk_EE, node_weight, hot,
    end, touches, min_copies, min_nodes, stop, state,
):  # fmt: skip
    """Improve `slots_S` in place by exact moves; returns (best cost, or with a price on overload; tokens touched).

    Args:
        ids_TK, first_E, token_of: the layer's nets.
        num_real: experts of the layer; the nets may list empty slots beyond them.
        slots_S: (S,) int32 slot -> expert, -1 = empty.
        rank_S: (S,) rank of each slot.
        node_mask_N: (N,) uint64 bits of the ranks of each node.
        orders_PR: `preference_orders`; token t has rotation number t.
        limit_R: (R,) most load of each rank.
        risk_EE: hedge, see `robust`; a replicated expert counts with its share on each rank.
        node_weight: price of a node beside a rank.
        hot, end: first and last temperature in tokens; hot = 0 is descent only.
        touches: work to do, in tokens evaluated.
        min_copies: copies every expert keeps.
        min_nodes: nodes that every expert keeps a copy on, if it starts on so many.
        stop: (1,) uint8, set from outside when time is up.
        state: (1,) uint64.
    """
    slots, num_experts, num_ranks = len(slots_S), len(first_E) - 1, orders_PR.shape[1]
    one = np.uint64(1)
    mask_E, copies_E = np.zeros(num_experts, np.uint64), np.zeros(num_experts, np.int64)
    for s in range(slots):
        if slots_S[s] >= 0:
            mask_E[slots_S[s]] |= one << np.uint64(rank_S[s])
            copies_E[slots_S[s]] += 1
    cost_T = np.zeros(len(ids_TK))
    rank_TK = np.full(ids_TK.shape, -1, np.int64)
    load_R, trial_R, new_risk_R = np.zeros(num_ranks), np.zeros(num_ranks), np.zeros(num_ranks)
    cost = replay_layer(ids_TK, mask_E, node_mask_N, orders_PR, node_weight, cost_T, rank_TK, load_R)
    risk_R = np.zeros(num_ranks)
    for r in range(num_ranks):
        risk_R[r] = _rank_risk(r, slots_S, rank_S, copies_E, risk_EE)
        cost += risk_R[r] ** 2
    best_S, best_cost = slots_S.copy(), np.inf
    over = np.maximum(load_R - limit_R, 0.0).sum()
    if over <= 0.0:
        best_cost = cost
    done = 0
    while done < touches and not stop[0]:
        share = done / touches
        last = hot <= 0 or share > 0.85
        temperature = 0.0 if last else hot * (end / hot) ** (share / 0.85)
        price = (1.0 + node_weight) * (20.0 if last else 2.0 * 3.0 ** (share / 0.85))
        x = random_below(state, slots)
        if over > 0.0 and random_below(state, 2):  # look for moves where load must go
            for _ in range(slots):
                if load_R[rank_S[x]] > limit_R[rank_S[x]]:
                    break
                x = (x + 1) % slots
        a = slots_S[x]
        if a < 0:
            done += 1
            continue
        g = rank_S[x]
        bit_g = one << np.uint64(g)
        y, b, bit_h, touched_bits = -1, -1, np.uint64(0), np.uint64(0)
        if copies_E[a] > min_copies and random_below(state, 5) < 3:
            b = random_below(state, num_real)  # slot x gets expert b instead of a
            if b == a or mask_E[b] & bit_g != np.uint64(0):
                done += 1
                continue
            touched_bits = mask_E[a] | mask_E[b] | bit_g
        else:
            y = random_below(state, slots)
            h = rank_S[y]
            b = slots_S[y]
            bit_h = one << np.uint64(h)
            if g == h or mask_E[a] & bit_h != np.uint64(0) or (b >= 0 and mask_E[b] & bit_g != np.uint64(0)) or a == b:
                done += 1
                continue
            touched_bits = bit_g | bit_h
        old_a, old_b = mask_E[a], mask_E[b] if b >= 0 else np.uint64(0)
        make_move(x, y, a, b, bit_g, bit_h, slots_S, mask_E, copies_E)
        if min_nodes > 1 and (
            _loses_node(old_a, mask_E[a], node_mask_N, min_nodes)
            or (b >= 0 and _loses_node(old_b, mask_E[b], node_mask_N, min_nodes))
        ):
            take_back(x, y, a, b, old_a, old_b, slots_S, mask_E, copies_E)
            done += 1
            continue
        work = first_E[a + 1] - first_E[a] + (first_E[b + 1] - first_E[b] if b >= 0 else 0)
        done += work + 1
        delta = _touched(a, b, ids_TK, first_E, token_of, mask_E, node_mask_N, orders_PR, node_weight, cost_T)
        for r in range(num_ranks):
            new_risk_R[r] = risk_R[r]
            if touched_bits >> np.uint64(r) & one:
                new_risk_R[r] = _rank_risk(r, slots_S, rank_S, copies_E, risk_EE)
                delta += new_risk_R[r] ** 2 - risk_R[r] ** 2
        draw = max(float(next_random(state) >> np.uint64(11)) * (1.0 / 9007199254740992.0), 1e-12)
        allowed = -temperature * np.log(draw) if temperature > 0 else -1e-9
        take = delta <= allowed + price * over
        if take:
            trial_R[:] = load_R
            _loads_after(
                a, b, ids_TK, first_E, token_of, mask_E, node_mask_N, orders_PR, node_weight, cost_T, rank_TK,
                trial_R, False,
            )  # fmt: skip
            done += work
            new_over = np.maximum(trial_R - limit_R, 0.0).sum()
            take = delta + price * (new_over - over) <= allowed
            if last and over <= 0.0 and new_over > 0.0:
                take = False
        if not take:
            take_back(x, y, a, b, old_a, old_b, slots_S, mask_E, copies_E)
            continue
        _loads_after(
            a, b, ids_TK, first_E, token_of, mask_E, node_mask_N, orders_PR, node_weight, cost_T, rank_TK, load_R, True
        )
        over = new_over
        cost += delta
        risk_R[:] = new_risk_R
        if over <= 0.0 and cost < best_cost:
            best_cost = cost
            best_S[:] = slots_S
    if best_cost < np.inf:
        slots_S[:] = best_S
        return best_cost, done
    return cost + 20.0 * (1.0 + node_weight) * over, done


def node_masks(node_R: np.ndarray) -> np.ndarray:
    """(N,) uint64 bits of the ranks of each node."""
    masks = np.zeros(int(node_R[-1]) + 1, np.uint64)
    for rank, node in enumerate(node_R):
        masks[node] |= np.uint64(1) << np.uint64(rank)
    return masks


def fill_with_copies(nets: LayerNets, slots_S: np.ndarray, rank_S: np.ndarray, node_R: np.ndarray,
                     node_weight: float, count: int) -> None:  # fmt: skip
    """Give up to `count` empty slots to the copies that save most, one after another, in place."""
    num_experts, num_ranks = len(nets.first_E) - 1, len(node_R)
    masks_N, orders_PR = node_masks(node_R), preference_orders(num_ranks)
    cost_T, load_R = np.zeros(len(nets.ids_TK)), np.zeros(num_ranks)
    rank_TK = np.full(nets.ids_TK.shape, -1, np.int64)
    for _ in range(count):
        empty = np.flatnonzero(slots_S < 0)
        if not len(empty):
            return
        mask_E = expert_masks(slots_S, rank_S, num_experts)
        gain_ER = np.zeros((num_experts, num_ranks))
        replay_layer(nets.ids_TK, mask_E, masks_N, orders_PR, node_weight, cost_T, rank_TK, load_R)
        gain_of_copies(nets.ids_TK, mask_E, masks_N, orders_PR, node_weight, cost_T, gain_ER)
        open_ranks = np.unique(rank_S[empty])
        held_ER = (mask_E[:, None] >> np.arange(num_ranks, dtype=np.uint64)) & np.uint64(1)
        gain_ER[held_ER.astype(bool)] = -1
        gain_ER[mask_E == 0] = -1  # entries beyond the layer's experts
        expert, position = np.unravel_index(int(gain_ER[:, open_ranks].argmax()), (num_experts, len(open_ranks)))
        if gain_ER[expert, open_ranks[position]] < 0:
            return
        slots_S[empty[rank_S[empty] == open_ranks[position]][0]] = expert


def copy_heaviest(slots_S: np.ndarray, rank_S: np.ndarray, load_E: np.ndarray) -> None:
    """Fill empty slots, in place, with the expert of the largest load per replica that their rank lacks."""
    copies_E = np.bincount(slots_S[slots_S >= 0], minlength=len(load_E))
    for slot in np.flatnonzero(slots_S < 0):
        part_E = load_E / np.maximum(copies_E, 1)
        held = slots_S[rank_S == rank_S[slot]]
        part_E[held[held >= 0]] = -1.0
        if part_E.max() < 0:
            continue
        slots_S[slot] = int(part_E.argmax())
        copies_E[slots_S[slot]] += 1


def expert_masks(slots_S: np.ndarray, rank_S: np.ndarray, num_experts: int) -> np.ndarray:
    """(E,) uint64 bits of the ranks that hold each expert."""
    mask_E = np.zeros(num_experts, np.uint64)
    for slot, expert in enumerate(slots_S):
        if expert >= 0:
            mask_E[expert] |= np.uint64(1) << np.uint64(rank_S[slot])
    return mask_E
