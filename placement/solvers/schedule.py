"""Rounds of layer searches over threads, within a time.

The work is fixed by the time limit and the problem's size, not by the clock, so that a seed decides the placement; the
clock only stops machines too slow to finish it: there the first full round is shortened and later ones are dropped.

Shape letters: S slots per layer.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.search.layout import unreplicated
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.search.ties import Ties
from moeplace.placement.solvers.layer.search import MOST_TOKENS, Effort, LayerSearch
from moeplace.profiling.parallel import workers

COPY_HEDGE = 0.01
"""Copies let the search fit the sample more closely, so they need a stronger hedge than `Effort`'s."""
FILL = 0.7
"""Share of the time limit that the planned work should take on two unshared cores."""
FULL_SWEEPS = 300
TIED_SWEEPS = 30
"""Where moves are limited, runs from the placement in force end in many different places, long ones as well as short
ones (16 runs of 30 sweeps reach less traffic than 2 of 300: top-6, 64 experts, 8 ranks, 20 moves)."""
TIED_HOT = 0.03
"""Their first temperature, as `Effort.hot`."""
PATIENCE = 10.0
"""Times its work, and seconds besides, that a layer may take on a core of a cluster before the clock cuts in."""
LEAST_FACTOR = 0.05
"""A run shortened below this share of its plan is not worth starting."""

_SETUP_SECONDS = 100e-9
"""Tables and hedge of one search, per expert of a token in a layer: measured on the DeepSeek-V2-Lite trace."""

Found = tuple[float, np.ndarray]
"""(penalised objective, (S,) int32 slot -> expert) of a layer."""


def search_layers(
    problem: Problem, budget: Budget, cap: float | None, seconds: float, layers: Sequence[int] | None = None,
    ties: Ties | None = None, plain: bool = False,
) -> tuple[list[Found], bool]:  # fmt: skip
    """Rounds of one run per layer, a quick one first so that there is always a placement; the best run of each.

    With `ties` the quick round begins at their rows; if they bind, every round does. If `plain`, spare slots stay empty
    and no replica is tried: ranks may then hold unequal numbers of experts.

    Returns the best of each of the layers (by default all), and whether the clock cut the work short.
    """
    deadline = min(budget.elapsed + seconds, budget.time_limit)
    chosen = range(problem.num_layers) if layers is None else layers
    if budget.spread is not None:
        part, before = _Part(problem, budget.seed, cap, seconds, len(chosen), workers(), ties, plain), budget.elapsed
        answers = budget.spread(_search_one, part, list(chosen), budget.report)
        budget.waited.append(max(budget.elapsed - before - seconds, 0.0))
        return [found for found, _ in answers], any(cut for _, cut in answers)
    with budget.alarm(deadline - budget.elapsed) as stop:
        return _Rounds(problem, budget, cap, seconds, deadline, chosen, stop, ties, plain).run()


@dataclass(frozen=True)
class _Part:
    """What a search of one layer needs to do elsewhere what it would do here.

    Attributes:
        problem, cap, ties, plain: as for `search_layers`.
        seed: of the budget.
        seconds, layers, cores: the time that so many layers share on so many cores, which gives each its work.
    """

    problem: Problem
    seed: int
    cap: float | None
    seconds: float
    layers: int
    cores: int
    ties: Ties | None
    plain: bool


def _search_one(part: _Part, layer: int) -> tuple[Found, bool]:
    """All rounds of one layer, with the work that it would have had beside the others; only far slower cores cut it."""
    limit = PATIENCE * part.seconds * part.cores / part.layers + PATIENCE
    budget = Budget(limit, part.seed)
    with budget.alarm(limit) as stop:
        rounds = _Rounds(
            part.problem, budget, part.cap, part.seconds, limit, (layer,), stop, part.ties, part.plain,
            (part.layers, part.cores),
        )  # fmt: skip
        found, cut = rounds.run()
    return found[0], cut


@dataclass(eq=False)
class _Rounds:
    """The rounds, and what is known of them so far.

    `shared`: how many layers share the seconds, on how many cores; by default those of this search and this process.
    """

    problem: Problem
    budget: Budget
    cap: float | None
    seconds: float
    deadline: float
    layers: Sequence[int]
    stop: np.ndarray
    ties: Ties | None
    plain: bool
    shared: tuple[int, int] | None = None
    searches: dict[int, LayerSearch] = field(default_factory=dict)
    planned: float = 0.0
    spent: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        bound = self.ties is not None and self.ties.bind
        copies = not self.plain and bool((self.problem.redundant_slots > 0).any())
        layers, cores = self.shared or (len(self.layers), workers())
        self.efforts = round_efforts(self.problem, self.seconds, layers, bound, copies, cores)
        if self.plain:
            start = {layer: unreplicated(self.problem, layer) for layer in self.layers}
        elif self.ties is None:
            start = {layer: pack_slots(self.problem, layer) for layer in self.layers}
        else:
            self.efforts[0] = replace(self.efforts[0], warm=True)
            start = {layer: self.ties.rows_LS[layer] for layer in self.layers}
        self.best = {layer: (np.inf, -1, row_S) for layer, row_S in start.items()}

    def run(self) -> tuple[list[Found], bool]:
        jobs = [(number, place) for number in range(len(self.efforts)) for place in range(len(self.layers))]
        cut = False
        with ThreadPoolExecutor(workers() if self.shared is None else 1) as pool:
            for done, shortened in enumerate(pool.map(self._one, jobs)):
                cut |= shortened
                self.budget.report((done + 1) / len(jobs))
        return [(self.best[layer][0], self.best[layer][2]) for layer in self.layers], cut or bool(self.stop[0])

    def _one(self, job: tuple[int, int]) -> bool:
        """One run of one layer; returns whether it was shortened or left out."""
        number, place = job
        effort, layer = self.efforts[number], self.layers[place]
        before = self.budget.elapsed
        factor = self._factor(number, place, self.deadline - before)
        if factor < LEAST_FACTOR:
            return True
        if layer not in self.searches:
            hedge = effort.hedge if self.cap is not None else 0.0
            self.searches[layer] = LayerSearch(
                self.problem, layer, self.cap, hedge, self.stop, self.ties, plain=self.plain
            )
        value, row_S = self.searches[layer].run(effort.scaled(factor), self.budget.rng(layer, number))
        with self.lock:  # ties go to the earlier round, whichever ends first
            if (value, number) < self.best[layer][:2]:
                self.best[layer] = (value, number, row_S)
        if number:
            self.planned += effort.seconds * factor
            self.spent += self.budget.elapsed - before
        return factor < 1.0

    def _factor(self, number: int, place: int, left: float) -> float:
        """Share of its plan that a run may take."""
        effort = self.efforts[number]
        slowness = max(1.0, self.spent / self.planned) if self.planned > 0 else 1.0
        if number == 1:  # the first full round is shortened alike for every layer, so that none is left out
            return min(1.0, left * workers() / (slowness * effort.seconds * (len(self.layers) - place)))
        # Any other is run in full or not at all.
        room = 0.5 * self.seconds if number == 0 and self.shared is None else 0.7 * slowness * effort.seconds
        return 1.0 if left > room else 0.0


def searches_within(problem: Problem, seconds: float) -> int:
    """How many searches over all layers can at least be set up in a time, 1 or more."""
    assert problem.trace is not None
    assignments = problem.num_layers * min(problem.trace.num_tokens, MOST_TOKENS) * problem.top_k
    searches = 2 if problem.spare_per_rank else 1
    return max(int(seconds * workers() / (_SETUP_SECONDS * assignments * searches)), 1)


def round_efforts(
    problem: Problem, seconds: float, layers: int, bound: bool = False, copies: bool | None = None,
    cores: int | None = None,
) -> list[Effort]:  # fmt: skip
    """A quick round, then as many full ones as fill `seconds`, by the rates measured below.

    Where moves are limited or priced (`bound`), more and shorter ones: see `TIED_SWEEPS`. `copies` says whether there
    are replicas to search, by default where there is room for any; `cores`, by default those of this process, share
    the work.
    """
    assert problem.trace is not None
    copies = bool((problem.redundant_slots > 0).any()) if copies is None else copies
    per_layer = FILL * seconds * (cores or workers()) / layers
    tokens = min(problem.trace.num_tokens, MOST_TOKENS)
    slots, top_k = problem.cluster.num_slots, problem.top_k
    levels = 2.0 if problem.cluster.num_nodes > 1 else 1.0
    # One run: a proposal costs 10 ns; an accepted swap touches the tokens of two experts, 3 ns per expert of each.
    per_sweep = 12 * (slots * (slots - 1) / 2) * 15e-9 * levels
    accepted = 60.0 * slots * (2 * tokens * top_k / slots) * top_k * 3e-9 * levels
    full = FULL_SWEEPS * per_sweep + accepted
    if bound and not copies:
        one = full * TIED_SWEEPS / FULL_SWEEPS
        return [Effort(sweeps=TIED_SWEEPS, hot=TIED_HOT, seconds=one)] * max(int(per_layer / one), 1)
    quick_sweeps = int(np.clip(0.1 * per_layer / (per_sweep + accepted / FULL_SWEEPS), 4, 40))
    quick = Effort(sweeps=quick_sweeps, seconds=full * quick_sweeps / FULL_SWEEPS)
    if copies:  # they are searched long and once, after one quick round
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
