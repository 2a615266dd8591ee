"""ExFlow: `trace.npy`, (tokens, L) integers, the top-1 expert of every MoE layer."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moeplace.profiling.containers.npz import read_npy
from moeplace.profiling.errors import FormatError
from moeplace.profiling.imports.canonical import (
    MOST_LAYERS,
    Findings,
    Imported,
    ImportOptions,
    Piece,
    TraceOutline,
    pseudo_sequences,
    write_trace,
)
from moeplace.profiling.imports.canonical.rows import id_range
from moeplace.profiling.parallel import CHUNK_TOKENS, chunks

_SORTED_DESCENTS = 0.02
_JUDGED_TOKENS = 100


def import_exflow(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read a trace array; warns where its columns are sorted in blocks, as in arrays rebuilt from histograms.

    Raises:
        InputError: there is no such file, or an id breaks a rule.
        FormatError: it is not integers of shape (tokens, layers).
    """
    ids_TL = read_npy(source)
    if ids_TL.ndim != 2 or ids_TL.dtype.kind not in "iu" or not ids_TL.size or ids_TL.shape[1] > MOST_LAYERS:
        raise FormatError(f"{source}: an ExFlow trace is integers (tokens, layers), not {ids_TL.dtype} {ids_TL.shape}")
    low, high = id_range(ids_TL)
    if low < 0:
        raise FormatError(f"{source}: expert id {low} must not be negative")
    findings = Findings(source, strict=options.strict)
    if len(ids_TL) >= _JUDGED_TOKENS and high > 0 and _descents(ids_TL).max() < _SORTED_DESCENTS:
        findings.warn("all columns are piecewise sorted, as if rebuilt from histograms: their affinity is an artefact")
    sequence_ids = pseudo_sequences(len(ids_TL), findings)
    outline = TraceOutline(ids_TL.shape[1], 1)
    return write_trace(out, outline, lambda: _pieces(ids_TL, sequence_ids), options, findings)


def _descents(ids_TL: np.ndarray) -> np.ndarray:
    """(L,) share of neighbouring tokens whose id falls: about half in a real trace."""
    falls_L = np.zeros(ids_TL.shape[1], dtype=np.int64)
    for piece in chunks(ids_TL):
        falls_L += (piece[1:] < piece[:-1]).sum(axis=0)
    return falls_L / max(len(ids_TL) - 1, 1)


def _pieces(ids_TL: np.ndarray, sequence_ids: np.ndarray) -> Iterator[Piece]:
    for number, piece in enumerate(chunks(ids_TL)):
        tokens = slice(number * CHUNK_TOKENS, (number + 1) * CHUNK_TOKENS)
        yield {"topk_ids": piece[:, :, None], "sequence_ids": sequence_ids[tokens]}
