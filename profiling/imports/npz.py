"""The trace interchange: an `.npz` with `experts` (T, L, K) and optional companions."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from moeplace.profiling.containers.npz import read_npz
from moeplace.profiling.errors import FormatError, InputError
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
from moeplace.profiling.traces.file import load_trace, save_trace
from moeplace.profiling.traces.trace import BASE_MODEL, MOST_EXPERTS

_PER_TOKEN = ("sequence_ids", "positions", "is_decode", "workload", "adapter")
_MOST_TOP_K = 1024
_MOST_TAGS = 1 << 15


def import_npz(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read `experts` int (T, L, K), optional `weights` (T, L, K), `sequence_ids`, `positions`, `is_decode`, and
    `workload` or `task` (T,) with optional `workload_names`, `adapter` (T,) with optional `adapter_names`; ids -1 =
    none, in `adapter` the base model.

    Raises:
        InputError: there is no such file, or its contents break a rule.
        FormatError: it is not an `.npz`, or not a trace.
    """
    arrays = dict(read_npz(source))
    if {"meta", "experts"} <= set(arrays):
        return _import_own(source, out, options)
    if "experts" not in arrays:
        hint = "; a load matrix is read with --from load" if "load" in arrays else ""
        raise FormatError(
            f"{source} has no array `experts`{hint} (it has {', '.join(sorted(arrays)[:8]) or 'nothing'})"
        )
    ids_TLK = arrays["experts"]
    _check_cube(source, ids_TLK)
    layers, top_k = ids_TLK.shape[1:]
    low, high = id_range(ids_TLK)
    if low < -1:
        raise InputError(f"{source}: expert id {low} must be at least -1 (-1 = none)")
    if high > np.iinfo(np.uint32).max:
        raise InputError(f"{source}: expert id {high} must be below {MOST_EXPERTS}")
    findings = Findings(source, strict=options.strict)
    companions = _companions(source, arrays, ids_TLK.shape, findings)
    weights_TLK = arrays.get("weights")
    if weights_TLK is not None and (weights_TLK.shape != ids_TLK.shape or weights_TLK.dtype.kind != "f"):
        raise FormatError(f"{source}: weights must be floats of shape {ids_TLK.shape}, not {_kind(weights_TLK)}")
    outline = TraceOutline(
        layers,
        top_k,
        weighted=weights_TLK is not None,
        workload_names=_workload_names(source, arrays, companions.get("workload"), options),
        adapter_names=_adapter_names(source, arrays, companions.get("adapter")),
    )
    return write_trace(out, outline, lambda: _pieces(ids_TLK, weights_TLK, companions), options, findings)


def _import_own(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """A trace of ours, which says all about its model: only `top_k` changes, other options are refused."""
    if replace(options, top_k=None, progress=False) != ImportOptions():
        raise InputError(f"{source} is a moeplace trace already and keeps its metadata: only --top-k can be given")
    trace = load_trace(source)
    if options.top_k is not None:
        trace = trace.truncate(options.top_k)
    save_trace(out, trace)
    shape = (trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k)
    return Imported(Path(out), "trace", *shape, notes=trace.notes)


def _check_cube(source: str | Path, ids_TLK: np.ndarray) -> None:
    if ids_TLK.ndim != 3 or ids_TLK.dtype.kind not in "iu":
        raise FormatError(f"{source}: experts must be integers of shape (tokens, layers, top-k), not {_kind(ids_TLK)}")
    tokens, layers, top_k = ids_TLK.shape
    if not tokens or not 1 <= layers <= MOST_LAYERS or not 1 <= top_k <= _MOST_TOP_K:
        raise FormatError(
            f"{source}: experts of shape {ids_TLK.shape} must have a token, 1..{MOST_LAYERS} layers "
            f"and top-k 1..{_MOST_TOP_K}"
        )


def _companions(
    source: str | Path, arrays: dict[str, np.ndarray], shape: tuple[int, ...], findings: Findings
) -> dict[str, np.ndarray]:
    """The per-token arrays of a source, in range; sequence ids are made up where absent."""
    if "workload" not in arrays and "task" in arrays:
        arrays["workload"] = arrays["task"]
    found = {name: arrays[name] for name in _PER_TOKEN if name in arrays}
    for name, array in found.items():
        if array.shape != shape[:1] or array.dtype.kind not in "iub":
            raise FormatError(f"{source}: {name} must be integers of shape ({shape[0]},), not {_kind(array)}")
    if "is_decode" in found:
        found["is_decode"] = found["is_decode"].astype(bool)
    if "sequence_ids" not in found:
        found["sequence_ids"] = pseudo_sequences(shape[0], findings)
    low, high = id_range(found["sequence_ids"])
    if low < 0 or high >= 2**31:  # hashes of requests: number them as they first appear
        _, first, inverse = np.unique(found["sequence_ids"], return_index=True, return_inverse=True)
        found["sequence_ids"] = np.argsort(np.argsort(first))[inverse]
        findings.note("sequence ids renumbered in order of appearance")
    return found


def _workload_names(
    source: str | Path, arrays: dict[str, np.ndarray], workload_T: np.ndarray | None, options: ImportOptions
) -> tuple[str, ...]:
    if workload_T is None:
        if options.workload_names:
            raise InputError(f"workload-names are given, but {source} has no array `workload` or `task`")
        return ()
    return _tag_names(source, "workload", workload_T, options.workload_names or _stored(arrays, "workload_names"), 0)


def _adapter_names(source: str | Path, arrays: dict[str, np.ndarray], adapter_T: np.ndarray | None) -> tuple[str, ...]:
    if adapter_T is None:
        return ()
    return _tag_names(source, "adapter", adapter_T, _stored(arrays, "adapter_names"), BASE_MODEL)


def _stored(arrays: dict[str, np.ndarray], name: str) -> tuple[str, ...]:
    stored = arrays.get(name)
    is_text = stored is not None and stored.ndim == 1 and stored.dtype.kind == "U"
    return tuple(str(entry) for entry in stored) if stored is not None and is_text else ()


def _tag_names(
    source: str | Path, tag: str, index_T: np.ndarray, names: tuple[str, ...], least: int
) -> tuple[str, ...]:
    """The names of the tags, numbers where there are none."""
    low, high = id_range(index_T)
    if low < least or high >= _MOST_TAGS:
        raise FormatError(f"{source}: {tag} index {low if low < least else high} must lie in {least}..{_MOST_TAGS - 1}")
    names = names or tuple(str(index) for index in range(high + 1))
    if len(names) <= high or len(set(names)) != len(names):
        raise InputError(f"{tag}-names must be {high + 1} different names for {source}, not {len(names)}")
    return names


def _pieces(ids_TLK: np.ndarray, weights_TLK: np.ndarray | None, companions: dict[str, np.ndarray]) -> Iterator[Piece]:
    weights = chunks(weights_TLK) if weights_TLK is not None else None
    start = 0
    for ids in chunks(ids_TLK):
        piece = {name: array[start : start + CHUNK_TOKENS] for name, array in companions.items()}
        piece["topk_ids"] = ids
        if weights is not None:
            piece["topk_weights"] = next(weights)
        yield piece
        start += len(ids)


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
