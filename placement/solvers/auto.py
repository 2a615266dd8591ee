""" "auto": the right searches for the problem, restarted until the budget is used.

    few states per layer            Viterbi over all partitions, proven optimal
    load only                       packing, then annealing until the bound is met or the time is used (`balance`)
    `allgather`                     packing (traffic does not depend on the placement)
    `dispatch-combine`              every layer by itself (`layer.LayerSearch`), layers shared out to threads;
                                    then free alignment, which keeps primary experts in place at no cost
    `coherent`, one expert a token  the chain search over all layers, one restart per thread
    `coherent`, several             as dispatch-combine (2 d dominates), aligned by the owners' moves, then swept with
                                    the exact objective (`chain.owner_sweeps`)

`objective="seconds"` solves for several load caps and takes the placement whose predicted step is shortest
(`seconds.fastest`). How the time is used: `schedule`.

Shape letters: L MoE layers, S slots per layer.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moeplace.placement.bounds.problem import held_imbalance
from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.search.alignment import aligned
from moeplace.placement.search.sample import judging_trace
from moeplace.placement.search.ties import Ties, ties_of
from moeplace.placement.solvers.balance import solve_balance
from moeplace.placement.solvers.chain.owner_sweeps import applies, sweep_owners
from moeplace.placement.solvers.exact.viterbi import fits, solve_viterbi
from moeplace.placement.solvers.judge import Judge
from moeplace.placement.solvers.lpt import rebalanced, solve_lpt
from moeplace.placement.solvers.replicas.budget import search_budget, with_steps
from moeplace.placement.solvers.replicas.drawn import ADDING_SHARE, choose_rows, rows_within
from moeplace.placement.solvers.replicas.drawn import applies as is_drawn
from moeplace.placement.solvers.replicas.on_the_way import search_chain_with_replicas, search_surviving_chain
from moeplace.placement.solvers.replicas.running import keep_caps_by_rule
from moeplace.placement.solvers.schedule import search_layers, searches_within
from moeplace.placement.solvers.seconds import fastest
from moeplace.placement.solvers.spare import FILLING, use_all_slots, widened, without_spare

_MENDING = 77
"""Key of the random numbers with which layers above their caps are mended."""
OWNERS_SHARE = 0.2
"""Of the time, for sweeps that see where tokens are: what the search by layers gains in it is less (solvers.md)."""
_REPLICATED_SHARE = 0.15
"""Share of the time for replicas as moeplace would use them where an engine draws among replicas."""
_NARROW_SHARE = 0.25
"""Share of the time for a search with fewer slots where slots are to spare: it needs less to settle."""


def solve_portfolio(problem: Problem, budget: Budget) -> Draft:
    """See the module's docstring."""
    ties = _mended(problem, ties_of(problem))
    if problem.trace is None and problem.previous is None:
        return solve_balance(problem, budget)
    judge = Judge(problem, ties, held_imbalance(problem), budget.time_limit)
    if problem.trace is None or problem.mode == "allgather" or problem.num_ranks == 1:
        drafts, note = [solve_lpt(problem, budget).slot_to_expert], ""
        narrow = without_spare(problem)
        if narrow is not None:  # split by the rule of the runtime, a load need not be as even as packing has it
            drafts.append(widened(problem, narrow, solve_lpt(narrow, budget).slot_to_expert))
            slots_LS, note = use_all_slots(problem, drafts, ties, judge, judge.best, budget.rng(FILLING))
            drafts = [slots_LS]
        return Draft(drafts[0], notes=(note,) if note else ())
    if fits(problem) and (ties is None or not ties.bind):
        return solve_viterbi(problem, budget)
    if problem.objective == "traffic":
        drafts, cut = search(problem, budget, problem.max_imbalance, 1.0, ties)
        slots_LS, note = use_all_slots(problem, drafts, ties, judge, judge.best, budget.rng(FILLING))
        return Draft(slots_LS, "time_limit" if cut else "feasible", notes=(note,) if note else ())
    return fastest(problem, budget, search, ties)


def _mended(problem: Problem, ties: Ties | None) -> Ties | None:
    """The ties with rows that keep the load cap as far as so few moves can: searches begin where they may end."""
    if ties is None or problem.max_imbalance is None:
        return ties
    most = None if np.isinf(ties.most_moves) else int(ties.most_moves)
    return replace(ties, rows_LS=rebalanced(problem, ties, most), stay_LS=ties.rows_LS)


def search(
    problem: Problem, budget: Budget, cap: float | None, share: float, ties: Ties | None
) -> tuple[list[np.ndarray], bool]:
    """(drafts (L, S), whether the clock cut it short) for one load cap with a share of the budget.

    With spare slots there are two, that for all slots and that without replicas, which may well be better, and where
    layers are independent a third that has each layer's better one: one layer that replicas cannot hold to its cap must
    not cost all others theirs.
    """
    narrow = without_spare(problem)
    bound = ties is not None and ties.bind
    capped = problem.replace(objective="traffic", max_imbalance=cap)
    caps_L = held_imbalance(capped)
    if is_drawn(problem) and not bound and problem.replica_budget == "per-layer" and not budget.expired:
        return _search_drawn(problem, budget, cap, share, caps_L)
    if narrow is None or problem.replica_budget == "global" or bound or budget.expired:
        slots_LS, cut = _search(problem, budget, cap, share, ties)
        return [slots_LS], cut
    slots_LS, cut = _search(problem, budget, cap, share * (1 - _NARROW_SHARE), ties)
    if caps_L is not None:
        with budget.alarm(budget.remaining) as stop:
            slots_LS = keep_caps_by_rule(problem, slots_LS, caps_L, budget.rng(_MENDING), stop)
    fewer_LS, also_cut = _search(narrow, budget, cap, share * _NARROW_SHARE, None)
    drafts = [slots_LS, widened(problem, narrow, fewer_LS)]
    mixed = Judge(capped, ties, caps_L, budget.time_limit).combine(drafts)
    return drafts if mixed is None else [*drafts, mixed], cut or also_cut


def _search_drawn(
    problem: Problem, budget: Budget, cap: float | None, share: float, caps_L: np.ndarray | None
) -> tuple[list[np.ndarray], bool]:
    """`search` where an engine draws among replicas: most of the time goes to ranks of unequal numbers of experts.

    That plan, the best with one slot per rank fewer, and one with replicas as moeplace would use them are given each
    layer's choice, with replicas added where they save under the rule. The last draft is the outcome; the first one has
    no slots to spare where that can be: experts in even numbers, whose weights are read faster.
    """
    drafts: list[np.ndarray] = []
    replicated_LS, cut = _search(problem, budget, cap, _REPLICATED_SHARE * share, None)
    left = share * (1 - _REPLICATED_SHARE - ADDING_SHARE)
    if problem.spare_per_rank:
        drafts, also_cut = _with_fewer_slots(problem, budget, cap, share * _NARROW_SHARE, caps_L)
        cut |= also_cut
        left -= share * _NARROW_SHARE
    found, also_cut = search_layers(problem, budget, cap, left * budget.time_limit, plain=True)
    drafts += [replicated_LS, aligned(problem, np.stack([row for _, row in found]))]
    with budget.alarm(budget.remaining) as stop:
        rows = [[draft[layer] for draft in drafts] for layer in range(problem.num_layers)]
        trace = judging_trace(problem, budget.time_limit)
        adding = rows_within(problem, trace.num_tokens, budget.time_limit * share)
        drafts.append(choose_rows(problem, trace, caps_L, rows, adding, stop))
        cut |= bool(stop[0])
    return drafts, cut or also_cut


def _with_fewer_slots(
    problem: Problem, budget: Budget, cap: float | None, share: float, caps_L: np.ndarray | None
) -> tuple[list[np.ndarray], bool]:
    """([the plan with none to spare, the best with one slot per rank fewer], whether they were cut short).

    Both are one where one slot is to spare, or where there is no time for more.
    """
    pays = searches_within(problem, share * budget.time_limit) > 1
    narrow = with_steps(problem, -1 if pays else -problem.spare_per_rank)
    if is_drawn(narrow) and not budget.expired:
        drafts, cut = _search_drawn(narrow, budget, cap, share, caps_L)
        drafts = [drafts[0], drafts[-1]]
    else:
        found, cut = search(narrow, budget, cap, share, None)
        drafts = [found[-1]]
    return [widened(problem, narrow, draft) for draft in drafts], cut


def _search(
    problem: Problem, budget: Budget, cap: float | None, share: float, ties: Ties | None
) -> tuple[np.ndarray, bool]:
    seconds = budget.time_limit * share
    if problem.mode == "coherent" and problem.top_k == 1 and problem.survive:
        return search_surviving_chain(problem, budget, cap, seconds)
    if problem.mode == "coherent" and problem.top_k == 1:
        return search_chain_with_replicas(problem, budget, cap, seconds, ties)
    if problem.replica_budget == "global" and problem.mode == "dispatch-combine":
        return _budgeted(problem, budget, cap, seconds)
    owners = applies(problem)
    found, cut = search_layers(problem, budget, cap, seconds * (1 - OWNERS_SHARE if owners else 1.0), ties=ties)
    slots_LS = np.stack([row for _, row in found])
    bound = ties is not None and ties.bind
    drafts = [slots_LS if bound else aligned(problem, slots_LS)]
    if owners and not bound:
        drafts.append(sweep_owners(problem, budget, drafts[0], cap, OWNERS_SHARE * seconds))
    if problem.mode == "coherent" and (problem.redundant_slots > 0).any():
        # With copies a token stays where its experts happen to be: fewer ranks per token need not mean fewer copies.
        drafts += [slots_LS, solve_lpt(problem, budget).slot_to_expert]
    return _least_traffic(problem, budget, drafts, cap, ties), cut


def _least_traffic(
    problem: Problem, budget: Budget, drafts: Sequence[np.ndarray], cap: float | None, ties: Ties | None
) -> np.ndarray:
    """The draft of least traffic among those whose layers exceed the cap least."""
    caps_L = None if cap is None else np.full(problem.num_layers, cap)
    return Judge(problem.replace(objective="traffic"), ties, caps_L, budget.time_limit).best(drafts)


def _budgeted(problem: Problem, budget: Budget, cap: float | None, seconds: float) -> tuple[np.ndarray, bool]:
    """The search with the redundant slots of all layers shared out, see `replica_budget`."""
    cuts = []

    def some_layers(part: Problem, layers: Sequence[int], share: float) -> list[tuple[float, np.ndarray]]:
        found, cut = search_layers(part, budget, cap, share * seconds, layers)
        cuts.append(cut)
        return found

    caps_L = held_imbalance(problem.replace(max_imbalance=cap))

    def exceeds(part: Problem, slots_LS: np.ndarray) -> np.ndarray:
        over_L: np.ndarray = Judge(part, None, None, budget.time_limit).imbalance(slots_LS) - caps_L
        return over_L

    slots_LS = search_budget(problem, some_layers, None if caps_L is None else exceeds)
    wide = problem.replace(cluster=problem.layout, replica_budget="per-layer", previous=None, max_moves=None)
    return aligned(wide, slots_LS), any(cuts)
