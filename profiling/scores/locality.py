"""Segment scores of routing locality (arXiv 2505.16056): SRP, how well one choice of experts per segment of tokens
matches the routing, and SCH, how often a cache of experts that looks one segment ahead hits.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k, Q sequences, m segment length, B bootstraps.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.profiling.parallel import thread_pool
from moeplace.profiling.scores.kernels import belady_hits, frequency_hits, segment_cache_hits, segment_histogram
from moeplace.profiling.traces.sampling import SequenceSample

SEGMENT_LENGTHS = (4, 16, 64, 256)
CACHE_RATIOS = (1.0, 2.0, 4.0)
_MODEL_WORK = 250_000_000  # accesses x cache size / 2 spent on the shared cache of all layers, per horizon


@dataclass(frozen=True, eq=False)
class SegmentRouting:
    """SRP at one segment length.

    Attributes:
        length: m, tokens per segment.
        model: best F1 over thresholds with one common threshold, 0..1; nan without a whole segment.
        interval: 95 % bootstrap interval of `model` over sequences.
        threshold: uses within a segment from which an expert is taken for it, at the best F1.
        size_ratio: experts taken over experts used, at that threshold.
        layers: (L,) best F1 of each layer, one threshold per layer.
        experts: (L, E) best F1 of each expert, 0 for unused ones.
        num_tokens: tokens judged.
    """

    length: int
    model: float
    interval: tuple[float, float]
    threshold: int
    size_ratio: float
    layers: np.ndarray
    experts: np.ndarray
    num_tokens: int


@dataclass(frozen=True, eq=False)
class SegmentCache:
    """Hit rates of caches of rho x K experts per layer.

    Attributes:
        policy: "segment" (SCH), "lru", "lfu" or "belady".
        length: m, the look-ahead of SCH; 0 for the others.
        ratios: (P,) sizes rho.
        layers: (L, P) hit rate of a cache of each layer's own.
        model: (P,) hit rate of one cache of rho x K x L shared by all layers; nan where not computed.
        intervals: (P, 2) 95 % bootstrap intervals of the mean over layers, over sequences.
        num_tokens: tokens judged per layer.
        model_tokens: tokens judged for `model`.
    """

    policy: str
    length: int
    ratios: tuple[float, ...]
    layers: np.ndarray
    model: np.ndarray
    intervals: np.ndarray
    num_tokens: int
    model_tokens: int


def segment_routing(sample: SequenceSample, *, length: int, seed: int, bootstraps: int = 1000) -> SegmentRouting:
    """SRP(m): F1 = 2M / (P + A) with, over segments where an expert is used c >= tau times, M = sum of c and
    P = m x their number, and A = sum of all c; the maximum over tau. For a layer or the model, M, P and A are summed
    over its experts first. Segments lie inside a sequence, stride 1."""
    experts, layers = int(sample.experts_per_layer.max()), sample.ids.shape[1]
    starts = sample.starts.astype(np.int64)

    def judge(layer: int) -> tuple[np.ndarray, np.ndarray]:
        return segment_histogram(np.ascontiguousarray(sample.ids[:, layer]), starts, length, experts)

    with thread_pool() as pool:
        tables = list(pool.map(judge, range(layers)))
    by_expert = np.stack([table[0] for table in tables])  # (L, E, m + 1)
    by_sequence = np.sum([table[1] for table in tables], axis=0)  # (Q, m + 1)
    if not by_sequence.any():
        empty = np.full(layers, np.nan)
        return SegmentRouting(
            length, np.nan, (np.nan, np.nan), 0, np.nan, empty, by_expert[:, :, 0] * 0.0, sample.num_tokens
        )
    model, threshold, ratio = best_f1(by_sequence.sum(axis=0))
    rng = np.random.default_rng(seed)
    weights_BQ = rng.multinomial(len(starts), np.full(len(starts), 1 / len(starts)), size=bootstraps)
    resampled_B = best_f1(weights_BQ @ by_sequence)[0]
    return SegmentRouting(
        length,
        float(model),
        _basic_interval(float(model), resampled_B),
        int(threshold),
        float(ratio),
        best_f1(by_expert.sum(axis=1))[0],
        best_f1(by_expert)[0],
        sample.num_tokens,
    )


def best_f1(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(best F1, its threshold, P / A there) of histograms (..., m + 1) of uses per segment, over thresholds 1..m."""
    length = histogram.shape[-1] - 1
    uses = histogram[..., 1:] * np.arange(1, length + 1)
    matched = np.flip(np.cumsum(np.flip(uses, -1), -1), -1)  # M for tau = 1..m
    taken = length * np.flip(np.cumsum(np.flip(histogram[..., 1:], -1), -1), -1)  # P
    used = matched[..., :1]  # A
    f1 = 2 * matched / np.maximum(taken + used, 1)
    best = f1.argmax(axis=-1)
    at_best = np.take_along_axis(taken, best[..., None], -1)[..., 0]
    return f1.max(axis=-1), best + 1, at_best / np.maximum(used[..., 0], 1)


def segment_cache(
    sample: SequenceSample,
    *,
    policy: str = "segment",
    length: int = 0,
    ratios: tuple[float, ...] = CACHE_RATIOS,
    seed: int,
    bootstraps: int = 1000,
) -> SegmentCache:
    """SCH(m, rho), or the hit rate of a baseline policy, at sizes rho x K.

    Every sequence starts with an empty cache; all experts of a token are looked up before any is moved; an expert
    never seen before is a hit while slots are free. SCH evicts the lowest (uses within the next m tokens, recency).
    """
    layers, top_k = sample.ids.shape[1:]
    experts = int(sample.experts_per_layer.max())
    sizes = [max(round(ratio * top_k), 1) for ratio in ratios]

    def judge(layer: int) -> np.ndarray:
        return _hits(np.ascontiguousarray(sample.ids[:, layer]), sample.starts, policy, length, experts, sizes)

    with thread_pool() as pool:
        hits_LQP = np.stack(list(pool.map(judge, range(layers))))
    hits_QP = hits_LQP.sum(axis=0)
    rates_P = hits_QP[:, :-1].sum(axis=0) / max(hits_QP[:, -1].sum(), 1)
    rng = np.random.default_rng(seed)
    queries = len(sample.starts)
    resampled = rng.multinomial(queries, np.full(queries, 1 / queries), size=bootstraps) @ hits_QP
    resampled_BP = resampled[:, :-1] / np.maximum(resampled[:, -1:], 1)
    model_P, model_tokens = _shared_cache(sample, policy, length, experts, [size * layers for size in sizes])
    return SegmentCache(
        policy,
        length,
        tuple(ratios),
        hits_LQP[:, :, :-1].sum(axis=1) / np.maximum(hits_LQP[:, :, -1:].sum(axis=1), 1),
        model_P,
        np.array([_basic_interval(rate, column) for rate, column in zip(rates_P, resampled_BP.T, strict=True)]),
        sample.num_tokens,
        model_tokens,
    )


def _shared_cache(
    sample: SequenceSample, policy: str, length: int, experts: int, sizes: list[int]
) -> tuple[np.ndarray, int]:
    """Hit rates of one cache over all (layer, expert), on as many tokens as the work allows."""
    layers, top_k = sample.ids.shape[1:]
    part = sample.first_tokens(max(2 * _MODEL_WORK // (layers * top_k * max(sizes)), 256))
    numbered = np.where(part.ids >= 0, part.ids + np.arange(layers)[:, None] * experts, -1).astype(np.int32)
    flat_TK = np.ascontiguousarray(numbered.reshape(part.num_tokens, layers * top_k))
    hits_P = _hits(flat_TK, part.starts, policy, length, experts * layers, sizes).sum(axis=0)
    return hits_P[:-1] / max(hits_P[-1], 1), part.num_tokens


def _hits(
    ids_TK: np.ndarray, starts_Q: np.ndarray, policy: str, length: int, experts: int, sizes: list[int]
) -> np.ndarray:
    """(Q, P + 1) int64 hits at each size, and accesses in the last column."""
    starts = starts_Q.astype(np.int64)
    if policy == "lfu":
        parts = [frequency_hits(ids_TK, starts, experts, size) for size in sizes]
        return np.stack([*(part[:, 0] for part in parts), parts[0][:, 1]], axis=1)
    depth = max(sizes)
    if policy == "belady":
        by_depth = belady_hits(ids_TK, starts, experts, depth)
    else:  # least recently used = looking no further than the token at hand
        by_depth = segment_cache_hits(ids_TK, starts, length if policy == "segment" else 1, experts, depth)
    cumulative = np.cumsum(by_depth[:, :-1], axis=1)
    return np.concatenate([cumulative[:, np.array(sizes) - 1], by_depth[:, -1:]], axis=1)


def _basic_interval(estimate: float, resampled: np.ndarray) -> tuple[float, float]:
    """Basic 95 % bootstrap interval: 2 x estimate - quantiles, as the paper's code takes it; inside 0..1."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(np.clip(2 * estimate - high, 0, 1)), float(np.clip(2 * estimate - low, 0, 1))
