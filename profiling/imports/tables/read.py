"""A table of counts from a file of any known kind, or from a folder with one file a rank."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.containers.npz import read_npy, read_npz
from moeplace.profiling.containers.torch_archive import read_torch_archive
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.imports.tables.delimited import read_delimited
from moeplace.profiling.imports.tables.document import NAMES, find_table
from moeplace.profiling.imports.tables.table import CountTable, add_tables
from moeplace.profiling.imports.tables.text import plain_suffix, read_bounded
from moeplace.profiling.parallel import chunks

DELIMITED = (".csv", ".tsv", ".txt", ".dat")
JSON = (".json", ".jsonl", ".ndjson")
TENSORS = (".pt", ".pth")
KINDS = (".npy", ".npz", *TENSORS, *JSON, *DELIMITED)
_MOST_JSON_BYTES = 1 << 28
_MOST_FILES = 4096


def read_table(path: str | Path) -> CountTable:
    """The table in a file.

    Raises:
        InputError: there is no such file.
        FormatError: there is no table in it.
    """
    source = Path(path)
    suffix = plain_suffix(source)
    if not source.exists():
        raise InputError(f"no such file: {path}")
    if suffix == ".npy":
        return _of_matrix(source, read_npy(source))
    if suffix == ".npz":
        return _from_npz(source)
    if suffix in TENSORS:
        return find_table(read_torch_archive(source), str(source))
    if suffix in JSON:
        return find_table(_parse_json(source), str(source))
    if suffix in DELIMITED:
        return read_delimited(source)
    raise FormatError(f"{source}: a load matrix is .npy, .npz, .pt, .json or .csv, not {suffix or 'without suffix'}")


def read_tables(source: str | Path) -> tuple[CountTable, int]:
    """(table, files): of a file, or the sum of the files of a folder, one a rank.

    Raises:
        InputError: there is no such file, or the folder has no tables of one kind.
        FormatError: a file has no table, or tables do not belong together.
    """
    if not Path(source).is_dir():
        return read_table(source), 1
    paths = [path for path in sorted(Path(source).iterdir()) if path.is_file() and plain_suffix(path) in KINDS]
    ranked = [path for path in paths if "rank" in path.name.lower()]
    paths = ranked or paths
    kinds = sorted({plain_suffix(path) for path in paths})
    if not 1 <= len(paths) <= _MOST_FILES or len(kinds) != 1:
        found = f"has files of the kinds {', '.join(kinds)}" if len(kinds) > 1 else f"has {len(paths)} such files"
        raise InputError(f"folder {source} must hold tables of one kind ({', '.join(KINDS)}), one a rank, but {found}")
    return add_tables([read_table(path) for path in paths], str(source)), len(paths)


def _of_matrix(source: Path, matrix: np.ndarray) -> CountTable:
    """From (L, E), or (steps, L, E), summed piece by piece."""
    if matrix.ndim not in (2, 3) or matrix.dtype.kind not in "iuf" or not matrix.size:
        raise FormatError(f"{source}: loads are numbers (layers, experts), not {matrix.dtype} {matrix.shape}")
    if matrix.ndim == 3:
        total = np.zeros(matrix.shape[1:], np.float64 if matrix.dtype.kind == "f" else np.int64)
        for piece in chunks(matrix, 64):
            total += piece.sum(axis=0, dtype=total.dtype)
        matrix = total
    return CountTable.of_rows(list(matrix), str(source))


def _from_npz(source: Path) -> CountTable:
    arrays = dict(read_npz(source))
    found = next((arrays[name] for name in NAMES if name in arrays), None)
    if found is None and len(arrays) == 1:
        found = next(iter(arrays.values()))
    if found is None:
        raise FormatError(f"{source} has no array `load` (it has {', '.join(sorted(arrays)[:8]) or 'nothing'})")
    return _of_matrix(source, found)


def _parse_json(source: Path) -> Any:
    """A document, or a list of the documents that stand one a line."""
    try:
        text = read_bounded(source, _MOST_JSON_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{source} is not readable: {str(error)[:120]}") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return [json.loads(line) for line in lines] if len(lines) > 1 else _refuse(source, error)
        except (ValueError, RecursionError):
            return _refuse(source, error)


def _refuse(source: Path, error: Exception) -> Any:
    raise FormatError(f"{source} is not JSON: {str(error)[:200]}") from error
