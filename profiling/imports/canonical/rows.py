"""Rows of top-k ids in the order that a trace promises, and sequences where a source has none.

Shape letters: T tokens, L MoE layers, K top-k.
"""

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.imports.canonical.findings import Findings
from moeplace.profiling.parallel import chunks
from moeplace.profiling.traces.kernels import sort_rows

PSEUDO_LENGTH = 128
"""Tokens of a pseudo-sequence where a source does not say which tokens belong together."""


def canonical_rows(ids_TLK: np.ndarray, weights_TLK: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows with -1 last and, where weights are given, by falling weight; ties keep their order. Copies.

    Raises:
        InputError: a weight is not a number.
    """
    dtype = ids_TLK.dtype if ids_TLK.dtype in (np.int16, np.int32) else np.int64
    ids = np.array(ids_TLK, dtype=dtype, order="C")
    if weights_TLK is None:
        sort_rows(ids.reshape(-1, ids.shape[2]), np.zeros((0, ids.shape[2]), np.float32))
        return ids, None
    weights = np.array(weights_TLK, dtype=np.float32, order="C")
    if np.isnan(weights).any():
        raise InputError("a gate weight is NaN; weights must be numbers")
    sort_rows(ids.reshape(-1, ids.shape[2]), weights.reshape(-1, ids.shape[2]))
    return ids, weights


def id_range(ids: np.ndarray) -> tuple[int, int]:
    """Least and greatest id of an integer array, (0, -1) when it is empty; memory-mapped arrays stay on disk."""
    low, high = 0, -1
    for number, piece in enumerate(chunks(ids)):
        if piece.size:
            least, most = int(piece.min()), int(piece.max())
            low, high = (least, most) if number == 0 else (min(low, least), max(high, most))
    return low, high


def pseudo_sequences(num_tokens: int, findings: Findings) -> np.ndarray:
    """(T,) sequence ids of consecutive pieces of 128 tokens, with a warning."""
    findings.warn(f"no sequence ids in the source: pseudo-sequences of {PSEUDO_LENGTH} consecutive tokens")
    return np.arange(num_tokens) // PSEUDO_LENGTH
