"""Whether the routing has changed since a placement was planned, and not by chance.

The distance between two samples of tokens is set against what it would be if their sequences were dealt out anew: the
sequences of both are pooled, shuffled and split again, many times (a permutation test; Good 2005, ch. 3). Tokens of a
sequence resemble each other, so it is whole sequences that change sides; and since both sides of every split come from
one pool, tables with few tokens per entry are as far apart under the null as they are in truth. Few sequences allow few
splits, and then nothing is significant.

Shape letters: T tokens, L MoE layers, E experts per layer, Q sequences.
"""

import math
from dataclasses import dataclass

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.parallel import thread_pool
from moeplace.profiling.scores.affinity import jensen_shannon, total_variation
from moeplace.profiling.traces.kernels import count_grouped, count_weighted
from moeplace.profiling.traces.sampling import SequenceSample, sample_sequences
from moeplace.profiling.traces.trace import RoutingTrace

_MOST_TOKENS = 32_768
MEASURES = ("load_tv", "load_js", "transitions_tv", "transitions_js")
DECIDING = ("load_tv", "transitions_tv")
_LEVEL = 0.05
"""Share of unchanged routings that may be called changed."""


@dataclass(frozen=True)
class Drift:
    """Distances between two traces, each with the level that chance seldom exceeds.

    Attributes:
        distance: per measure, mean over layers: total variation (0..1) or Jensen-Shannon divergence (bits) of the
            load, and of the transitions between neighbouring MoE layers.
        threshold: per measure, what chance exceeds in one of forty splits, so that it exceeds that of load or of
            transitions in one of twenty.
        p_value: per measure, share of the splits, the true one among them, that are at or above the distance.
        num_tokens: tokens of (reference, current) that were compared.
        num_sequences: sequences of both.
        notes: remarks, such as that there are too few sequences to tell.
    """

    distance: dict[str, float]
    threshold: dict[str, float]
    p_value: dict[str, float]
    num_tokens: tuple[int, int]
    num_sequences: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()

    @property
    def is_significant(self) -> bool:
        """Whether load or transitions are farther apart than chance explains; wrong in one of twenty cases at most."""
        return any(self.p_value[name] <= _LEVEL / len(DECIDING) for name in DECIDING)


def measure_drift(
    reference: RoutingTrace, current: RoutingTrace, *, seed: int, splits: int = 200, most_tokens: int = _MOST_TOKENS
) -> Drift:
    """Compare two traces of one model; longer ones are sampled by whole sequences.

    Args:
        reference: what the placement was planned on.
        current: what is routed now.
        seed: of the splits.
        splits: random ones, beside the true one.
        most_tokens: of each trace.

    Raises:
        InputError: the traces are not of one model shape, or one has no token.
    """
    if not np.array_equal(reference.experts_per_layer, current.experts_per_layer):
        raise InputError(
            f"traces of {reference.num_layers} layers x {reference.num_experts} experts and "
            f"{current.num_layers} x {current.num_experts} cannot be compared"
        )
    if reference.top_k != current.top_k:
        raise InputError(
            f"traces with {reference.top_k} and {current.top_k} experts a token cannot be compared: import both with "
            "the same --top-k"
        )
    for name, trace in (("reference", reference), ("current", current)):
        if not trace.num_tokens:
            raise InputError(f"the {name} trace has no token, at least one is needed")
    base, now = (sample_sequences(trace, most_tokens=most_tokens) for trace in (reference, current))
    pool = _Pool.of(base, now)
    counts = (len(base.starts), len(now.starts))
    rng = np.random.default_rng(seed)
    sides = [np.arange(sum(counts)) >= counts[0]]
    sides += [rng.permutation(sides[0]) for _ in range(splits)]
    with thread_pool() as threads:
        found = np.array(list(threads.map(pool.distances, sides)))
    observed, null = found[0], found[1:]
    p_value = (1 + (null >= observed - 1e-12).sum(axis=0)) / (splits + 1)
    threshold = np.quantile(null, 1 - _LEVEL / len(DECIDING), axis=0)
    return Drift(
        dict(zip(MEASURES, map(float, observed), strict=True)),
        dict(zip(MEASURES, map(float, threshold), strict=True)),
        dict(zip(MEASURES, map(float, p_value), strict=True)),
        (base.num_tokens, now.num_tokens),
        counts,
        _too_few(*counts),
    )


def _too_few(reference: int, current: int) -> tuple[str, ...]:
    """A remark if there are not enough splits for any of them to be rare."""
    if math.comb(reference + current, current) * _LEVEL >= len(DECIDING):
        return ()
    return (
        f"{reference} and {current} sequences are too few to tell drift from chance: tokens of one sequence resemble "
        "each other; record more and shorter ones",
    )


@dataclass(frozen=True, eq=False)
class _Pool:
    """The sequences of both traces, and what they sum to.

    Of the E x E transitions of a boundary few occur in few tokens; only those that do have a column (W = the most of
    any boundary), so that a split costs what its tokens do and not what the tables would.

    Attributes:
        ids: (T, L, K).
        lengths_Q: tokens of each sequence.
        experts_L: experts per layer.
        place_TB: (T, L - 1) flat place of each token's transition in (L - 1, W); the last + 1 = it has none.
        load_LE, transitions_BW: counts of all tokens.
    """

    ids: np.ndarray
    lengths_Q: np.ndarray
    experts_L: np.ndarray
    place_TB: np.ndarray
    load_LE: np.ndarray
    transitions_BW: np.ndarray

    @classmethod
    def of(cls, *samples: SequenceSample) -> "_Pool":
        ids = np.concatenate([sample.ids for sample in samples])
        lengths_Q = np.concatenate([sample.lengths for sample in samples])
        experts_L = samples[0].experts_per_layer
        load_LE, transitions_BEE = _count(ids, experts_L)
        place_TB, width = _places(ids[:, :, 0].astype(np.int64), experts_L, transitions_BEE > 0)
        everything_BW = _count_places(place_TB, np.ones(len(ids), bool), (len(experts_L) - 1, width))
        return cls(ids, lengths_Q, experts_L, place_TB, load_LE, everything_BW)

    def distances(self, side_Q: np.ndarray) -> tuple[float, ...]:
        """Between the sequences with `side_Q` true and those with false, in the order of `MEASURES`."""
        side_T = np.repeat(side_Q, self.lengths_Q)
        load_LE = _count_load(self.ids, side_T, self.experts_L)
        transitions_BW = _count_places(self.place_TB, side_T, self.transitions_BW.shape)
        return _distances((load_LE, transitions_BW), (self.load_LE - load_LE, self.transitions_BW - transitions_BW))


def _count(ids: np.ndarray, experts_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(load (L, E), transitions (L-1, E, E)) of all tokens."""
    layers, most = ids.shape[1], int(experts_L.max())
    load_LE = np.zeros((layers, most), dtype=np.int64)
    transitions_BEE = np.zeros((layers - 1, most, most), dtype=np.int64)
    count_weighted(ids, np.ones(len(ids), np.int64), experts_L, load_LE, transitions_BEE)
    return load_LE, transitions_BEE


def _places(primary_TL: np.ndarray, experts_L: np.ndarray, seen_BEE: np.ndarray) -> tuple[np.ndarray, int]:
    """Where the transitions of each token are counted, and W; `seen_BEE` says which occur."""
    before, after = primary_TL[:, :-1], primary_TL[:, 1:]
    is_one = (before >= 0) & (before < experts_L[:-1]) & (after >= 0) & (after < experts_L[1:])
    boundary = np.arange(len(seen_BEE))
    most = seen_BEE.shape[2]
    column_BX = np.cumsum(seen_BEE.reshape(-1, most * most), axis=1, dtype=np.int32) - 1
    width = int(column_BX[:, -1].max(initial=-1)) + 1
    pair_TB = np.where(is_one, before * most + after, 0)
    return np.where(is_one, boundary * width + column_BX[boundary, pair_TB], len(boundary) * width), width


def _count_load(ids: np.ndarray, side_T: np.ndarray, experts_L: np.ndarray) -> np.ndarray:
    """(L, E) load of the tokens of a side."""
    layers = ids.shape[1]
    load_GLE = np.zeros((1, layers, int(experts_L.max())), dtype=np.int64)
    count_grouped(ids, np.where(side_T, 0, -1), experts_L, 0, layers, load_GLE)
    return load_GLE[0]


def _count_places(place_TB: np.ndarray, side_T: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(L - 1, W) transitions of the tokens of a side."""
    size = math.prod(shape)
    return np.bincount(place_TB[side_T].reshape(-1), minlength=size + 1)[:size].reshape(shape)


def _distances(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[float, ...]:
    """In the order of `MEASURES`; 0 for the transitions of a single layer."""
    results = []
    for left, right in zip(a, b, strict=True):
        for distance in (total_variation, jensen_shannon):
            results.append(float(distance(left, right).mean()) if len(left) else 0.0)
    return tuple(results)
