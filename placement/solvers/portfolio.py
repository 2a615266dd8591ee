""" "auto": the right searches for the problem, restarted until the budget is used.

    load only, or `allgather`       packing (traffic does not depend on the placement)
    `dispatch-combine`              every layer by itself (`layers.LayerSearch`), layers shared out to threads;
                                    then free alignment, which keeps primary experts in place at no cost
    `coherent`, one expert a token  the chain search over all layers, one restart per thread
    `coherent`, several             as dispatch-combine (2 d dominates), aligned by the owners' moves

The work is fixed by the time limit and the problem's size, not by the clock, so that a seed decides the placement; the
clock only stops machines too slow to finish it. `objective="seconds"` solves for several load caps and takes the
placement whose predicted step is shortest.

Shape letters: L MoE layers, E experts per layer, K top-k, R ranks, S slots per layer.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.solvers.alignment import align_ranks
from moeplace.placement.solvers.annealing import seed_state
from moeplace.placement.solvers.chain import anneal_chain, attraction, descend_chain
from moeplace.placement.solvers.index_order import solve_index_order
from moeplace.placement.solvers.layers import MOST_TOKENS, Effort, LayerSearch
from moeplace.placement.solvers.packing import solve_lpt
from moeplace.placement.solvers.robust import risk_matrix
from moeplace.placement.solvers.search_layout import (
    load_limits,
    packed_start,
    padded_load,
    padded_transitions,
    to_slots,
)
from moeplace.placement.stop import Budget

CHAIN_HEDGE = 1e-4
FILL = 0.7
"""Share of the time limit that the planned work should take on two unshared cores."""
FULL_SWEEPS = 300
_CAPS_FOR_SECONDS = (1.01, 1.05, 1.15, None)


def solve_portfolio(problem: Problem, budget: Budget) -> Draft:
    """See the module's docstring."""
    if problem.trace is None or problem.mode == "allgather" or problem.num_ranks == 1:
        return solve_lpt(problem, budget)
    if problem.objective == "traffic":
        slots_LS, cut = _search(problem, budget, problem.max_imbalance, 1.0)
        return Draft(slots_LS, "time_limit" if cut else "feasible")
    return _fastest(problem, budget)


def _fastest(problem: Problem, budget: Budget) -> Draft:
    """Solve for several load caps; keep the shortest predicted step. Index order and packing compete too."""
    hardest = problem.max_imbalance
    caps = [c for c in _CAPS_FOR_SECONDS if hardest is None or (c is not None and c <= hardest)] or [hardest]
    drafts = [solve_lpt(problem, budget).slot_to_expert]
    if hardest is None:
        drafts.append(solve_index_order(problem, budget).slot_to_expert)
    cut = False
    for cap in caps:
        if cut or budget.expired:
            break
        slots_LS, cut = _search(problem, budget, cap, 1.0 / len(caps))
        drafts.append(slots_LS)
    seconds = [problem.evaluate(problem.placement(d)).predicted_seconds for d in drafts]
    return Draft(drafts[int(np.argmin(seconds))], "time_limit" if cut else "feasible")


def _search(problem: Problem, budget: Budget, cap: float | None, share: float) -> tuple[np.ndarray, bool]:
    """(slots (L, S), whether the clock cut it short) for one load cap with a share of the budget."""
    seconds = budget.time_limit * share
    if problem.mode == "coherent" and problem.top_k == 1:
        return _chain_search(problem, budget, cap, seconds)
    slots_LS, cut = _layer_searches(problem, budget, cap, seconds)
    return _aligned(problem, slots_LS), cut


def threads() -> int:
    """Cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


def _layer_searches(problem: Problem, budget: Budget, cap: float | None, seconds: float) -> tuple[np.ndarray, bool]:
    """Rounds of one run per layer, a quick one first so that there is always a placement; the best run of each."""
    efforts = round_efforts(problem, seconds)
    deadline = budget.elapsed + seconds
    best: list[tuple[float, np.ndarray]] = [(np.inf, row) for row in solve_lpt(problem, budget).slot_to_expert]
    searches: dict[int, LayerSearch] = {}
    took = [0.0] * problem.num_layers

    def one(job: tuple[int, int]) -> bool:
        number, layer = job
        before = budget.elapsed
        if before + took[layer] > min(deadline, budget.time_limit):
            return True
        effort = efforts[number]
        if layer not in searches:
            searches[layer] = LayerSearch(problem, layer, cap, effort.hedge if cap is not None else 0.0)
        found = searches[layer].run(effort, budget.rng(layer, number))
        if found[0] < best[layer][0]:
            best[layer] = found
        took[layer] = 0.9 * (budget.elapsed - before)
        return False

    jobs = [(number, layer) for number in range(len(efforts)) for layer in range(problem.num_layers)]
    cut = False
    with ThreadPoolExecutor(threads()) as pool:
        for done, stopped in enumerate(pool.map(one, jobs)):
            cut |= stopped
            budget.report((done + 1) / len(jobs))
    return np.stack([row for _, row in best]), cut


def round_efforts(problem: Problem, seconds: float) -> list[Effort]:
    """A quick round, then as many full ones as fill `seconds`, by the rates measured below."""
    assert problem.trace is not None
    per_layer = FILL * seconds * threads() / problem.num_layers
    tokens = min(problem.trace.num_tokens, MOST_TOKENS)
    slots, top_k = problem.cluster.num_slots, problem.top_k
    levels = 2.5 if problem.cluster.num_nodes > 1 else 1.0
    # One run: a proposal costs 10 ns; an accepted swap touches the tokens of two experts, 3 ns per expert of each.
    per_sweep = 12 * (slots * (slots - 1) / 2) * 10e-9 * levels
    accepted = 60.0 * slots * (2 * tokens * top_k / slots) * top_k * 3e-9 * levels
    redundant = int(problem.redundant_slots.max())
    touches = 0
    if redundant > 0:
        touches = int(0.5 * per_layer / 40e-9)
        per_layer *= 0.5
    quick = int(np.clip(0.1 * per_layer / per_sweep, 4, 40))
    rounds = int(per_layer / (FULL_SWEEPS * per_sweep + accepted))
    efforts = [Effort(sweeps=quick, touches=touches // (4 * max(rounds, 1)))]
    if rounds == 0:
        middle = int(per_layer / (per_sweep + accepted / FULL_SWEEPS))
        return [*efforts, Effort(sweeps=middle, touches=touches)] if middle > quick else efforts
    return efforts + [Effort(sweeps=FULL_SWEEPS, touches=touches // rounds)] * rounds


def _chain_search(problem: Problem, budget: Budget, cap: float | None, seconds: float) -> tuple[np.ndarray, bool]:
    """Coherent mode, one expert per token: restarts of the chain search, the best by train cost."""
    starts = [packed_start(problem, layer) for layer in range(problem.num_layers)]
    limit_LR = np.stack([load_limits(problem, layer, s, cap) for layer, s in enumerate(starts)])
    load_LS = np.stack([padded_load(problem, layer) for layer in range(problem.num_layers)])
    flow_LSS = padded_transitions(problem)
    cost_RR = np.ascontiguousarray(problem.cluster.cost_RR)
    slots, ranks = problem.cluster.num_slots, problem.num_ranks
    assert problem.trace is not None
    risk_LSS = np.stack([
        risk_matrix(problem.trace, problem.trace.layer(layer), slots, ranks, CHAIN_HEDGE if cap else 0.0)
        for layer in range(problem.num_layers)
    ])  # fmt: skip
    hot = 6.0 * problem.load_LE.sum() / (problem.num_layers * slots) / 15
    proposals = int(0.6 * seconds / (60e-9 + 1.5e-9 * slots))
    start_LS = np.stack(starts)
    descend_chain(start_LS, flow_LSS, cost_RR, np.zeros((problem.num_layers, slots, ranks)))

    def one(run: int) -> tuple[float, np.ndarray]:
        rank_LS = start_LS.copy()
        table_LSR = attraction(rank_LS, flow_LSS, cost_RR)
        anneal_chain(
            rank_LS, flow_LSS, cost_RR, table_LSR, load_LS, limit_LR, risk_LSS, hot, max(hot / 100, 0.5), proposals,
            seed_state(budget.rng(run)),
        )  # fmt: skip
        return _chain_value(rank_LS, flow_LSS, cost_RR, load_LS, limit_LR), rank_LS

    with ThreadPoolExecutor(threads()) as pool:
        found = list(pool.map(one, range(max(2, threads()))))
    budget.report(1.0)
    rank_LS = min(found, key=lambda pair: pair[0])[1]
    rows = [to_slots(r, int(e)) for r, e in zip(rank_LS, problem.experts_per_layer, strict=True)]
    return np.stack(rows), False


def _chain_value(
    rank_LS: np.ndarray, flow_LSS: np.ndarray, cost_RR: np.ndarray, load_LS: np.ndarray, limit_LR: np.ndarray
) -> float:
    total = 0.0
    for layer in range(len(rank_LS)):
        load_R = np.bincount(rank_LS[layer], load_LS[layer], minlength=len(cost_RR))
        total += 1e3 * float(np.maximum(load_R - limit_LR[layer], 0.0).sum())
        if layer + 1 < len(rank_LS):
            total += float((flow_LSS[layer] * cost_RR[np.ix_(rank_LS[layer], rank_LS[layer + 1])]).sum())
    return total


def _aligned(problem: Problem, slots_LS: np.ndarray) -> np.ndarray:
    """Rename ranks layer by layer so that primary experts stay in place; traffic and balance do not change."""
    placement = problem.placement(slots_LS)
    if problem.cluster.distance_RR is not None:
        return slots_LS  # names matter
    flow_LRR = primary_flow(problem, placement)
    return rename_ranks(slots_LS, align_ranks(flow_LRR, problem.cluster), problem)


def primary_flow(problem: Problem, placement: Placement) -> np.ndarray:
    """(L-1, R, R) tokens whose primary expert is on rank i, then on rank j (first replica)."""
    ranks = problem.num_ranks
    flow = np.zeros((problem.num_layers - 1, ranks, ranks))
    for layer, counts_EE in enumerate(problem.transitions_LEE):
        before, after = placement.rank_of_expert[layer], placement.rank_of_expert[layer + 1]
        i, j = np.nonzero(counts_EE)
        np.add.at(flow[layer], (before[i], after[j]), counts_EE[i, j])
    return flow


def rename_ranks(slots_LS: np.ndarray, names_LR: np.ndarray, problem: Problem) -> np.ndarray:
    """Move every rank's experts to the rank of its new name."""
    rank_of_slot = problem.cluster.rank_of_slot
    renamed = np.empty_like(slots_LS)
    for layer, names_R in enumerate(names_LR):
        for rank, name in enumerate(names_R):
            renamed[layer, rank_of_slot == name] = slots_LS[layer, rank_of_slot == rank]
    return renamed
