"""A cap on imbalance as a promise about unseen sequences, instead of a limit on the fitted ones.

A placement balances the sequences that it was fitted to, their accidents included. On others its ranks' shares of the
load differ by two accidents: that of the new sequences, and that of the fitted ones, which balance has hidden,

    share of a rank, unseen  =  share, fitted  +  (deviation of the unseen ones)  -  (deviation of the fitted ones)

Both are drawn by the bootstrap over whole sequences (Efron and Tibshirani 1993), independently of each other; tokens of
a sequence resemble each other, so it is the unit, and all layers are drawn together. They are widened for what few
sequences do not show of the others, and the second counts as far as it can have been hidden. One deviation alone, as an
ordinary bootstrap of the placement's imbalance has it, promises too much; the coverage of both is in
benchmarks/results/promises_cpu_2026-11-29.md.

`solve_promised` lowers the cap on the fitted tokens until the imbalance that unseen sequences exceed with a chance of
1 - confidence is within what was asked for. Nothing is held back for that: all sequences are fitted to.

Shape letters: T tokens, L MoE layers, K top-k, R ranks, Q sequences, B draws.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm as normal
from scipy.stats import t as student

from moeplace.placement.cost.replica_rule import near_ranks
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.result import SolveResult
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.sampling import sequence_rows

DRAWS = 400
FEWEST_SEQUENCES = 16
"""Below this many their spread is not known well enough to promise anything."""
MOST_GROUPS = 1024
"""More sequences than this are drawn in groups."""
TRIES = 5
"""Caps that are tried."""
TRY_SHARE = 0.1
"""Of the time for each; what is left searches once more under the best of them."""
CLOSE = 0.1
"""Share of what was asked for beyond 1 by which a bound may stay below it: no closer cap is tried."""
LEAST_STEP = 0.0005
"""Caps closer than this are the same."""
LOWEST = 1.005
"""A lower cap is tried last: it leaves hardly a swap, so it costs much and promises little more."""


@dataclass(frozen=True)
class Forecast:
    """Imbalance to expect of as many unseen sequences as were fitted to.

    Attributes:
        expected: of the mean over layers.
        bound: what it does not exceed, with that confidence.
        worst_layer: what the worst layer does not exceed, likewise.
        confidence: chance that `bound` holds.
        sequences: fitted to.
    """

    expected: float
    bound: float
    worst_layer: float
    confidence: float
    sequences: int


@dataclass(frozen=True)
class Promise:
    """What `solve_promised` did.

    Attributes:
        asked: the imbalance asked for, mean over layers.
        kept: whether the forecast's bound is within it.
        forecast: of the placement.
        fitted_cap: the cap on a layer's imbalance on fitted tokens that led to it.
        price: objective given up against the same cap on fitted tokens, as a share, both searched as long; never below
            0, since the plan keeps that cap too.
    """

    asked: float
    kept: bool
    forecast: Forecast
    fitted_cap: float
    price: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """For people."""
        forecast = self.forecast
        promised = (
            f"{forecast.bound:.4f} with {forecast.confidence:.0%} confidence on as many unseen sequences "
            f"({forecast.sequences}), expected {forecast.expected:.4f}, worst layer {forecast.worst_layer:.4f}"
        )
        cost = f"layers held to {self.fitted_cap:.4f} on fitted tokens, objective {self.price:+.2%} by it"
        if self.kept:
            return f"imbalance, mean over layers, is at most {promised}; {cost}"
        return f"imbalance {self.asked:g} cannot be promised: it is at most {promised}; {cost}"


def forecast(problem: Problem, placement: Placement, *, confidence: float, seed: int) -> Forecast:
    """What the imbalance of a placement, fitted to the problem's tokens, will be on other sequences.

    Args:
        problem: with its trace.
        placement: fitted to it under a load cap.
        confidence: of the bound, between 0 and 1.
        seed: of the draws.

    Raises:
        InputError: there are too few sequences, no trace, or the confidence is none.
    """
    _require_grounds(problem, confidence)
    load_QLR, sequences = _loads_by_sequence(problem, placement)
    rng, speed_R = np.random.default_rng(seed), problem.cluster.speed_of_rank
    groups = len(load_QLR)
    fitted_LR = _shares(np.ones((1, groups)), load_QLR)[0]
    unseen_BLR, hidden_BLR = (
        _shares(rng.multinomial(groups, np.full(groups, 1 / groups), DRAWS), load_QLR) - fitted_LR for _ in range(2)
    )
    wider = _widening(load_QLR, fitted_LR, confidence)
    hidden_BLR *= _hidden_part(problem, hidden_BLR)[:, None]
    share_BLR = fitted_LR + wider * (unseen_BLR - hidden_BLR)
    imbalance_BL = (share_BLR / speed_R).max(axis=2) * speed_R.sum()
    mean_B, worst_B = imbalance_BL.mean(axis=1), imbalance_BL.max(axis=1)
    bound, worst = (float(np.quantile(values, confidence)) for values in (mean_B, worst_B))
    return Forecast(float(mean_B.mean()), bound, worst, confidence, sequences)


class _Try(NamedTuple):
    problem: Problem
    result: SolveResult
    forecast: Forecast

    @property
    def cap(self) -> float:
        return self.problem.max_imbalance or 1.0


def solve_promised(
    problem: Problem,
    search: Callable[[Problem, float], SolveResult],
    *,
    time_limit: float,
    confidence: float,
    seed: int,
) -> tuple[Problem, SolveResult, Promise]:
    """(problem with the cap on fitted tokens, result, promise): least objective whose bound is within the cap.

    Where no search keeps it, the one with the least bound; the promise then says so.

    Args:
        problem: with a load cap, which becomes the promise.
        search: solves a problem within so many seconds.
        time_limit: seconds of all searches.
        confidence, seed: see `forecast`.

    Raises:
        InputError: there is no load cap, or as `forecast` raises.
    """
    asked = problem.max_imbalance
    if asked is None:
        raise InputError("a cap on held-out imbalance needs --max-imbalance to say which")
    _require_grounds(problem, confidence)

    def attempt(cap: float, seconds: float) -> _Try:
        capped = problem.replace(max_imbalance=cap)
        result = search(capped, seconds)
        return _Try(capped, result, forecast(problem, result.placement, confidence=confidence, seed=seed))

    tries = [attempt(asked, TRY_SHARE * time_limit)]
    while len(tries) < TRIES:
        cap = _next_cap(asked, [(each.cap, each.forecast.bound) for each in tries])
        if cap is None:
            break
        tries.append(attempt(cap, TRY_SHARE * time_limit))
    best = _choose(tries, asked)
    # A plan that keeps the tighter cap keeps the one that was asked for too.
    least = min(tries[0].result.objective, best.result.objective)
    price = best.result.objective / least - 1 if least > 0 else 0.0
    tries.append(attempt(best.cap, (1 - TRY_SHARE * len(tries)) * time_limit))
    chosen = _choose(tries, asked)
    promise = Promise(asked, chosen.forecast.bound <= asked, chosen.forecast, chosen.cap, price)
    seconds = sum(each.result.seconds for each in tries)
    notes = (*chosen.result.notes, promise.sentence)
    return chosen.problem, replace(chosen.result, seconds=seconds, notes=notes, promise=promise.to_json()), promise


def _choose(tries: list[_Try], asked: float) -> _Try:
    """The least objective of those that keep the promise, else the least bound."""
    kept = [each for each in tries if each.forecast.bound <= asked]
    if kept:
        return min(kept, key=lambda each: each.result.objective)
    return min(tries, key=lambda each: each.forecast.bound)


def _next_cap(asked: float, tried: list[tuple[float, float]]) -> float | None:
    """The cap on fitted tokens to try next, from (cap, bound) of earlier ones; None = no other is worth it."""
    aim = asked - 0.5 * CLOSE * (asked - 1)
    broken = [pair for pair in tried if pair[1] > asked]
    kept = [pair for pair in tried if pair[1] <= asked]
    if not broken:
        return None
    cap_1, bound_1 = min(broken)
    if not kept:  # downwards; a bound falls by less than its cap, and hardly at all where the cap does not bind
        slope = 1.0
        if len(broken) > 1:
            cap_2, bound_2 = sorted(broken)[1]
            slope = min(max((bound_2 - bound_1) / (cap_2 - cap_1), 0.3), 1.0)
        following = max(cap_1 - (bound_1 - aim) / slope, LOWEST)
        return following if cap_1 > LOWEST + LEAST_STEP else 1.0 if cap_1 > 1.0 else None
    cap_0, bound_0 = max(kept)
    if bound_0 >= asked - CLOSE * (asked - 1) or cap_1 - cap_0 < 2 * LEAST_STEP:
        return None
    following = cap_0 + (aim - bound_0) * (cap_1 - cap_0) / (bound_1 - bound_0)
    return min(max(following, cap_0 + LEAST_STEP), cap_1 - LEAST_STEP)


def _require_grounds(problem: Problem, confidence: float) -> None:
    """Raises InputError where sequences are too few or not told apart, or the confidence is none."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence ({confidence}) must lie between 0 and 1")
    if problem.trace is None or problem.trace.sequence_ids is None:
        raise InputError("a promise about unseen sequences needs a trace with sequence ids")
    sequences = len(np.unique(problem.trace.sequence_ids))
    if sequences < FEWEST_SEQUENCES:
        raise InputError(
            f"a promise about unseen sequences needs {FEWEST_SEQUENCES} fitted ones, there are {sequences}: "
            "--cap-on fitted holds the fitted ones to the cap"
        )


def _loads_by_sequence(problem: Problem, placement: Placement) -> tuple[np.ndarray, int]:
    """((Q, L, R) assignments that each rank serves of each sequence, or group of sequences; number of sequences)."""
    trace = problem.trace
    assert trace is not None
    rows, ranks = sequence_rows(trace), placement.num_ranks
    groups, group_T = min(len(rows), MOST_GROUPS), np.empty(trace.num_tokens, np.int64)
    for index, row_T in enumerate(rows):
        group_T[row_T] = index % groups
    near_T = near_ranks(placement, problem.mode, trace.num_tokens)
    choose = problem.replica_rule.on(placement, problem.shape.batch)
    rank_TK = np.empty((trace.num_tokens, trace.top_k), np.int32)
    load_QLR = np.zeros((groups, trace.num_layers, ranks))
    for layer in range(trace.num_layers):
        choose(layer, trace.layer(layer), near_T, rank_TK)
        token, place = np.nonzero(rank_TK >= 0)
        cell = group_T[token] * ranks + rank_TK[token, place]
        load_QLR[:, layer] = np.bincount(cell, minlength=groups * ranks).reshape(groups, ranks)
    return load_QLR, len(rows)


def _hidden_part(problem: Problem, hidden_BLR: np.ndarray) -> np.ndarray:
    """(L,) how much of the fitted sequences' deviation a balanced placement may be thought to hide.

    If experts differ little but for accidents, a placement that is even on the fitted sequences was nearly even before,
    and has nothing to hide: with variance V of a rank's share over random placements, of which s come from accidents, a
    share v s of their variance remains, v = 1 - s / V (shrinkage of the empirical Bayes kind, Efron and Morris 1973).
    """
    parts_L = []
    by_layer = zip(problem.load_LE, problem.experts_per_layer.tolist(), hidden_BLR.swapaxes(0, 1), strict=True)
    for load_E, experts, accident_BR in by_layer:
        each_E = load_E[:experts] / max(load_E.sum(), 1.0)
        per_rank = experts / problem.num_ranks
        random = per_rank * float(each_E.var()) * (experts - per_rank) / max(experts - 1, 1)
        accidental = float(accident_BR.var(axis=0).mean())
        parts_L.append(np.sqrt(max(1 - accidental / random, 0.0)) if random > 0 else 0.0)
    return np.array(parts_L)


def _widening(load_QLR: np.ndarray, fitted_LR: np.ndarray, confidence: float) -> float:
    """By how much drawn deviations are too small: a few long or peculiar sequences may make most of the variance.

    Sequences drawn from themselves vary less than new ones, by sqrt(f / (f + 1)) for f degrees of freedom, and f, which
    follows from how unlike the sequences' parts in the variance are (Satterthwaite 1946), says by how much a quantile
    of Student's t exceeds the normal one.
    """
    total_QL1 = load_QLR.sum(axis=2, keepdims=True)
    part_Q = ((load_QLR - total_QL1 * fitted_LR) ** 2).sum(axis=(1, 2))
    squares = float((part_Q**2).sum())
    if squares == 0:
        return 1.0
    freedom = max(float(part_Q.sum()) ** 2 / squares - 1, 1.0)
    tail = max(confidence, 0.75)  # towards the median both quantiles are 0
    return float(np.sqrt((freedom + 1) / freedom) * student.ppf(tail, freedom) / normal.ppf(tail))


def _shares(weight_BQ: np.ndarray, load_QLR: np.ndarray) -> np.ndarray:
    """(B, L, R) share of each rank in a layer's load when sequences count so often."""
    load_BLR = np.tensordot(weight_BQ.astype(np.float64), load_QLR, axes=1)
    return load_BLR / np.maximum(load_BLR.sum(axis=2, keepdims=True), 1.0)
