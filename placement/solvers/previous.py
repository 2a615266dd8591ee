"""Solving again from a placement in force: names that keep weights in place, and nothing that is worse than staying.

Whatever a solver hands in competes with the placement in force (where the cluster has changed: with the fewest moves
from it) and with mixtures of both, layer by layer. Constraints go first, then the objective with the price of its
moves, then fewer moves.

Shape letters: L MoE layers, S slots per layer.
"""

from dataclasses import replace

import numpy as np

from moeplace.placement.migration.relabel import least_bytes, moved_bytes, moves, relabel_to, seat_to
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.search.ties import Ties, ties_of
from moeplace.placement.solvers.judge import Judge


def keep_close(problem: Problem, draft: Draft, caps_L: np.ndarray | None, seconds: float) -> Draft:
    """The draft or what is better near the previous placement, experts that stay in their slots.

    Args:
        problem: has a previous placement.
        draft: of any solver.
        caps_L: (L,) imbalance that each layer is held to, None = any.
        seconds: the time limit.

    Raises:
        InfeasibleError: the change of cluster alone needs more moves than allowed.
    """
    previous, ties = problem.previous, ties_of(problem, wide=True)
    assert previous is not None
    assert ties is not None
    judge = Judge(problem, ties, caps_L, seconds)
    drafts = [ties.rows_LS, draft.slot_to_expert, *_named(problem, previous, draft.slot_to_expert)]
    drafts += [_within(problem, ties, each) for each in drafts[1:] if each.shape == ties.rows_LS.shape]
    mixed = judge.combine(drafts)
    best = judge.best(drafts if mixed is None else [*drafts, mixed])
    if judge.sampled:  # whether it beats staying is decided on all tokens
        judge = judge.on_all_tokens()
        best = judge.best([ties.rows_LS, best])
    wide = best.shape[1] == problem.layout.num_slots
    status = draft.status
    if status == "optimal" and judge.objective(best) > judge.objective(draft.slot_to_expert):
        status = "feasible"
    cluster = problem.layout if wide else problem.cluster
    return replace(draft, slot_to_expert=seat_to(previous, best, cluster), status=status)


def moved_summary(problem: Problem, placement: Placement) -> dict[str, float] | None:
    """What a change from the previous placement moves, and the least that this change of cluster must move."""
    if problem.previous is None:
        return None
    fetched_L = moves(problem.previous, placement)
    return {
        "moves_per_layer_mean": float(fetched_L.mean()),
        "moves_per_layer_most": float(fetched_L.max()),
        "bytes": float(moved_bytes(problem.previous, placement, expert_bytes=problem.expert_bytes)),
        "least_bytes": float(least_bytes(problem.previous, problem.cluster, expert_bytes=problem.expert_bytes)),
    }


def _named(problem: Problem, previous: Placement, slots_LS: np.ndarray) -> list[np.ndarray]:
    """The draft under the names of ranks that move the fewest bytes."""
    wide = slots_LS.shape[1] == problem.layout.num_slots
    cluster = problem.layout if wide else problem.cluster
    per_layer = problem.mode != "coherent"
    return [relabel_to(previous, slots_LS, cluster, per_layer=per_layer, expert_bytes=problem.expert_bytes)]


def _within(problem: Problem, ties: Ties, slots_LS: np.ndarray) -> np.ndarray:
    """The draft's rows where they keep to the cap on moves, elsewhere the start's."""
    wide = slots_LS.shape[1] == problem.layout.num_slots
    rank_of_slot = (problem.layout if wide else problem.cluster).rank_of_slot
    over_L = ties.moves(slots_LS, rank_of_slot) > ties.most_moves
    return np.where(over_L[:, None], ties.rows_LS, slots_LS)
