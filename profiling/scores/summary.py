"""All figures of `moeplace stats` as one JSON document.

Shape letters: T tokens, L MoE layers, E experts per layer, W windows.
"""

from typing import Any

import numpy as np

from moeplace.profiling.parallel import chunks
from moeplace.profiling.scores.affinity import (
    Affinity,
    affinity,
    grouped_loads,
    grouped_transition_distance,
    load_entropy,
    load_skew,
    primary_experts,
    total_variation,
)
from moeplace.profiling.scores.drift import Drift
from moeplace.profiling.scores.locality import (
    CACHE_RATIOS,
    SEGMENT_LENGTHS,
    SegmentCache,
    SegmentRouting,
    segment_cache,
    segment_routing,
)
from moeplace.profiling.traces.sampling import sample_sequences
from moeplace.profiling.traces.stats import RoutingStats
from moeplace.profiling.traces.trace import RoutingTrace

FORMAT = "moeplace.stats/1"
ROUTING_TOKENS = 50_000
CACHE_TOKENS = 20_000
_WINDOWS = 10
_MOST_WORKLOADS = 32
_BASELINES = ("lru", "lfu", "belady")


def summarize(trace: RoutingTrace, *, seed: int, locality: bool = True) -> dict[str, Any]:
    """Skew, affinity, co-activation, stability and, with `locality`, SRP and SCH, of a trace.

    Affinity and stability use all tokens; SRP and SCH whole sequences of about 50,000 and 20,000 tokens, as stated in
    the document.
    """
    stats = RoutingStats.from_trace(trace)
    primary_LT = primary_experts(trace)
    document: dict[str, Any] = {
        "format": FORMAT,
        "seed": seed,
        "trace": _shape(trace, stats),
        "load": load_figures(stats),
        "affinity": _affinity(trace, primary_LT, seed),
        "coactivation": coactivation_figures(stats),
        "stability": _stability(trace, primary_LT, seed),
    }
    if trace.adapter is not None:
        document["adapters"] = _adapters(trace, primary_LT, seed)
    if locality:
        routing = sample_sequences(trace, most_tokens=ROUTING_TOKENS)
        cached = sample_sequences(trace, most_tokens=CACHE_TOKENS)
        lengths = [m for m in SEGMENT_LENGTHS if m <= routing.lengths.max(initial=0)]
        document["srp"] = [_routing(segment_routing(routing, length=m, seed=seed)) for m in lengths]
        scores = [segment_cache(cached, length=m, seed=seed) for m in lengths]
        scores += [segment_cache(cached, policy=name, seed=seed) for name in _BASELINES]
        document["sch"] = {"ratios": list(CACHE_RATIOS), "policies": [_cache(score) for score in scores]}
    return document


def drift_document(drift: Drift) -> dict[str, Any]:
    """A drift measurement as a JSON object."""
    return {
        "distance": drift.distance,
        "threshold": drift.threshold,
        "p_value": drift.p_value,
        "tokens": list(drift.num_tokens),
        "sequences": list(drift.num_sequences),
        "is_significant": drift.is_significant,
        "notes": list(drift.notes),
    }


def _shape(trace: RoutingTrace, stats: RoutingStats) -> dict[str, Any]:
    decode = trace.is_decode
    workloads = {}
    if trace.workload is not None:
        counts = np.bincount(trace.workload, minlength=len(trace.workload_names))
        workloads = dict(zip(trace.workload_names, counts.tolist(), strict=True))
    return {
        "model": trace.model,
        "tokens": trace.num_tokens,
        "sequences": None if trace.sequence_ids is None else len(np.unique(trace.sequence_ids)),
        "layers": trace.num_layers,
        "layer_ids": np.asarray(trace.layer_ids).tolist(),
        "num_hidden_layers": trace.num_hidden_layers,
        "experts": trace.num_experts,
        "experts_per_layer": trace.experts_per_layer.tolist(),
        "top_k": trace.top_k,
        "mean_top_k_by_layer": (stats.load.sum(axis=1) / max(trace.num_tokens, 1)).tolist(),
        "decode_tokens": None if decode is None else int(np.count_nonzero(decode)),
        "workloads": workloads,
        "adapters": list(trace.adapter_names),
        "null_share": _null_share(trace, stats),
        "bytes": None if trace.expert_bytes is None else int(trace.expert_bytes.sum()),
        "notes": list(trace.notes),
    }


def _null_share(trace: RoutingTrace, stats: RoutingStats) -> float:
    """Share of the assignments that go to null or zero-computation experts: computed nowhere, dispatched nowhere."""
    return 1 - float(stats.load.sum()) / max(count_assigned(trace, stats), 1)


def count_assigned(trace: RoutingTrace, stats: RoutingStats) -> int:
    """Choices of all tokens, null experts included."""
    if not trace.null_experts:
        return int(stats.load.sum())
    return sum(int(np.count_nonzero(piece >= 0)) for piece in chunks(trace.topk_ids))


def load_figures(stats: RoutingStats) -> dict[str, Any]:
    """Skew and entropy, by layer and over all of them."""
    skew_L = load_skew(stats.load, stats.experts_per_layer)
    entropy_L = load_entropy(stats.load, stats.experts_per_layer)
    real_LE = np.arange(stats.num_experts) < stats.experts_per_layer[:, None]
    return {
        "skew_mean": float(skew_L.mean()),
        "skew_worst": float(skew_L.max()),
        "skew_by_layer": skew_L.tolist(),
        "entropy_mean": float(entropy_L.mean()),
        "entropy_by_layer": entropy_L.tolist(),
        "unused_experts": int(((stats.load == 0) & real_LE).sum()),
    }


def _affinity(trace: RoutingTrace, primary_LT: np.ndarray, seed: int) -> dict[str, Any]:
    document = affinity_figures(affinity(primary_LT, trace.num_experts, seed=seed))
    if trace.workload is not None and 1 < len(trace.workload_names) <= _MOST_WORKLOADS:
        by_workload = {}
        for index, name in enumerate(trace.workload_names):
            part_LT = primary_LT[:, trace.workload == index]
            by_workload[name] = affinity_figures(affinity(part_LT, trace.num_experts, seed=seed))
        document["by_workload"] = by_workload
    return document


def _adapters(trace: RoutingTrace, primary_LT: np.ndarray, seed: int) -> dict[str, Any]:
    """Load and affinity of the tokens of every adapter, and of those served by the base model alone."""
    assert trace.adapter is not None
    group_T = np.asarray(trace.adapter, dtype=np.int64) + 1
    names = ("base", *trace.adapter_names)[: _MOST_WORKLOADS + 1]
    loads = grouped_loads(trace, np.where(group_T < len(names), group_T, -1), num_groups=len(names))
    apart = total_variation(loads, loads.sum(axis=0) - loads).mean(axis=1)
    document = {}
    for index, name in enumerate(names):
        own_T = group_T == index
        if own_T.any():
            skew_L = load_skew(loads[index], trace.experts_per_layer)
            document[name] = {
                **affinity_figures(affinity(primary_LT[:, own_T], trace.num_experts, seed=seed)),
                "skew_mean": float(skew_L.mean()),
                "skew_by_layer": skew_L.tolist(),
                "experts_used_mean": float((loads[index] > 0).sum(axis=1).mean()),
                "load_tv_from_rest": float(apart[index]),
            }
    return document


def affinity_figures(score: Affinity) -> dict[str, Any]:
    """Mutual information between neighbouring layers, with its control; None for a single layer."""
    has_boundary = len(score.bits) > 0
    return {
        "tokens": score.num_tokens,
        "bits": float(score.bits.mean()) if has_boundary else None,
        "control_bits": float(score.control_bits.mean()) if has_boundary else None,
        "excess_bits": score.excess_bits if has_boundary else None,
        "bits_by_boundary": score.bits.tolist(),
        "control_bits_by_boundary": score.control_bits.tolist(),
    }


def coactivation_figures(stats: RoutingStats) -> dict[str, Any]:
    """Distance of the co-activated pairs from pairs drawn by popularity alone, per layer."""
    distances = []
    upper = np.triu_indices(stats.num_experts, 1)
    for load_E, pairs_EE in zip(stats.load, stats.coactivation, strict=True):
        by_chance = np.outer(load_E, load_E)[upper].astype(np.float64)
        distances.append(float(total_variation(pairs_EE[upper], by_chance)) if pairs_EE.any() else 0.0)
    return {"excess_tv_mean": float(np.mean(distances)), "excess_tv_by_layer": distances}


def _stability(trace: RoutingTrace, primary_LT: np.ndarray, seed: int) -> dict[str, Any]:
    """Total variation of loads and transitions between train and test, random halves of the sequences (what chance
    does), workloads, phases, windows of time."""
    document: dict[str, Any] = {"windows": _windows(trace)}
    if trace.sequence_ids is not None:
        known, sequence_T = np.unique(np.asarray(trace.sequence_ids), return_inverse=True)  # ids may be hashes
        chance = np.random.default_rng(seed).random(len(known)) < 0.5
        document["train_test"] = _halves(trace, primary_LT, np.asarray(trace.sequence_ids) % 2 == 1)
        document["random_halves"] = _halves(trace, primary_LT, chance[sequence_T])
    if trace.is_decode is not None and trace.is_decode.any() and not trace.is_decode.all():
        document["prefill_decode"] = {"load_tv": _between(trace, trace.is_decode.astype(np.int64))}
    if trace.workload is not None and 1 < len(trace.workload_names) <= _MOST_WORKLOADS:
        loads = grouped_loads(trace, trace.workload, num_groups=len(trace.workload_names))
        rest = loads.sum(axis=0) - loads
        against_rest = total_variation(loads, rest).mean(axis=1)
        document["workloads"] = dict(zip(trace.workload_names, against_rest.tolist(), strict=True))
    return document


def _halves(trace: RoutingTrace, primary_LT: np.ndarray, side_T: np.ndarray) -> dict[str, float | None]:
    """Distances between two sides of a split by sequence; None where a side is empty."""
    if side_T.all() or not side_T.any():
        return {"load_tv": None, "transitions_tv": None}
    pairs = grouped_transition_distance(primary_LT, side_T, trace.num_experts)
    return {
        "load_tv": _between(trace, side_T.astype(np.int64)),
        "transitions_tv": float(pairs.mean()) if len(pairs) else None,
    }


def _windows(trace: RoutingTrace) -> dict[str, Any]:
    tokens = trace.num_tokens
    count = max(min(_WINDOWS, tokens), 1)
    loads = grouped_loads(trace, np.arange(tokens) * count // max(tokens, 1), num_groups=count)
    return {
        "tokens_each": tokens // count,
        "load_tv_from_all": total_variation(loads, loads.sum(axis=0)).mean(axis=1).tolist(),
        "load_tv_from_previous": total_variation(loads[1:], loads[:-1]).mean(axis=1).tolist(),
        "skew_mean": [float(load_skew(load_LE, trace.experts_per_layer).mean()) for load_LE in loads],
    }


def _between(trace: RoutingTrace, side_T: np.ndarray) -> float:
    loads = grouped_loads(trace, side_T, num_groups=2)
    return float(total_variation(loads[0], loads[1]).mean())


def _routing(score: SegmentRouting) -> dict[str, Any]:
    return {
        "length": score.length,
        "srp": score.model,
        "interval": list(score.interval),
        "threshold": score.threshold,
        "size_ratio": score.size_ratio,
        "by_layer": score.layers.tolist(),
        "by_expert": score.experts.tolist(),
        "tokens": score.num_tokens,
    }


def _cache(score: SegmentCache) -> dict[str, Any]:
    return {
        "policy": score.policy,
        "length": score.length,
        "layer_mean": score.layers.mean(axis=0).tolist(),
        "intervals": score.intervals.tolist(),
        "by_layer": score.layers.tolist(),
        "model": score.model.tolist(),
        "tokens": score.num_tokens,
        "model_tokens": score.model_tokens,
    }
