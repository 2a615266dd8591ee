""" "stair": vllm-ascend's STAIR, written anew from the description in its pull request (vllm-ascend 16183).

FlashLB's model of loads over steps and its search of replicas, and beside them care for the placement in force:

    skip        layers without load or balanced well enough keep their slots
    alignment   the packed ranks take the names of those ranks in force that hold most of their experts (an assignment),
                and experts that stay keep their slots
    limits      every fetched expert has a source, the rank that has sent this target least; no pair of ranks carries
                more than `PER_PAIR`, no layer fetches more than the problem allows, or the layer is left as it is
    hysteresis  a layer changes only if its score falls by a share of what it is above 1

Without a placement in force it is FlashLB.

Shape letters: T steps, E experts of a layer, R ranks, C slots of a rank, S slots per layer.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.search.ties import ties_of
from moeplace.placement.solvers.flashlb import Search, loads_of_steps, solve_flashlb

BALANCED = 1.002
"""Score below which a layer is left as it is."""
HYSTERESIS = 0.05
"""Share of the score above 1 that a change must save."""
PER_PAIR = 2
"""Experts that one rank sends another in a layer."""


def solve_stair(problem: Problem, budget: Budget) -> Draft:
    """Layer by layer; blind to traffic, speeds and caps on load."""
    ties, capacity_R, kept = ties_of(problem), problem.cluster.slots_of_rank, 0
    if ties is None or problem.previous is None or ties.rows_LS.shape[1] != problem.cluster.num_slots:
        return solve_flashlb(problem, budget)
    same = np.array_equal(problem.previous.slots_of_rank, capacity_R)
    before_LS = problem.previous.slot_to_expert if same else ties.rows_LS  # the very slots, where ranks are the same
    slots_LS = before_LS.copy()
    for layer, steps_TE in enumerate(loads_of_steps(problem)):
        search, before_S = Search(steps_TE, capacity_R), before_LS[layer]
        score = search.score(before_S)
        if score <= BALANCED:
            continue
        after_S = aligned(before_S, search.best(budget), capacity_R)
        if not keeps_limits(before_S, after_S, capacity_R, ties.most_moves):
            kept += 1
        elif search.score(after_S) <= score - HYSTERESIS * (score - 1.0):
            slots_LS[layer] = after_S
    notes = (f"{kept} layers keep their slots: their plan breaks a limit on moves",) if kept else ()
    return Draft(slots_LS, "time_limit" if budget.expired else "feasible", notes=notes)


def aligned(before_S: np.ndarray, after_S: np.ndarray, capacity_R: np.ndarray) -> np.ndarray:
    """(S,) the same ranks under names of ranks of their size that hold most of their experts, in slots that stay."""
    ends = np.cumsum(capacity_R)[:-1]
    old, new = np.split(before_S, ends), np.split(after_S, ends)
    common_RR = np.array(
        [[-1.0 if len(a) != len(b) else len(np.intersect1d(a[a >= 0], b[b >= 0])) for b in new] for a in old]
    )
    _, of_R = linear_sum_assignment(common_RR, maximize=True)
    return np.concatenate([_in_place(a, new[source]) for a, source in zip(old, of_R, strict=True)])


def _in_place(old_C: np.ndarray, new_C: np.ndarray) -> np.ndarray:
    """(C,) the experts of `new_C`, those that stay in their slots."""
    stays_C = np.isin(old_C, new_C[new_C >= 0])
    placed_C = np.full(len(old_C), -1, old_C.dtype)
    placed_C[stays_C] = old_C[stays_C]
    comes = new_C[~np.isin(new_C, old_C[stays_C]) & (new_C >= 0)]
    placed_C[np.flatnonzero(~stays_C)[: len(comes)]] = comes
    return placed_C


def keeps_limits(before_S: np.ndarray, after_S: np.ndarray, capacity_R: np.ndarray, most_moves: float) -> bool:
    """Whether all that is fetched has sources within the limits, each the rank that has sent this target least."""
    rank_S, ranks = np.repeat(np.arange(len(capacity_R)), capacity_R), len(capacity_R)
    sent_RR, moves = np.zeros((ranks, ranks), np.int64), 0
    for target in range(ranks):
        new, old = after_S[rank_S == target], before_S[rank_S == target]
        for expert in np.setdiff1d(new[new >= 0], old):
            sources = rank_S[before_S == expert]
            source = sources[sent_RR[sources, target].argmin()]
            sent_RR[source, target] += 1
            moves += 1
    return moves <= most_moves and sent_RR.max(initial=0) <= PER_PAIR
