"""Slots beyond one per expert: a plan for fewer slots is a plan for more, and none stays empty that can be used.

Shape letters: L MoE layers, E experts, R ranks, S slots per layer.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, with_slots
from moeplace.placement.problem import CAP_ROUNDING, Problem
from moeplace.placement.search.ties import Ties
from moeplace.placement.solvers.judge import Judge
from moeplace.placement.solvers.replicas.budget import with_steps
from moeplace.placement.solvers.replicas.drawn import applies as draws_replicas
from moeplace.placement.solvers.replicas.running import keep_caps_by_rule

FILLING = 79
"""Key of the random numbers with which layers are mended whose slots were filled."""

Choose = Callable[[Sequence[np.ndarray]], np.ndarray]
_WORTH_SAYING = 0.001
_STAY_EMPTY = "slots stay empty: "
_BREAKS = "replicas there break a constraint"


def without_spare(problem: Problem) -> Problem | None:
    """The problem with as many slots fewer per rank as every layer can do without; None if there are none."""
    spare = problem.spare_per_rank
    return with_steps(problem, -spare) if spare else None


def widened(problem: Problem, narrow: Problem, slots_LS: np.ndarray) -> np.ndarray:
    """(L, S) a plan for fewer slots in the problem's own, the further ones empty."""
    return with_slots(narrow.placement(slots_LS), problem.cluster.slots_of_rank).slot_to_expert


def use_all_slots(
    problem: Problem,
    drafts: Sequence[np.ndarray],
    ties: Ties | None,
    judge: Judge,
    choose: Choose,
    rng: np.random.Generator,
) -> tuple[np.ndarray, str]:
    """(the best draft with every slot used, a sentence on what that costs or why some stay empty).

    Engines start with a number of slots and need an expert in each of them. Every empty slot gets the expert of the
    largest load per replica that its rank lacks, which helps balance most, or the one of the smallest load, which
    changes least: the better of both, layer by layer where that can be. Layers that exceed their cap then are mended,
    however much time is left; their slots stay empty where that is no help. Others stay empty where the problem says
    so, where the problem's rule draws among replicas and one costs more than it saves (files of such engines repeat an
    expert of the rank), and in `coherent` mode, which no engine runs, where replicas draw tokens away from where they
    are.
    """
    sparse = [draft for draft in drafts if (draft == EMPTY_SLOT).any()]
    if not sparse or problem.leave_empty or problem.replica_budget == "global":
        return choose(drafts), ""
    if draws_replicas(problem):
        best = choose(drafts)
        empty, rule = int((best == EMPTY_SLOT).sum()), problem.replica_rule.name
        note = f"{empty} {_STAY_EMPTY}by the replica rule {rule} a replica there costs more than it saves"
        return best, note if empty else ""
    least = choose(sparse)
    fills = [_fill(problem, least, ties, heaviest) for heaviest in (True, False)]
    mixed = judge.combine(fills)
    filled = judge.best(fills if mixed is None else [*fills, mixed])
    (broken, before, _), breaks = judge.key(least), judge.key(filled)[0]
    if breaks > broken and judge.sampled:  # the loads of a few tokens say little about a cap
        judge = judge.on_all_tokens()
        (broken, before, _), breaks = judge.key(least), judge.key(filled)[0]
    still = int((filled == EMPTY_SLOT).sum())  # where moves run out
    if breaks > broken:
        filled = _mended(problem, least, filled, judge, rng)
        breaks = judge.key(filled)[0]
    if problem.mode == "coherent":
        best = choose([*drafts, filled] if breaks <= broken else drafts)
        empty = int((best == EMPTY_SLOT).sum())
        why = "replicas there cost more than they save" if breaks <= broken else _BREAKS
        return best, f"{empty} {_STAY_EMPTY}{why}" if empty else ""
    full = [draft for draft in drafts if not (draft == EMPTY_SLOT).any()]
    if breaks > broken or int((filled == EMPTY_SLOT).sum()) > still:
        full = [draft for draft in full if judge.key(draft)[0] <= broken]
        best = choose(full or [*drafts, filled])
        empty = int((best == EMPTY_SLOT).sum())
        if empty:
            return best, f"{empty} {_STAY_EMPTY}{_BREAKS}"
    else:
        best = choose([*full, filled])
    cost = judge.key(best)[1] / before - 1 if before > 0 else 0.0
    if judge.key(best)[0] > broken or cost < _WORTH_SAYING:
        return best, ""
    return best, (
        f"replicas cost more than they save here: with every slot used the objective is {cost:.1%} above that of the "
        "same plan with empty slots; solve with fewer slots per rank, or leave slots empty"
    )


def _mended(
    problem: Problem, sparse_LS: np.ndarray, filled_LS: np.ndarray, judge: Judge, rng: np.random.Generator
) -> np.ndarray:
    """The filled plan with layers mended that exceed their cap, and with those emptied again that cannot be.

    The clock has no say: by how much a search was cut short must not decide whether an engine can take its plan. Where
    moves are counted nothing is mended, as each may be one too many.
    """
    caps_L = judge.caps_L
    if caps_L is None or problem.trace is None:
        return filled_LS
    if problem.max_moves is None and not problem.move_price:
        filled_LS = keep_caps_by_rule(problem, filled_LS, caps_L, rng, np.zeros(1, np.uint8))
    if problem.mode == "coherent":  # what a layer's replicas do depends on the layers before
        return filled_LS
    excess_L, before_L = (judge.imbalance(slots_LS) - caps_L for slots_LS in (filled_LS, sparse_LS))
    worse_L = (excess_L > CAP_ROUNDING) & (excess_L > before_L)
    return np.where(worse_L[:, None], sparse_LS, filled_LS)


def count_empty_again(notes: Sequence[str], slots_LS: np.ndarray) -> tuple[str, ...]:
    """Notes of a plan that was mended since: the slots that stay empty now, or nothing of them."""
    empty, counted = int((slots_LS == EMPTY_SLOT).sum()), []
    for note in notes:
        _, found, why = note.partition(_STAY_EMPTY)
        if not found or empty:
            counted.append(f"{empty} {_STAY_EMPTY}{why}" if found else note)
    return tuple(counted)


def _fill(problem: Problem, slots_LS: np.ndarray, ties: Ties | None, heaviest: bool) -> np.ndarray:
    filled_LS, rank_of_slot = slots_LS.copy(), problem.cluster.rank_of_slot
    for layer, row_S in enumerate(filled_LS):
        experts = int(problem.experts_per_layer[layer])
        load_E = problem.load_LE[layer, :experts]
        left = np.inf if ties is None else ties.most_moves - ties.moves(filled_LS, rank_of_slot)[layer]
        replicas_E = np.bincount(row_S[row_S >= 0], minlength=experts)
        for slot in np.flatnonzero(row_S == EMPTY_SLOT):
            rank = rank_of_slot[slot]
            share_E = load_E / replicas_E if heaviest else -load_E
            open_E = np.ones(experts, bool)
            open_E[row_S[(rank_of_slot == rank) & (row_S >= 0)]] = False
            if ties is not None and left <= 0:
                open_E &= ~ties.new_LER[layer, :experts, rank]
            if not open_E.any():
                continue
            expert = int(np.where(open_E, share_E, -np.inf).argmax())
            left -= 0 if ties is None else int(ties.new_LER[layer, expert, rank])
            row_S[slot] = expert
            replicas_E[expert] += 1
    return filled_LS
