"""HeldOut: tokens that judge placements, and how much of a difference is chance.

Placements are compared in pairs on bootstrap samples of whole sequences (tokens of a sequence resemble each other).
What a step costs is no sum over sequences (its busiest rank decides), so every sample is replayed in full. Intervals
are a number of standard deviations of the samples to each side, which few samples estimate well: those of Student's t
with one degree of freedom per sequence but one, and widened by sqrt(n / (n - 1)), because n sequences drawn from
themselves vary less than n new ones would (Efron & Tibshirani 1993, ch. 12 and 13). One sequence says nothing of how
others vary: its interval is all that can be.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from moeplace.placement.cost.evaluation import Evaluation
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.sampling import sample_trace, sequence_rows
from moeplace.profiling.traces.trace import RoutingTrace

SAMPLES = 32
MOST_TOKENS = 16_384
FEW_SEQUENCES = 8
"""Below this many an interval is so wide that it is worth a word: 2.4 deviations and more instead of 2."""


@dataclass(frozen=True)
class Gain:
    """A share of a step's predicted time that is saved.

    Attributes:
        share: on the held-out tokens; negative = lost.
        low, high: 95 % interval over sequences; infinite where there is one sequence only.
    """

    share: float
    low: float
    high: float

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low > 0

    @property
    def span(self) -> str:
        """The interval for people."""
        return f"{self.low:.1%} to {self.high:.1%}" if np.isfinite(self.low) else "not known from one sequence"


class HeldOut:
    """See the module.

    Attributes:
        trace: the tokens.
        num_sequences: of them.
    """

    def __init__(
        self, trace: RoutingTrace, *, seed: int, samples: int = SAMPLES, most_tokens: int = MOST_TOKENS
    ) -> None:
        """Draw the samples.

        Args:
            trace: held-out tokens; whole sequences, spread evenly, of at most `most_tokens` are taken.
            seed: of the samples.
            samples: number of bootstrap samples.

        Raises:
            InputError: the trace has no token.
        """
        if not trace.num_tokens:
            raise InputError("there are no held-out tokens to judge by")
        self.trace = sample_trace(trace, most_tokens=most_tokens)
        rows = sequence_rows(self.trace)
        self.num_sequences = len(rows)
        rng = np.random.default_rng(seed)
        draws = [rng.integers(0, len(rows), len(rows)) for _ in range(samples)]
        self._samples = [self.trace.select(np.concatenate([rows[i] for i in draw])) for draw in draws]

    def evaluate(self, problem: Problem, placement: Placement) -> Evaluation:
        """What the placement costs on the tokens."""
        return problem.evaluate(placement, self.trace)

    @property
    def note(self) -> str:
        """A sentence where there are too few sequences to judge well, else ""."""
        if self.num_sequences >= FEW_SEQUENCES:
            return ""
        return (
            f"Held-out sequences: {self.num_sequences}; how much of a gain is chance cannot be told well from fewer "
            f"than {FEW_SEQUENCES}."
        )

    def gain(self, before: np.ndarray, after: np.ndarray) -> Gain:
        """The gain from `before` to `after`, both from `seconds`."""
        return gain(before, after, sequences=self.num_sequences)

    def seconds(self, problem: Problem, placement: Placement) -> np.ndarray:
        """(1 + samples,) predicted seconds per step: on the tokens, then on every sample."""
        traces = (self.trace, *self._samples)
        return np.array([problem.evaluate(placement, trace).predicted_seconds for trace in traces])


def gain(before: np.ndarray, after: np.ndarray, *, sequences: int) -> Gain:
    """The gain from `before` to `after`, both as `HeldOut.seconds` gives them for so many sequences."""
    return interval(1 - after / before, sequences=sequences)


def ratio(part: np.ndarray, whole: np.ndarray, *, sequences: int) -> Gain:
    """part / whole with the interval of its linearisation, which a small `whole` in some sample does not upset."""
    value = part[0] / whole[0]
    return interval(value + ((part - part[0]) - value * (whole - whole[0])) / whole[0], sequences=sequences)


def interval(values: np.ndarray, *, sequences: int) -> Gain:
    """A figure and its interval, from its value on the tokens and on every sample of so many sequences."""
    spread = float("inf")
    if sequences > 1 and len(values) > 2:
        deviations = float(student.ppf(0.975, sequences - 1)) * math.sqrt(sequences / (sequences - 1))
        spread = deviations * float(values[1:].std(ddof=1))
    return Gain(float(values[0]), float(values[0]) - spread, float(values[0]) + spread)
