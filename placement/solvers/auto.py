""" "auto": the right searches for the problem, restarted until the budget is used.

    few states per layer            Viterbi over all partitions, proven optimal
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.objective import traffic
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.search.alignment import align_ranks
from moeplace.placement.search.annealing import COOLING_STEPS, seed_state
from moeplace.placement.search.hedge import risk_matrix
from moeplace.placement.search.layout import (
    load_limits,
    packed_start,
    padded_load,
    padded_transitions,
    to_slots,
)
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.solvers.chain.search import anneal_chain, attraction, descend_chain
from moeplace.placement.solvers.exact.viterbi import fits, solve_viterbi
from moeplace.placement.solvers.index_order import solve_index_order
from moeplace.placement.solvers.layer.search import MOST_TOKENS, Effort, LayerSearch
from moeplace.placement.solvers.lpt import solve_lpt
from moeplace.placement.solvers.replicas.budget import search_budget
from moeplace.placement.solvers.replicas.survival import add_surviving_copies, balance_copies, first_slots, to_rows

CHAIN_HEDGE = 0.002
COPY_HEDGE = 0.01
"""Copies let the search fit the sample more closely, so they need a stronger hedge than `Effort`'s."""
CHAIN_ROUNDS = 2
"""Restarts of the chain search, one after another on every thread."""
FILL = 0.7
"""Share of the time limit that the planned work should take on two unshared cores."""
FULL_SWEEPS = 300
_PRICINGS = 40
ETA = float(os.environ.get("ETA", "0.1"))
_PACKINGS = 5
LEAST_FACTOR = 0.05
"""A run shortened below this share of its plan is not worth starting."""
_CAPS_FOR_SECONDS = (1.01, 1.05, 1.15, None)


def solve_portfolio(problem: Problem, budget: Budget) -> Draft:
    """See the module's docstring."""
    if problem.trace is None or problem.mode == "allgather" or problem.num_ranks == 1:
        return solve_lpt(problem, budget)
    if fits(problem):
        return solve_viterbi(problem, budget)
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
        if budget.expired:
            cut = True
            break
        slots_LS, shortened = _search(problem, budget, cap, 1.0 / len(caps))
        cut |= shortened
        drafts.append(slots_LS)
    seconds = [problem.evaluate(problem.placement(d)).predicted_seconds for d in drafts]
    return Draft(drafts[int(np.argmin(seconds))], "time_limit" if cut else "feasible")


def _search(problem: Problem, budget: Budget, cap: float | None, share: float) -> tuple[np.ndarray, bool]:
    """(slots (L, S), whether the clock cut it short) for one load cap with a share of the budget."""
    seconds = budget.time_limit * share
    if problem.mode == "coherent" and problem.top_k == 1 and problem.survive:
        return _surviving_chain(problem, budget, cap, seconds)
    if problem.mode == "coherent" and problem.top_k == 1:
        return _chain_search(problem, budget, cap, seconds)
    if problem.replica_budget == "global" and problem.mode == "dispatch-combine":
        return _budgeted(problem, budget, cap, seconds)
    found, cut = _layer_searches(problem, budget, cap, seconds)
    slots_LS = np.stack([row for _, row in found])
    drafts = [_aligned(problem, slots_LS)]
    if problem.mode == "coherent" and (problem.redundant_slots > 0).any():
        # With copies a token stays where its experts happen to be: fewer ranks per token need not mean fewer copies.
        drafts += [slots_LS, solve_lpt(problem, budget).slot_to_expert]
    return _least_traffic(problem, drafts, cap), cut


def _least_traffic(problem: Problem, drafts: Sequence[np.ndarray], cap: float | None) -> np.ndarray:
    """The draft of least traffic among those whose layers exceed the cap least."""

    def key(slots_LS: np.ndarray) -> tuple[float, float]:
        evaluation = problem.evaluate(problem.placement(slots_LS))
        over = 0.0 if cap is None else float(np.maximum(evaluation.imbalance_L - cap, 0.0).sum())
        return round(over, 2), traffic(problem, evaluation)

    return min(drafts, key=key) if len(drafts) > 1 else drafts[0]


def _budgeted(problem: Problem, budget: Budget, cap: float | None, seconds: float) -> tuple[np.ndarray, bool]:
    """`_search` with the redundant slots of all layers shared out, see `replica_budget`."""
    cuts = []

    def search(part: Problem, layers: Sequence[int], share: float) -> list[tuple[float, np.ndarray]]:
        found, cut = _layer_searches(part, budget, cap, share * seconds, layers)
        cuts.append(cut)
        return found

    slots_LS = search_budget(problem, search)
    wide = problem.replace(cluster=problem.layout, replica_budget="per-layer", previous=None, max_moves=None)
    return _aligned(wide, slots_LS), any(cuts)


def threads() -> int:
    """Cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


def _layer_searches(
    problem: Problem, budget: Budget, cap: float | None, seconds: float, layers: Sequence[int] | None = None
) -> tuple[list[tuple[float, np.ndarray]], bool]:
    """Rounds of one run per layer, a quick one first so that there is always a placement; the best run of each.

    Returns (objective, (S,) slots) of each of the layers (by default all), and whether the clock cut the work short.

    On a machine too slow for the planned work the first full round is shortened and later ones are dropped.
    """
    deadline = min(budget.elapsed + seconds, budget.time_limit)
    with budget.alarm(deadline - budget.elapsed) as stop:
        chosen = range(problem.num_layers) if layers is None else layers
        return _rounds(problem, budget, cap, seconds, deadline, chosen, stop)


def _rounds(
    problem: Problem, budget: Budget, cap: float | None, seconds: float, deadline: float, layers: Sequence[int],
    stop: np.ndarray,
) -> tuple[list[tuple[float, np.ndarray]], bool]:  # fmt: skip
    efforts = round_efforts(problem, seconds, len(layers))
    best: dict[int, tuple[float, np.ndarray]] = {layer: (np.inf, pack_slots(problem, layer)) for layer in layers}
    searches: dict[int, LayerSearch] = {}
    jobs = [(number, place) for number in range(len(efforts)) for place in range(len(layers))]
    spent = {"planned": 0.0, "real": 0.0}

    def one(job: tuple[int, int]) -> bool:
        number, place = job
        effort, layer = efforts[number], layers[place]
        if layer not in searches:
            searches[layer] = LayerSearch(problem, layer, cap, effort.hedge if cap is not None else 0.0, stop)
        before = budget.elapsed
        slowness = max(1.0, spent["real"] / spent["planned"]) if spent["planned"] > 0 else 1.0
        left = deadline - before
        if number == 1:  # the first full round is shortened alike for every layer, so that none is left out
            factor = min(1.0, left * threads() / (slowness * effort.seconds * (len(layers) - place)))
        else:  # a further one is run in full or not at all
            room = 0.5 * seconds if number == 0 else 0.7 * slowness * effort.seconds
            factor = 1.0 if left > room else 0.0
        if factor < LEAST_FACTOR:
            return True
        found = searches[layer].run(effort.scaled(factor), budget.rng(layer, number))
        if found[0] < best[layer][0]:
            best[layer] = found
        if number:
            spent["planned"] += effort.seconds * factor
            spent["real"] += budget.elapsed - before
        return factor < 1.0

    cut = False
    with ThreadPoolExecutor(threads()) as pool:
        for done, shortened in enumerate(pool.map(one, jobs)):
            cut |= shortened
            budget.report((done + 1) / len(jobs))
    return [best[layer] for layer in layers], cut or bool(stop[0])


def round_efforts(problem: Problem, seconds: float, layers: int) -> list[Effort]:
    """A quick round, then as many full ones as fill `seconds`, by the rates measured below."""
    assert problem.trace is not None
    per_layer = FILL * seconds * threads() / layers
    tokens = min(problem.trace.num_tokens, MOST_TOKENS)
    slots, top_k = problem.cluster.num_slots, problem.top_k
    levels = 2.0 if problem.cluster.num_nodes > 1 else 1.0
    # One run: a proposal costs 10 ns; an accepted swap touches the tokens of two experts, 3 ns per expert of each.
    per_sweep = 12 * (slots * (slots - 1) / 2) * 15e-9 * levels
    accepted = 60.0 * slots * (2 * tokens * top_k / slots) * top_k * 3e-9 * levels
    full = FULL_SWEEPS * per_sweep + accepted
    quick_sweeps = int(np.clip(0.1 * per_layer / (per_sweep + accepted / FULL_SWEEPS), 4, 40))
    quick = Effort(sweeps=quick_sweeps, seconds=full * quick_sweeps / FULL_SWEEPS)
    if (problem.redundant_slots > 0).any():  # copies are searched long and once, after one quick round
        base = int(np.clip(FULL_SWEEPS * 0.15 * per_layer / full, 4, 60))
        plain = full * base / FULL_SWEEPS
        copying = max(per_layer - plain - quick.seconds, 0.3 * per_layer) / 1.05
        return [
            replace(quick, copy_seconds=copying / 20, hedge=COPY_HEDGE),
            Effort(sweeps=base, copy_seconds=copying, hedge=COPY_HEDGE, seconds=plain + copying),
        ]
    rounds = int(per_layer / full)
    if rounds == 0:
        middle = int(FULL_SWEEPS * per_layer / full)
        return [quick, Effort(sweeps=middle, seconds=per_layer)] if middle > quick.sweeps else [quick]
    return [quick] + [Effort(sweeps=FULL_SWEEPS, seconds=full)] * rounds


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
        risk_matrix(problem.trace, problem.trace.layer(layer), starts[layer], CHAIN_HEDGE if cap else 0.0)
        for layer in range(problem.num_layers)
    ])  # fmt: skip
    hot = 6.0 * problem.load_LE.sum() / (problem.num_layers * slots) / 15
    proposals = int(1.8 * seconds / CHAIN_ROUNDS / (60e-9 + 1.5e-9 * slots))
    start_LS = np.stack(starts)
    descend_chain(start_LS, flow_LSS, cost_RR, np.zeros((problem.num_layers, slots, ranks)))

    deadline = min(budget.elapsed + seconds, budget.time_limit)
    chunk = COOLING_STEPS // 20

    def one(run: int, stop: np.ndarray) -> tuple[float, np.ndarray, bool]:
        rank_LS, state = start_LS.copy(), seed_state(budget.rng(run))
        table_LSR = attraction(rank_LS, flow_LSS, cost_RR)
        begun, cut = budget.elapsed, False
        ends = begun + (deadline - begun) / (CHAIN_ROUNDS - run // threads())
        first, tries = 0, proposals
        while first <= COOLING_STEPS:
            anneal_chain(
                rank_LS, flow_LSS, cost_RR, table_LSR, load_LS, limit_LR, risk_LSS, hot, max(hot / 100, 0.5),
                first, min(first + chunk, COOLING_STEPS + 1), tries, stop, state,
            )  # fmt: skip
            first += chunk
            # The closing descent tries a quarter of all proposals, as much as seven chunks. Cooler chunks are faster,
            # so what the last one took is measured anew each time.
            needed = 0.6 * (budget.elapsed - begun) / tries * proposals * ((COOLING_STEPS - first) / chunk + 7)
            left = max(ends - budget.elapsed, 0.0)
            tries = int(proposals * min(1.0, max(left / needed, 0.01))) if needed > 0 else proposals
            cut |= tries < proposals
            begun = budget.elapsed
            budget.report(first / COOLING_STEPS)
        return _chain_value(rank_LS, flow_LSS, cost_RR, load_LS, limit_LR, risk_LSS), rank_LS, cut

    runs = range(CHAIN_ROUNDS * threads())
    with budget.alarm(deadline - budget.elapsed) as stop, ThreadPoolExecutor(threads()) as pool:
        found = list(pool.map(one, runs, [stop] * len(runs)))
    rank_LS = min(found, key=lambda pair: pair[0])[1]
    rows = [to_slots(r, int(e)) for r, e in zip(rank_LS, problem.experts_per_layer, strict=True)]
    slots_LS = np.stack(rows)
    if (problem.redundant_slots > 0).any():
        slots_LS = _with_copies_on_the_way(problem, slots_LS, cap)
    return slots_LS, any(cut for _, _, cut in found)


def _surviving_chain(problem: Problem, budget: Budget, cap: float | None, seconds: float) -> tuple[np.ndarray, bool]:
    """First copies by the chain search, further ones where tokens pass; layers that break the cap are packed."""
    narrow = problem.replace(cluster=first_slots(problem), survive=0, previous=None, max_moves=None)
    first_LS, cut = _chain_search(narrow, budget, cap, 0.6 * seconds)
    packed_LS = solve_lpt(problem, budget).slot_to_expert
    first_LER = narrow.placement(first_LS).copies_LER > 0
    # The narrow cluster may have a few slots more than experts, and copies in them: first copies only.
    first_LER &= first_LER.cumsum(axis=2) == 1
    held_LER = add_surviving_copies(problem, first_LER)
    slots_LS = to_rows(problem, held_LER)
    if cap is not None:
        packed = problem.placement(packed_LS)
        caps_L = np.maximum(cap, problem.evaluate(packed).imbalance_L)
        for _ in range(_PACKINGS):
            balance_copies(problem, held_LER, caps_L)
            slots_LS = to_rows(problem, held_LER)
            over_L = problem.evaluate(problem.placement(slots_LS)).imbalance_L > caps_L + 1e-9
            if not over_L.any() or budget.expired:
                break
            held_LER[over_L] = packed.copies_LER[over_L] > 0
    slots_LS = _with_copies_on_the_way(problem, slots_LS, cap)
    ours, theirs = (problem.evaluate(problem.placement(each)).copies_per_token for each in (slots_LS, packed_LS))
    return (slots_LS if ours <= theirs else packed_LS), cut


def _with_copies_on_the_way(problem: Problem, slots_LS: np.ndarray, cap: float | None) -> np.ndarray:
    """Fill a layer's empty slots with copies of the experts that most tokens on that rank go to; kept where it pays."""
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


def _chain_value(
    rank_LS: np.ndarray,
    flow_LSS: np.ndarray,
    cost_RR: np.ndarray,
    load_LS: np.ndarray,
    limit_LR: np.ndarray,
    risk_LSS: np.ndarray,
) -> float:
    """What the chain search minimises: traffic and hedge, overload at a prohibitive price."""
    total, ranks = 0.0, len(cost_RR)
    for layer, rank_S in enumerate(rank_LS):
        load_R = np.bincount(rank_S, load_LS[layer], minlength=ranks)
        total += 1e3 * float(np.maximum(load_R - limit_LR[layer], 0.0).sum())
        on_SR = (rank_S[:, None] == np.arange(ranks)).astype(np.float64)
        total += float((np.einsum("sr,st,tr->r", on_SR, risk_LSS[layer], on_SR, optimize=True) ** 2).sum())
        if layer + 1 < len(rank_LS):
            total += float((flow_LSS[layer] * cost_RR[np.ix_(rank_S, rank_LS[layer + 1])]).sum())
    return total


def _aligned(problem: Problem, slots_LS: np.ndarray) -> np.ndarray:
    """Rename ranks layer by layer so that tokens (coherent: their owners) meet their experts where they are.

    Ranks per token and balance do not change.
    """
    placement = problem.placement(slots_LS)
    if problem.cluster.distance_RR is not None:
        return slots_LS  # names matter
    flow_LRR = (owner_flow if problem.mode == "coherent" else primary_flow)(problem, placement)
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


def owner_flow(problem: Problem, placement: Placement) -> np.ndarray:
    """(L-1, R, R) tokens owned by rank i in a layer (most of their experts) that rank j serves in the next."""
    assert problem.trace is not None
    ranks = problem.num_ranks
    flow = np.zeros((problem.num_layers - 1, ranks, ranks))
    owner_T = np.zeros(problem.trace.num_tokens, np.int64)
    for layer in range(problem.num_layers):
        ids_TK = problem.trace.layer(layer)
        token, slot = np.nonzero(ids_TK >= 0)
        rank = placement.rank_of_expert[layer][ids_TK[token, slot]]
        count_TR = np.bincount(token * ranks + rank, minlength=len(ids_TK) * ranks).reshape(-1, ranks)
        if layer:
            for owner in range(ranks):
                flow[layer - 1, owner] = (count_TR[owner_T == owner] > 0).sum(axis=0)
        owner_T = np.where(count_TR.any(axis=1), count_TR.argmax(axis=1), owner_T)
    return flow


def rename_ranks(slots_LS: np.ndarray, names_LR: np.ndarray, problem: Problem) -> np.ndarray:
    """Move every rank's experts to the rank of its new name."""
    rank_of_slot = problem.cluster.rank_of_slot
    renamed = np.empty_like(slots_LS)
    for layer, names_R in enumerate(names_LR):
        for rank, name in enumerate(names_R):
            renamed[layer, rank_of_slot == name] = slots_LS[layer, rank_of_slot == rank]
    return renamed
