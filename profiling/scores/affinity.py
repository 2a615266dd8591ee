"""Scores of a routing trace: skew, affinity against a shuffled control, stability over time and workloads.

Shape letters: T tokens, L MoE layers, E experts per layer.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.parallel import CHUNK_TOKENS, chunks, thread_pool, workers
from moeplace.profiling.traces.kernels import count_grouped
from moeplace.profiling.traces.trace import RoutingTrace

_MOST_TABLE_BYTES = 1 << 32


@dataclass(frozen=True, eq=False)
class Affinity:
    """Mutual information between the primary experts of neighbouring MoE layers.

    Attributes:
        bits: (L-1,) bits per boundary.
        control_bits: (L-1,) the same after permuting the tokens of the later layer: popularity without affinity,
            which is what a finite sample shows by chance.
        num_tokens: tokens judged.
    """

    bits: np.ndarray
    control_bits: np.ndarray
    num_tokens: int

    @property
    def excess_bits(self) -> float:
        """Mean over boundaries of information beyond the control; 0 without boundaries."""
        return float((self.bits - self.control_bits).mean()) if len(self.bits) else 0.0


def load_skew(load_LE: np.ndarray, experts_per_layer: np.ndarray) -> np.ndarray:
    """(L,) load of the busiest expert of each layer over the mean, >= 1; 1 for a layer without load."""
    total_L = load_LE.sum(axis=1)
    return np.where(total_L > 0, load_LE.max(axis=1) * experts_per_layer / np.maximum(total_L, 1), 1.0)


def load_entropy(load_LE: np.ndarray, experts_per_layer: np.ndarray) -> np.ndarray:
    """(L,) entropy of each layer's load over its maximum log2 E, 1 = uniform; 1 for a layer of one expert."""
    share_LE = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1)
    bits_L = -(share_LE * np.log2(np.where(share_LE > 0, share_LE, 1.0))).sum(axis=1)
    most_L = np.log2(np.maximum(experts_per_layer, 1))
    return np.where(most_L > 0, bits_L / np.where(most_L > 0, most_L, 1.0), 1.0)


def mutual_information(counts_EE: np.ndarray) -> float:
    """Bits that the row tells about the column of a table of counts; 0 for an empty one."""
    total = counts_EE.sum()
    if total == 0:
        return 0.0
    rows, columns = np.nonzero(counts_EE)
    joint = counts_EE[rows, columns] / total
    row_E, column_E = counts_EE.sum(axis=1) / total, counts_EE.sum(axis=0) / total
    return float(max((joint * np.log2(joint / (row_E[rows] * column_E[columns]))).sum(), 0.0))


def primary_experts(trace: RoutingTrace) -> np.ndarray:
    """(L, T) contiguous int16 or int32 primary experts; -1 where a token has none or a null expert."""
    dtype = np.int16 if trace.num_experts < 2**15 else np.int32
    primary_LT = np.empty((trace.num_layers, trace.num_tokens), dtype=dtype)
    for number, piece in enumerate(chunks(trace.topk_ids)):
        start = number * CHUNK_TOKENS
        primary_LT[:, start : start + len(piece)] = piece[:, :, 0].T
    if trace.null_experts:
        primary_LT[primary_LT >= trace.experts_per_layer[:, None]] = -1
    return primary_LT


def affinity(primary_LT: np.ndarray, num_experts: int, *, seed: int) -> Affinity:
    """Mutual information of neighbouring layers' primary experts (L, T), with the shuffled control."""
    boundaries = len(primary_LT) - 1

    def judge(boundary: int) -> tuple[float, float]:
        rng = np.random.default_rng([seed, boundary])  # per boundary: threads may finish in any order
        both_T = (primary_LT[boundary] >= 0) & (primary_LT[boundary + 1] >= 0)
        i, j = primary_LT[boundary], primary_LT[boundary + 1]
        if not both_T.all():
            i, j = i[both_T], j[both_T]
        i = i.astype(np.int64) * num_experts
        tables = (np.bincount(i + column, minlength=num_experts**2) for column in (j, rng.permutation(j)))
        observed, shuffled = (mutual_information(t.reshape(num_experts, num_experts)) for t in tables)
        return observed, shuffled

    with thread_pool() as pool:
        pairs = list(pool.map(judge, range(boundaries)))
    bits, control = np.array(pairs).reshape(boundaries, 2).T
    return Affinity(bits, control, primary_LT.shape[1])


def total_variation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Half the sum of |a - b| over the last axis, after normalising each to sum 1; 0 where both are empty.

    An empty distribution is at distance 1 from any other.
    """
    p, q = _shares(a), _shares(b)
    distance = np.abs(p - q).sum(axis=-1) / 2
    one_empty = (a.sum(axis=-1) == 0) ^ (b.sum(axis=-1) == 0)
    return np.where(one_empty, 1.0, distance)


def jensen_shannon(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits, 0..1, over the last axis; conventions of `total_variation`."""
    p, q = _shares(a), _shares(b)
    middle = (p + q) / 2

    def divergence(x: np.ndarray) -> np.ndarray:
        ratio = np.where(x > 0, x / np.where(middle > 0, middle, 1.0), 1.0)
        return (x * np.log2(ratio)).sum(axis=-1)

    one_empty = (a.sum(axis=-1) == 0) ^ (b.sum(axis=-1) == 0)
    return np.where(one_empty, 1.0, np.maximum((divergence(p) + divergence(q)) / 2, 0.0))


def grouped_loads(trace: RoutingTrace, group_T: np.ndarray, *, num_groups: int) -> np.ndarray:
    """(G, L, E) int64 loads of the tokens of each group; tokens with a group below 0 count nowhere.

    Raises:
        InputError: the table would not fit.
    """
    layers, experts = trace.num_layers, trace.num_experts
    if 8 * num_groups * layers * experts > _MOST_TABLE_BYTES:
        raise InputError(f"loads of {num_groups} groups x {layers} layers x {experts} experts need more than 4 GiB")
    loads = np.zeros((num_groups, layers, experts), dtype=np.int64)
    parts = workers(layers)
    edges = [layers * part // parts for part in range(parts + 1)]
    groups = np.ascontiguousarray(group_T, dtype=np.int64)

    def count(part: int, ids_TLK: np.ndarray, start: int) -> None:
        piece_T = groups[start : start + len(ids_TLK)]
        count_grouped(ids_TLK, piece_T, trace.experts_per_layer, edges[part], edges[part + 1], loads)

    with thread_pool(parts) as pool:
        for number, ids_TLK in enumerate(chunks(trace.topk_ids)):
            list(pool.map(count, range(parts), [ids_TLK] * parts, [number * CHUNK_TOKENS] * parts))
    return loads


def grouped_transition_distance(primary_LT: np.ndarray, side_T: np.ndarray, num_experts: int) -> np.ndarray:
    """(L-1,) total variation between the transitions of the tokens with `side_T` true and those with false."""

    def judge(boundary: int) -> float:
        i, j = primary_LT[boundary], primary_LT[boundary + 1]
        both_T = (i >= 0) & (j >= 0)
        pairs = i.astype(np.int64) * num_experts + j
        true, false = (np.bincount(pairs[both_T & side], minlength=num_experts**2) for side in (side_T, ~side_T))
        return float(total_variation(true, false))

    with thread_pool() as pool:
        return np.array(list(pool.map(judge, range(len(primary_LT) - 1))))


def _shares(counts: np.ndarray) -> np.ndarray:
    total = counts.sum(axis=-1, keepdims=True)
    return counts / np.where(total > 0, total, 1)
