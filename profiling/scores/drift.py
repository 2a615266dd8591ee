"""Whether the routing has changed since a placement was planned, and not by chance.

The distance between two samples of tokens is set against a null: the distances between pairs of bootstrap samples of
the reference, drawn by sequence and of the sizes of the two. Tokens of a sequence resemble each other, so a null
by token would call every new conversation a drift. Shape letters: T tokens, L MoE layers, E experts per layer.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.parallel import thread_pool
from moeplace.profiling.scores.affinity import jensen_shannon, total_variation
from moeplace.profiling.traces.kernels import count_weighted
from moeplace.profiling.traces.sampling import SequenceSample, sample_sequences
from moeplace.profiling.traces.trace import RoutingTrace

_MOST_TOKENS = 32_768
MEASURES = ("load_tv", "load_js", "transitions_tv", "transitions_js")


@dataclass(frozen=True)
class Drift:
    """Distances between two traces, each with the level that chance exceeds in one of twenty samples.

    Attributes:
        distance: per measure, mean over layers: total variation (0..1) or Jensen-Shannon divergence (bits) of the
            load, and of the transitions between neighbouring MoE layers.
        threshold: per measure, the 95 % quantile of the null.
        p_value: per measure, share of the null at or above the distance (never below 1 / (bootstraps + 1)).
        num_tokens: tokens of (reference, current) that were compared.
    """

    distance: dict[str, float]
    threshold: dict[str, float]
    p_value: dict[str, float]
    num_tokens: tuple[int, int]

    @property
    def is_significant(self) -> bool:
        """Whether the load or the transitions are farther apart than chance explains."""
        return any(self.distance[name] > self.threshold[name] for name in ("load_tv", "transitions_tv"))


def measure_drift(
    reference: RoutingTrace, current: RoutingTrace, *, seed: int, bootstraps: int = 200, most_tokens: int = _MOST_TOKENS
) -> Drift:
    """Compare two traces of one model; longer ones are sampled by whole sequences.

    Raises:
        InputError: the traces are not of one model shape, or one has no token.
    """
    if not np.array_equal(reference.experts_per_layer, current.experts_per_layer):
        raise InputError(
            f"traces of {reference.num_layers} layers x {reference.num_experts} experts and "
            f"{current.num_layers} x {current.num_experts} cannot be compared"
        )
    for name, trace in (("reference", reference), ("current", current)):
        if not trace.num_tokens:
            raise InputError(f"the {name} trace has no token, at least one is needed")
    base = sample_sequences(reference, most_tokens=most_tokens)
    now = sample_sequences(current, most_tokens=most_tokens)
    ones = (np.ones(len(sample.starts), dtype=np.int64) for sample in (base, now))
    observed = _distances(*(_weighted(sample, weights) for sample, weights in zip((base, now), ones, strict=True)))
    rng = np.random.default_rng(seed)
    sequences = len(base.starts)
    draws = max(round(now.num_tokens / base.lengths.mean()), 1)
    pairs = [rng.multinomial(count, np.full(sequences, 1 / sequences), size=bootstraps) for count in (sequences, draws)]

    def chance(number: int) -> tuple[float, ...]:
        return _distances(*(_weighted(base, weights[number]) for weights in pairs))

    with thread_pool() as pool:
        null = np.array(list(pool.map(chance, range(bootstraps))))
    threshold = np.quantile(null, 0.95, axis=0)
    p_value = (1 + (null >= np.array(observed)).sum(axis=0)) / (bootstraps + 1)
    return Drift(
        dict(zip(MEASURES, observed, strict=True)),
        dict(zip(MEASURES, map(float, threshold), strict=True)),
        dict(zip(MEASURES, map(float, p_value), strict=True)),
        (base.num_tokens, now.num_tokens),
    )


def _weighted(sample: SequenceSample, weights_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(load (L, E), transitions (L-1, E, E)) with every sequence counted as often as its weight says."""
    layers, most = sample.ids.shape[1], int(sample.experts_per_layer.max())
    load_LE = np.zeros((layers, most), dtype=np.int64)
    transitions_LEE = np.zeros((layers - 1, most, most), dtype=np.int64)
    weights_T = np.repeat(weights_Q, sample.lengths)
    count_weighted(sample.ids, weights_T, sample.experts_per_layer, load_LE, transitions_LEE)
    return load_LE, transitions_LEE


def _distances(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[float, ...]:
    """In the order of `MEASURES`; 0 for the transitions of a single layer."""
    results = []
    for left, right in zip(a, b, strict=True):
        flat_left, flat_right = left.reshape(len(left), -1), right.reshape(len(right), -1)
        for distance in (total_variation, jensen_shannon):
            results.append(float(distance(flat_left, flat_right).mean()) if len(left) else 0.0)
    return tuple(results)
