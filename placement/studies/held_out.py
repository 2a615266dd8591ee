"""HeldOut: tokens that judge placements, and how much of a difference is chance.

Placements are compared in pairs on bootstrap samples of whole sequences (tokens of a sequence resemble each other).
What a step costs is no sum over sequences (its busiest rank decides), so every sample is replayed in full. Intervals
are normal: 1.96 standard deviations of the samples to each side (Efron & Tibshirani 1993, ch. 13), which few samples
estimate well.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.placement.cost.evaluation import Evaluation
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.sampling import sample_trace, sequence_rows
from moeplace.profiling.traces.trace import RoutingTrace

SAMPLES = 32
MOST_TOKENS = 16_384
_DEVIATIONS = 1.96


@dataclass(frozen=True)
class Gain:
    """A share of a step's predicted time that is saved.

    Attributes:
        share: on the held-out tokens; negative = lost.
        low, high: 95 % interval over sequences.
    """

    share: float
    low: float
    high: float

    @property
    def is_beyond_noise(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low > 0


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

    def seconds(self, problem: Problem, placement: Placement) -> np.ndarray:
        """(1 + samples,) predicted seconds per step: on the tokens, then on every sample."""
        traces = (self.trace, *self._samples)
        return np.array([problem.evaluate(placement, trace).predicted_seconds for trace in traces])


def gain(before: np.ndarray, after: np.ndarray) -> Gain:
    """The gain from `before` to `after`, both as `HeldOut.seconds` gives them."""
    return interval(1 - after / before)


def ratio(part: np.ndarray, whole: np.ndarray) -> Gain:
    """part / whole with the interval of its linearisation, which a small `whole` in some sample does not upset."""
    value = part[0] / whole[0]
    return interval(value + ((part - part[0]) - value * (whole - whole[0])) / whole[0])


def interval(values: np.ndarray) -> Gain:
    """A figure and its interval, from its value on the tokens and on every sample."""
    spread = _DEVIATIONS * float(values[1:].std(ddof=1)) if len(values) > 2 else 0.0
    return Gain(float(values[0]), float(values[0]) - spread, float(values[0]) + spread)
