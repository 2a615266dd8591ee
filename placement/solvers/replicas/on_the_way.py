"""Replicas for `coherent` mode with one expert per token: in empty slots, where tokens pass.

Shape letters: L MoE layers, E experts of a layer, R ranks, S slots per layer.
"""

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.search.sample import judging_trace
from moeplace.placement.search.ties import Ties
from moeplace.placement.solvers.chain.driver import search_chain
from moeplace.placement.solvers.replicas.survival import (
    add_surviving_replicas,
    balance_replicas,
    first_cluster,
    to_rows,
)

_PACKINGS = 5


def search_chain_with_replicas(
    problem: Problem, budget: Budget, cap: float | None, seconds: float, ties: Ties | None = None
) -> tuple[np.ndarray, bool]:
    """(slots (L, S), whether the clock cut the search short): the chain search, then replicas in slots left over.

    With `ties`, first those replicas that the ranks hold already.
    """
    slots_LS, cut = search_chain(problem, budget, cap, seconds, ties)
    if (problem.redundant_slots > 0).any():
        if ties is not None:
            slots_LS = _keep_replicas(problem, budget, slots_LS, cap, ties)
        slots_LS = add_replicas_on_the_way(problem, budget, slots_LS, cap, ties)
    return slots_LS, cut


def search_surviving_chain(
    problem: Problem, budget: Budget, cap: float | None, seconds: float
) -> tuple[np.ndarray, bool]:
    """First replicas by the chain search, further ones where tokens pass; layers that break the cap are packed."""
    narrow = problem.replace(cluster=first_cluster(problem), survive=0, previous=None, max_moves=None)
    first_LS, cut = search_chain_with_replicas(narrow, budget, cap, 0.6 * seconds)
    packed_LS = np.stack([pack_slots(problem, layer) for layer in range(problem.num_layers)])
    first_LER = narrow.placement(first_LS).copies_LER > 0
    # The narrow cluster may have a few slots more than experts, and replicas in them: first replicas only.
    first_LER &= first_LER.cumsum(axis=2) == 1
    held_LER = add_surviving_replicas(problem, first_LER)
    slots_LS = to_rows(problem, held_LER)
    trace = judging_trace(problem, budget.time_limit)
    if cap is not None:
        packed = problem.placement(packed_LS)
        caps_L = np.maximum(cap, problem.evaluate(packed, trace).imbalance_L)
        with budget.alarm(budget.remaining) as stop:
            for _ in range(_PACKINGS):
                balance_replicas(problem, held_LER, caps_L, stop)
                slots_LS = to_rows(problem, held_LER)
                over_L = problem.evaluate(problem.placement(slots_LS), trace).imbalance_L > caps_L + 1e-9
                if not over_L.any() or budget.expired:
                    break
                held_LER[over_L] = packed.copies_LER[over_L] > 0
    slots_LS = add_replicas_on_the_way(problem, budget, slots_LS, cap)
    ours, theirs = (problem.evaluate(problem.placement(each), trace).copies_per_token for each in (slots_LS, packed_LS))
    return (slots_LS if ours <= theirs else packed_LS), cut


def _keep_replicas(problem: Problem, budget: Budget, slots_LS: np.ndarray, cap: float | None, ties: Ties) -> np.ndarray:
    """Old replicas back in empty slots, where they cost no move: where tokens gain by it and the layer keeps the cap.

    A search without replicas has moved first copies, so that an old replica may now break the cap or draw tokens away.
    All layers are tried at once, then those that keep the cap, then, within the budget, one after another.
    """
    kept_LS, trace = _with_old_replicas(problem, slots_LS, ties), judging_trace(problem, budget.time_limit)
    best = problem.evaluate(problem.placement(slots_LS), trace)
    limit_L = _limits(cap, best.imbalance_L) + 1e-9
    every_L = np.ones(problem.num_layers, bool)
    within_L = problem.evaluate(problem.placement(kept_LS), trace).imbalance_L <= limit_L
    for number, chosen_L in enumerate([every_L, within_L, *np.diag(every_L)]):
        if number > 1 and budget.expired:
            break
        trial_LS = np.where(chosen_L[:, None], kept_LS, slots_LS)
        if (trial_LS == slots_LS).all():
            continue
        trial = problem.evaluate(problem.placement(trial_LS), trace)
        if trial.copies_per_token <= best.copies_per_token and (trial.imbalance_L <= limit_L).all():
            slots_LS, best = trial_LS, trial
    return slots_LS


def _with_old_replicas(problem: Problem, slots_LS: np.ndarray, ties: Ties) -> np.ndarray:
    """(L, S) every empty slot filled with an expert that its rank held already, if there is one, the heaviest first."""
    filled_LS = slots_LS.copy()
    rank_of_slot = problem.cluster.rank_of_slot
    for layer, slot in np.argwhere(slots_LS < 0):
        rank = rank_of_slot[slot]
        kept_E = ~ties.new_LER[layer, :, rank]
        on_rank = filled_LS[layer, rank_of_slot == rank]
        kept_E[on_rank[on_rank >= 0]] = False
        if kept_E.any():
            filled_LS[layer, slot] = int(np.where(kept_E, problem.load_LE[layer], -1.0).argmax())
    return filled_LS


def _limits(cap: float | None, imbalance_L: np.ndarray) -> np.ndarray:
    """(L,) imbalance up to which replicas may raise that of layers: the cap, or what a layer has where it is above."""
    return np.full(len(imbalance_L), np.inf) if cap is None else np.maximum(cap, imbalance_L)


def add_replicas_on_the_way(
    problem: Problem, budget: Budget, slots_LS: np.ndarray, cap: float | None, ties: Ties | None = None
) -> np.ndarray:
    """Fill empty slots with replicas of the experts that most tokens on that rank go to; kept where it pays."""
    price = 0.0 if ties is None else ties.price_LE
    most_moves = np.inf if ties is None else ties.most_moves
    trace = judging_trace(problem, budget.time_limit)
    best = problem.evaluate(problem.placement(slots_LS), trace)
    limit_L = _limits(cap, best.imbalance_L)
    for layer in range(1, problem.num_layers):
        if budget.expired:
            break
        placement = problem.placement(slots_LS)
        trial_LS, paid = slots_LS.copy(), 0.0
        moves = 0 if ties is None else int(ties.moves(slots_LS, problem.cluster.rank_of_slot)[layer])
        arrive_RE = placement.copies_LER[layer - 1].T.astype(np.int64) @ problem.transitions_LEE[layer - 1]
        arrive_RE[placement.copies_LER[layer].T > 0] = 0
        for slot in np.flatnonzero(trial_LS[layer] < 0):
            rank = int(problem.cluster.rank_of_slot[slot])
            expert = int(arrive_RE[rank].argmax())
            if arrive_RE[rank, expert] > 0 and moves < most_moves:
                trial_LS[layer, slot] = expert
                arrive_RE[rank, expert] = 0
                moves += 1
                paid += price if isinstance(price, float) else float(price[layer, expert])
        trial = problem.evaluate(problem.placement(trial_LS), trace)
        if trial.copies_per_token + paid < best.copies_per_token and (trial.imbalance_L <= limit_L + 1e-9).all():
            slots_LS, best = trial_LS, trial
    return slots_LS
