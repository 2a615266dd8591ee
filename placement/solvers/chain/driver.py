"""Restarts of the chain search within a time: coherent mode, one expert per token, one slot per expert.

The work of a run follows from the time it is given; a run that finds itself slower than planned tries fewer swaps per
temperature, so that it still cools down to the end.

Shape letters: L MoE layers, R ranks, S slots per layer.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.search.annealing import COOLING_STEPS, seed_state
from moeplace.placement.search.hedge import risk_matrix
from moeplace.placement.search.layout import load_limits, packed_start, padded_load, padded_transitions, to_slots
from moeplace.placement.search.ties import Ties, first_ranks
from moeplace.placement.solvers.chain.polish import MOST_CHOICES, keeps, moved_tokens, refined
from moeplace.placement.solvers.chain.search import (
    Chain,
    Cooling,
    anneal_chain,
    attraction,
    chain_value,
    descend_chain,
    first_pull,
    untied,
)
from moeplace.profiling.parallel import workers

HEDGE = 0.002
LUKEWARM = 0.1
"""First temperature of a run that begins at the placement in force, as a share of that of other runs."""
ROUNDS = 2
"""Restarts of the chain search, one after another on every thread."""
EXACT_SHARE = 0.35
"""Of the time, for exact steps after annealing, where a cap leaves few swaps."""
LOOSE = 1.05
"""Factor on the limits of every other run, whose plan is tightened by exact steps."""
_CHUNK = COOLING_STEPS // 20
_STEP_SECONDS = 6e-5
"""An exact step, per entry and rank, and how many a shake takes: measured at 32 x 4 and 64 x 8, two unshared cores."""
_STEPS_OF_SHAKE = 8
_KEY = 77
Run = tuple[float, np.ndarray, bool]
"""(value, (L, S) ranks, whether the clock cut it short)."""


def search_chain(
    problem: Problem, budget: Budget, cap: float | None, seconds: float, ties: Ties | None = None
) -> tuple[np.ndarray, bool]:
    """(slots (L, S) of the best restart by train cost, whether the clock cut one short).

    With `ties` the first restart begins, lukewarm, at their rows; if they bind, all begin there.
    """
    starts = [packed_start(problem, layer) for layer in range(problem.num_layers)]
    chain = _chain_of(problem, starts, cap, ties)
    packed_LS = np.stack(starts)
    start_LS = packed_LS.copy()
    slots, ranks = problem.cluster.num_slots, problem.num_ranks
    descend_chain(start_LS, chain.transitions_LSS, chain.cost_RR, np.zeros((problem.num_layers, slots, ranks)))
    old_LS, stay_LS = start_LS, start_LS
    if ties is not None:
        old_LS, stay_LS = (_old_ranks(problem, ties, number) for number in range(2))
    hot = max(6.0 * problem.load_LE.sum() / (problem.num_layers * slots) / 15, 0.5)  # also where no token has an expert
    exact = cap is not None and problem.num_layers > 1 and (ties is None or not ties.bind)
    exact = exact and slots * ranks <= MOST_CHOICES
    ends = min(budget.elapsed + seconds, budget.time_limit)
    annealing = seconds * (1 - EXACT_SHARE) if exact else seconds
    proposals = int(1.8 * annealing / ROUNDS / (60e-9 + 1.5e-9 * slots))
    deadline = min(budget.elapsed + annealing, ends)
    loose = chain._replace(limit_LR=chain.limit_LR * LOOSE)

    def one(run: int, stop: np.ndarray) -> tuple[float, np.ndarray, bool]:
        warm = ties is not None and run == 0
        rank_LS = start_LS.copy()
        if ties is not None and (warm or ties.bind):
            rank_LS = (old_LS, stay_LS)[run % 2].copy()
        seconds_left = (deadline - budget.elapsed) / (ROUNDS - run // workers())
        first_hot = LUKEWARM * hot if warm else hot
        limits = loose if exact and run % 2 else chain
        cut = _one_run(rank_LS, limits, first_hot, proposals, seconds_left, run, budget, stop)
        if not exact and (ties is None or not ties.bind):
            _pack_overloaded(rank_LS, packed_LS, chain)
        return chain_value(rank_LS, chain), rank_LS, cut

    runs = range(ROUNDS * workers())
    with budget.alarm(deadline - budget.elapsed) as stop, ThreadPoolExecutor(workers()) as pool:
        found = list(pool.map(one, runs, [stop] * len(runs)))
    if ties is not None:
        found.append((chain_value(old_LS, chain), old_LS, False))
    if exact:
        shakes = int(EXACT_SHARE * seconds / (_STEP_SECONDS * _STEPS_OF_SHAKE * slots * ranks))
        found = _refined(found, chain, packed_LS, budget, shakes, ends)
    rank_LS = min(found, key=lambda triple: triple[0])[1]
    rows = [to_slots(r, int(e)) for r, e in zip(rank_LS, problem.experts_per_layer, strict=True)]
    return np.stack(rows), any(cut for _, _, cut in found)


def _refined(
    found: list[Run], chain: Chain, packed_LS: np.ndarray, budget: Budget, shakes: int, ends: float
) -> list[Run]:
    """The best run under the limits and the best one above them, after exact steps; valued by traffic alone.

    Runs above their limits are those under looser ones; what steps leave above goes back to packing.
    """
    tight = [run for run in found if keeps(run[1], chain)]
    loose = [run for run in found if not keeps(run[1], chain)]
    chosen = [min(some, key=lambda run: moved_tokens(run[1], chain)) for some in (tight, loose) if some]
    refined_runs = []
    for number, (_, rank_LS, cut) in enumerate(chosen):
        until = budget.elapsed + (ends - budget.elapsed) / (len(chosen) - number)
        steps = refined(rank_LS, chain, budget.rng(_KEY, number), shakes // len(chosen), _clock(budget, until))
        _pack_overloaded(steps, packed_LS, chain)
        refined_runs.append((moved_tokens(steps, chain), steps, cut))
    return refined_runs


def _clock(budget: Budget, until: float) -> Callable[[], bool]:
    return lambda: budget.elapsed > until


def _pack_overloaded(rank_LS: np.ndarray, packed_LS: np.ndarray, chain: Chain) -> None:
    """Layers that a run left above their limits go back, in place, to packing, which keeps them."""
    for layer, load_S in enumerate(chain.load_LS):
        load_R = np.bincount(rank_LS[layer], load_S, minlength=len(chain.cost_RR))
        if (load_R > chain.limit_LR[layer] + 1e-6).any():
            rank_LS[layer] = packed_LS[layer]


def _old_ranks(problem: Problem, ties: Ties, number: int) -> np.ndarray:
    """(L, S) ranks of the start of that number, one slot per expert."""
    rank_of_slot, experts_L = problem.cluster.rank_of_slot, problem.experts_per_layer
    return np.stack([first_ranks(ties.start(x, number), rank_of_slot, int(e)) for x, e in enumerate(experts_L)])


def _chain_of(problem: Problem, starts: list[np.ndarray], cap: float | None, ties: Ties | None) -> Chain:
    trace = problem.trace
    assert trace is not None
    hedge = HEDGE if cap else 0.0
    bias_LSR, new_LSR, most_moves = untied(problem.cluster.num_slots, problem.num_ranks)
    if ties is not None and ties.bind:
        # Objective: tokens that move over all boundaries, divided by tokens and boundaries.
        scale = float(trace.num_tokens * max(problem.num_layers - 1, 1))
        near = [ties.near(layer, scale) for layer in range(problem.num_layers)]
        bias_LSR, new_LSR = np.stack([n.bias_ER for n in near]), np.stack([n.new_ER for n in near])
        most_moves = ties.most_moves
    return Chain(
        transitions_LSS=padded_transitions(problem),
        cost_RR=np.ascontiguousarray(problem.cluster.cost_RR),
        load_LS=np.stack([padded_load(problem, layer) for layer in range(problem.num_layers)]),
        limit_LR=np.stack([load_limits(problem, layer, start_S, cap) for layer, start_S in enumerate(starts)]),
        risk_LSS=np.stack([
            risk_matrix(trace, trace.layer(layer), start_S, hedge) for layer, start_S in enumerate(starts)
        ]),
        bias_LSR=bias_LSR,
        new_LSR=new_LSR,
        most_moves=most_moves,
    )  # fmt: skip


def _one_run(
    rank_LS: np.ndarray, chain: Chain, hot: float, proposals: int, seconds: float, run: int, budget: Budget,
    stop: np.ndarray,
) -> bool:  # fmt: skip
    """Anneal `rank_LS` in place from hot to cold within `seconds`; returns whether the clock cut the work short."""
    state = seed_state(budget.rng(run))
    table_LSR = attraction(rank_LS, chain.transitions_LSS, chain.cost_RR)
    if len(chain.bias_LSR):
        table_LSR += chain.bias_LSR
    begun, cut, pull_L = budget.elapsed, False, first_pull(chain, hot)
    ends = begun + seconds
    first, tries = 0, proposals
    while first <= COOLING_STEPS:
        cooling = Cooling(hot, max(hot / 100, 0.5), first, min(first + _CHUNK, COOLING_STEPS + 1), tries, pull_L)
        anneal_chain(rank_LS, chain, table_LSR, cooling, stop, state)
        first += _CHUNK
        # The closing descent tries a quarter of all proposals, as much as seven chunks. Cooler chunks are faster,
        # so what the last one took is measured anew each time.
        needed = 0.6 * (budget.elapsed - begun) / tries * proposals * ((COOLING_STEPS - first) / _CHUNK + 7)
        left = max(ends - budget.elapsed, 0.0)
        tries = int(proposals * min(1.0, max(left / needed, 0.01))) if needed > 0 else proposals
        cut |= tries < proposals
        begun = budget.elapsed
        budget.report(first / COOLING_STEPS)
    return cut
