"""How many tokens are enough: held-out gain against the number of tokens that a placement was fitted to.

Subsets are nested and made of whole sequences in a random order: the first tokens of a recording are often of one task.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeplace.placement.modes import Mode
from moeplace.placement.solve import solve
from moeplace.placement.studies.held_out import Gain, HeldOut
from moeplace.placement.studies.verdict import Terms
from moeplace.profiling.traces.sampling import sequence_rows
from moeplace.profiling.traces.trace import RoutingTrace

SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class CurvePoint:
    """A fit to some tokens.

    Attributes:
        tokens: fitted to.
        sequences: whole ones.
        gain: over index order, held-out.
        traffic: ranks per token (copies in `coherent` mode), held-out.
    """

    tokens: int
    sequences: int
    gain: Gain
    traffic: float


@dataclass(frozen=True)
class LearningCurve:
    """All fits.

    Attributes:
        points: by rising number of tokens; the last one is the whole train side.
        tolerance: share of the full gain that may be missing.
        enough: least number of tokens from which on no fit misses more; None = only the whole train side.
        sentence: what follows.
    """

    points: tuple[CurvePoint, ...]
    tolerance: float
    enough: int | None
    sentence: str


def learning_curve(
    train: RoutingTrace,
    held_out: HeldOut,
    terms: Terms,
    *,
    mode: Mode,
    tolerance: float,
    time_limit: float,
    report: Callable[[float], None] = lambda share: None,
) -> LearningCurve:
    """Fit to nested subsets of the train side.

    Args:
        train: tokens to fit to.
        held_out: tokens that judge, the same for every subset.
        terms: cluster and cost model.
        mode: execution mode.
        tolerance: share of the full gain that may be missing, 0..1.
        time_limit: seconds of all searches together.
        report: called with the share of the work done (0..1).
    """
    rows = sequence_rows(train)
    order = np.random.default_rng(terms.seed).permutation(len(rows))
    tokens_Q = np.cumsum([len(rows[index]) for index in order])
    counts = np.unique(np.searchsorted(tokens_Q, np.array(SHARES) * train.num_tokens - 0.5) + 1)
    points: list[CurvePoint] = []
    full = terms.problem(train, mode)
    before = held_out.seconds(full, terms.index_order(full))
    for count in counts.tolist():
        subset = train.select(np.sort(np.concatenate([rows[index] for index in order[:count]])))
        problem = terms.problem(subset, mode)
        placement = solve(problem, time_limit=time_limit / len(counts), seed=terms.seed).placement
        figures = held_out.evaluate(problem, placement)
        traffic = figures.copies_per_token if mode == "coherent" else figures.ranks_per_token
        after = held_out.seconds(problem, placement)
        points.append(CurvePoint(subset.num_tokens, count, held_out.gain(before, after), traffic))
        report(len(points) / len(counts))
    enough = enough_tokens(points, tolerance)
    return LearningCurve(tuple(points), tolerance, enough, _sentence(points, tolerance, enough))


def enough_tokens(points: list[CurvePoint], tolerance: float) -> int | None:
    """From the end: the last fit that is within the tolerance together with all larger ones."""
    least = (1 - tolerance) * points[-1].gain.share
    found = None
    for point in reversed(points[:-1]):
        if point.gain.share < least:
            break
        found = point.tokens
    return found


def _sentence(points: list[CurvePoint], tolerance: float, enough: int | None) -> str:
    full = points[-1]
    if not full.gain.is_beyond_noise:
        return (
            f"Fitted to all {full.tokens:,} tokens a placement gains {full.gain.share:.1%}, within noise: "
            "there is nothing that more tokens could be compared with."
        )
    if enough is not None:
        return f"{enough:,} tokens are enough: from there on the gain is within {tolerance:.0%} of that of all tokens."
    if len(points) < 2:
        return "The trace is too short to say how many tokens are enough: its train side is a single sequence."
    half = points[-2]
    missing = 1 - half.gain.share / full.gain.share
    return (
        f"The trace is too short: with {half.tokens:,} instead of {full.tokens:,} tokens {missing:.0%} of the gain "
        f"are missing, more than {tolerance:.0%}: it still grows. Record at least {2 * full.tokens:,} tokens to fit to."
    )
