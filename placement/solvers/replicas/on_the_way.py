"""Replicas for `coherent` mode with one expert per token: in empty slots, where tokens pass.

Shape letters: L MoE layers, E experts of a layer, R ranks, S slots per layer.
"""

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.solvers.chain.driver import search_chain
from moeplace.placement.solvers.replicas.survival import (
    add_surviving_replicas,
    balance_replicas,
    first_cluster,
    to_rows,
)

_PACKINGS = 5


def search_chain_with_replicas(
    problem: Problem, budget: Budget, cap: float | None, seconds: float
) -> tuple[np.ndarray, bool]:
    """(slots (L, S), whether the clock cut the search short): the chain search, then replicas in slots left over."""
    slots_LS, cut = search_chain(problem, budget, cap, seconds)
    if (problem.redundant_slots > 0).any():
        slots_LS = add_replicas_on_the_way(problem, slots_LS, cap)
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
    if cap is not None:
        packed = problem.placement(packed_LS)
        caps_L = np.maximum(cap, problem.evaluate(packed).imbalance_L)
        for _ in range(_PACKINGS):
            balance_replicas(problem, held_LER, caps_L)
            slots_LS = to_rows(problem, held_LER)
            over_L = problem.evaluate(problem.placement(slots_LS)).imbalance_L > caps_L + 1e-9
            if not over_L.any() or budget.expired:
                break
            held_LER[over_L] = packed.copies_LER[over_L] > 0
    slots_LS = add_replicas_on_the_way(problem, slots_LS, cap)
    ours, theirs = (problem.evaluate(problem.placement(each)).copies_per_token for each in (slots_LS, packed_LS))
    return (slots_LS if ours <= theirs else packed_LS), cut


def add_replicas_on_the_way(problem: Problem, slots_LS: np.ndarray, cap: float | None) -> np.ndarray:
    """Fill empty slots with replicas of the experts that most tokens on that rank go to; kept where it pays."""
    best = problem.evaluate(problem.placement(slots_LS))
    limit_L = np.full(problem.num_layers, np.inf) if cap is None else np.maximum(cap, best.imbalance_L)
    for layer in range(1, problem.num_layers):
        placement = problem.placement(slots_LS)
        trial_LS = slots_LS.copy()
        arrive_RE = placement.copies_LER[layer - 1].T.astype(np.int64) @ problem.transitions_LEE[layer - 1]
        arrive_RE[placement.copies_LER[layer].T > 0] = 0
        for slot in np.flatnonzero(trial_LS[layer] < 0):
            rank = int(problem.cluster.rank_of_slot[slot])
            expert = int(arrive_RE[rank].argmax())
            if arrive_RE[rank, expert] > 0:
                trial_LS[layer, slot] = expert
                arrive_RE[rank, expert] = 0
        trial = problem.evaluate(problem.placement(trial_LS))
        if trial.copies_per_token < best.copies_per_token and (trial.imbalance_L <= limit_L + 1e-9).all():
            slots_LS, best = trial_LS, trial
    return slots_LS
