"""Whole sequences of a trace, contiguous and in order: what scores and drift tests work on.

Shape letters: T tokens, L MoE layers, K top-k, Q sequences.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.profiling.traces.trace import NO_EXPERT, RoutingTrace


@dataclass(frozen=True, eq=False)
class SequenceSample:
    """Tokens of some sequences, one sequence after another.

    Attributes:
        ids: (T, L, K) integers; null experts are -1.
        starts: (Q,) int64, index of each sequence's first token.
        experts_per_layer: (L,) int64.
        is_whole: whether these are all tokens of the trace.
    """

    ids: np.ndarray
    starts: np.ndarray
    experts_per_layer: np.ndarray
    is_whole: bool

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """(Q,) tokens of each sequence."""
        return np.diff(np.append(self.starts, len(self.ids)))

    def first_tokens(self, most: int) -> "SequenceSample":
        """The first sequences up to about `most` tokens, at least one (which is cut where it is longer)."""
        if most >= self.num_tokens:
            return self
        ends = np.append(self.starts[1:], self.num_tokens)
        kept = max(int(np.searchsorted(ends, most, side="right")), 1)
        stop = min(int(ends[kept - 1]), most)
        return SequenceSample(self.ids[:stop], self.starts[:kept], self.experts_per_layer, False)


def sequence_rows(trace: RoutingTrace) -> list[np.ndarray]:
    """Tokens of every sequence, in order; a trace without sequence ids is cut into pieces of 128 tokens."""
    if trace.sequence_ids is None:
        return np.array_split(np.arange(trace.num_tokens), max(trace.num_tokens // 128, 1))
    ids_T = np.asarray(trace.sequence_ids)
    order = np.argsort(ids_T, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(ids_T[order])) + 1)


def sample_trace(trace: RoutingTrace, *, most_tokens: int) -> RoutingTrace:
    """About `most_tokens` at most, as whole sequences spread evenly over the trace; one sequence in any case.

    Both sides of the split by sequence keep their share: neighbours of even and odd number are taken together.
    """
    if trace.num_tokens <= most_tokens:
        return trace
    rows = sequence_rows(trace)
    pairs = (len(rows) + 1) // 2
    kept = np.unique(np.arange(0, pairs, trace.num_tokens / most_tokens).astype(np.int64))
    return trace.select(np.concatenate([rows[i] for pair in kept for i in (2 * pair, 2 * pair + 1) if i < len(rows)]))


def sample_sequences(trace: RoutingTrace, *, most_tokens: int) -> SequenceSample:
    """Sequences spread evenly over the trace, up to `most_tokens`; a trace without sequence ids is one sequence."""
    tokens = trace.num_tokens
    sequence_T = np.zeros(tokens, np.int64) if trace.sequence_ids is None else np.asarray(trace.sequence_ids)
    is_whole = tokens <= most_tokens
    values, inverse, counts = np.unique(sequence_T, return_inverse=True, return_counts=True)
    if is_whole:
        chosen = np.arange(len(values))
    else:
        stride = max(tokens / most_tokens, 1.0)
        chosen = np.unique((np.arange(0, len(values), stride)).astype(np.int64))
        chosen = chosen[: max(int(np.searchsorted(np.cumsum(counts[chosen]), most_tokens, side="right")), 1)]
    picked_T = np.flatnonzero(np.isin(inverse, chosen))
    order = picked_T[np.argsort(inverse[picked_T], kind="stable")][:most_tokens]
    ids_TLK = np.ascontiguousarray(trace.topk_ids[order])
    if trace.null_experts:
        ids_TLK = np.where(ids_TLK >= trace.experts_per_layer[:, None], NO_EXPERT, ids_TLK)
    starts = np.flatnonzero(np.diff(inverse[order], prepend=-1))
    return SequenceSample(ids_TLK, starts, trace.experts_per_layer, is_whole)
