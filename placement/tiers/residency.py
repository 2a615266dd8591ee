"""Residency by one figure of each expert: what to keep in fast memory where experts are placed already.

    load          tokens of the trace
    activation    share of steps that ask for the expert: what a miss costs is the step's, however many tokens wait
    srp           how well segments of tokens choose it as a whole (arXiv 2505.16056)
    sch           rows of a layer by the hit rates of a segment cache of its own (same paper), then load

Shape letters: L MoE layers, E experts per layer, R ranks, S slots per layer.
"""

import numpy as np

from moeplace.placement.memory import HOST, RESIDENT, Memory
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.placement.tiers.demand import count_demand
from moeplace.profiling.errors import InputError
from moeplace.profiling.scores.kernels import segment_cache_hits
from moeplace.profiling.scores.locality import segment_routing
from moeplace.profiling.traces.kernels import count_load
from moeplace.profiling.traces.sampling import sample_sequences
from moeplace.profiling.traces.trace import RoutingTrace

RESIDENCIES = ("load", "activation", "srp", "sch")
SEGMENT = 16
"""Tokens of a segment, for srp and sch."""
_MOST_TOKENS = 100_000
"""Tokens that scores are taken from: their intervals are narrower than the differences between experts by then."""


def with_residency(
    placement: Placement, trace: RoutingTrace, memory: Memory, *, by: str, batch: int, expert_bytes: float
) -> Placement:
    """The placement with the experts of highest figure resident on every rank, as many as its fast memory holds."""
    figure_LE = expert_figures(trace, by=by, batch=batch, seed=0)
    return keep_highest(placement, figure_LE, memory, expert_bytes=expert_bytes)


def expert_figures(trace: RoutingTrace, *, by: str, batch: int, seed: int) -> np.ndarray:
    """(L, E) figure of each expert; see the module.

    Raises:
        InputError: there is no such figure.
    """
    load_LE = np.zeros((trace.num_layers, trace.num_experts), np.int64)
    count_load(trace.topk_ids, trace.experts_per_layer, load_LE)
    if by == "load":
        return load_LE.astype(np.float64)
    if by == "activation":
        return count_demand(trace, batch=batch).activation_LE
    if by == "srp":
        sample = sample_sequences(trace, most_tokens=_MOST_TOKENS)
        return segment_routing(sample, length=SEGMENT, seed=seed, bootstraps=1).experts
    if by == "sch":
        return _by_segment_cache(trace, load_LE, seed)
    raise InputError(f"residency {by!r} must be by one of {', '.join(RESIDENCIES)}")


def _by_segment_cache(trace: RoutingTrace, load_LE: np.ndarray, seed: int) -> np.ndarray:
    """Hits that the n-th row of a layer's segment cache adds, for the n-th expert by load."""
    sample = sample_sequences(trace, most_tokens=_MOST_TOKENS)
    experts = trace.num_experts
    figure_LE = np.zeros(load_LE.shape)
    for layer in range(trace.num_layers):
        ids_TK = np.ascontiguousarray(sample.ids[:, layer])
        hits = segment_cache_hits(ids_TK, sample.starts.astype(np.int64), SEGMENT, experts, experts)
        figure_LE[layer, np.argsort(-load_LE[layer], kind="stable")] = hits[:, :experts].sum(axis=0)
    return figure_LE


def keep_highest(placement: Placement, figure_LE: np.ndarray, memory: Memory, *, expert_bytes: float) -> Placement:
    """On every rank, the experts of highest figure over all layers resident; ties to the first layer and expert."""
    tier = np.full(placement.slot_to_expert.shape, HOST, np.int8)
    for rank in range(placement.num_ranks):
        here = placement.slots_on(rank)
        rows = placement.slot_to_expert[:, here]
        room = memory.rows(rank, layers=placement.num_layers, expert_bytes=expert_bytes) - memory.transit
        layer, place = np.nonzero(rows != EMPTY_SLOT)
        order = np.lexsort((rows[layer, place], layer, -figure_LE[layer, rows[layer, place]]))[: max(room, 0)]
        tier[layer[order], here.start + place[order]] = RESIDENT
    return placement.replace(tier=tier)
