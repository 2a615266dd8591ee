"""Load matrices (L, E), as EPLB takes them: `.npy`, `.npz` or `.json`; with a step axis in front they are summed."""

from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.containers.npz import read_npy, read_npz
from moeplace.profiling.errors import FormatError
from moeplace.profiling.files import read_json, require_file
from moeplace.profiling.imports.canonical import MOST_LAYERS, Imported, ImportOptions, warn, write_load
from moeplace.profiling.parallel import chunks

_NAMES = ("load", "logical_count", "weight", "expert_load")
_SCALE = 1_000_000
_MOST_JSON_BYTES = 1 << 28


def import_load(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read a matrix; rows of zeros are dense layers and left out, fractions are scaled to whole numbers.

    Raises:
        InputError: there is no such file, or a load is negative.
        FormatError: there is no matrix in it.
    """
    matrix = _read(source)
    if matrix.ndim not in (2, 3) or matrix.dtype.kind not in "iuf" or not matrix.size or matrix.shape[-2] > MOST_LAYERS:
        raise FormatError(f"{source}: loads are numbers (layers, experts), not {matrix.dtype} {matrix.shape}")
    notes: list[str] = []
    load_LE = _whole(source, _sum_steps(matrix), notes)
    moe = np.flatnonzero(load_LE.any(axis=1))
    known: dict[str, Any] = {}
    if 0 < len(moe) < len(load_LE):
        notes.append(f"{len(load_LE) - len(moe)} rows of zeros taken for dense layers")
        known = {"layer_ids": tuple(moe.tolist()), "num_hidden_layers": len(load_LE)}
        load_LE = load_LE[moe]
    return write_load(out, load_LE, options, notes=tuple(notes), **known)


def _read(source: str | Path) -> np.ndarray:
    suffix = require_file(source).suffix
    if suffix == ".npy":
        return read_npy(source)
    if suffix == ".npz":
        arrays = dict(read_npz(source))
        found = next((arrays[name] for name in _NAMES if name in arrays), None)
        if found is None:
            raise FormatError(f"{source} has no array `load` (it has {', '.join(sorted(arrays)[:8]) or 'nothing'})")
        return found
    if suffix == ".json":
        if Path(source).stat().st_size > _MOST_JSON_BYTES:
            raise FormatError(f"{source} is longer than {_MOST_JSON_BYTES} bytes: save the matrix as .npy")
        document = read_json(source)
        if isinstance(document, dict):
            document = next((document[name] for name in _NAMES if name in document), None)
        return _matrix(source, document)
    raise FormatError(f"{source}: a load matrix is .npy, .npz or .json, not {suffix or 'without suffix'}")


def _matrix(source: str | Path, value: Any) -> np.ndarray:
    """Nested lists of finite numbers as an array."""
    try:
        array = np.array(value)
        if array.dtype.kind not in "iuf":
            raise ValueError
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{source}: loads must be lists of numbers, all rows of one length") from error
    return array


def _sum_steps(matrix: np.ndarray) -> np.ndarray:
    """(L, E) from (L, E) or (steps, L, E), in int64 or float64."""
    kind = np.float64 if matrix.dtype.kind == "f" else np.int64
    if matrix.ndim == 2:
        return matrix.astype(kind)
    total = np.zeros(matrix.shape[1:], dtype=kind)
    for piece in chunks(matrix, 64):
        total += piece.sum(axis=0, dtype=kind)
    return total


def _whole(source: str | Path, load_LE: np.ndarray, notes: list[str]) -> np.ndarray:
    """int64 loads; fractions keep their proportions to one in a million of the busiest layer."""
    if load_LE.dtype.kind != "f":
        return load_LE
    if not np.isfinite(load_LE).all() or load_LE.min() < 0 or load_LE.max() >= 2.0**53:
        raise FormatError(f"{source}: loads must be finite, not negative and below 2^53")
    if not (load_LE % 1).any():
        return load_LE.astype(np.int64)
    busiest = load_LE.sum(axis=1).max()
    note = f"fractional loads scaled by {_SCALE / busiest:.6g} and rounded"
    notes.append(note)
    warn(f"{source}: {note}")
    return np.rint(load_LE * (_SCALE / busiest)).astype(np.int64)
