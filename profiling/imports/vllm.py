"""vLLM: `routed_experts` of requests, or the `eplb_load_stats` records of its proposed load file, as JSON lines."""

from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.errors import FormatError
from moeplace.profiling.imports.canonical import MOST_LAYERS, Findings, Imported, ImportOptions, write_load
from moeplace.profiling.imports.json_lines import has_key, is_json, read_json_lines
from moeplace.profiling.imports.loads import import_load, is_table
from moeplace.profiling.imports.routed_experts import has_requests, import_requests
from moeplace.profiling.imports.tables.table import CountTable
from moeplace.profiling.traces.trace import MOST_EXPERTS

_NOTE_ORDINALS = "layers are ordinals of MoE layers: give --layer-ids where dense layers come before or between"


def import_vllm(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    """Read requests with routed experts; eplb records; or, where it is neither, any table of counts.

    Raises:
        InputError: there is no such file, or its contents break a rule.
        FormatError: it is nothing of the kind.
    """
    if Path(source).is_dir() or is_table(source) or not is_json(source):
        return import_load(source, out, options)
    if has_requests(source):
        return import_requests(source, out, options, encoding="npy")
    if has_key(source, "record_type"):
        return _import_loads(source, out, options)
    return import_load(source, out, options)


def _import_loads(source: str | Path, out: str | Path, options: ImportOptions) -> Imported:
    load_LE: np.ndarray | None = None
    model = ""
    for where, record in read_json_lines(source):
        if record.get("record_type") == "eplb_load_meta":
            model = str(record.get("model", ""))[:200]
        if record.get("record_type") != "eplb_load_stats":
            continue
        slots_LS, experts_LS = _matrix(where, record, "expert_load"), _matrix(where, record, "p2l_map")
        if slots_LS.shape != experts_LS.shape:
            raise FormatError(
                f"{where}: expert_load {slots_LS.shape} and p2l_map {experts_LS.shape} must have one shape"
            )
        load_LE = _add(where, load_LE, slots_LS, experts_LS)
    if load_LE is None:
        raise FormatError(f"{source} has no eplb_load_stats record")
    findings = Findings(source, strict=options.strict)
    findings.note(_NOTE_ORDINALS)
    return write_load(out, CountTable(tuple(load_LE), model=model), options, findings)


def _add(where: str, load_LE: np.ndarray | None, slots_LS: np.ndarray, experts_LS: np.ndarray) -> np.ndarray:
    """Add the slots of every expert; slots without an expert (-1) have no load."""
    layers, experts = len(slots_LS), int(experts_LS.max()) + 1
    if experts_LS.min() < -1 or not 1 <= experts <= MOST_EXPERTS or slots_LS.min() < 0:
        raise FormatError(f"{where}: p2l_map must hold expert ids or -1, and expert_load no negative number")
    if load_LE is None:
        load_LE = np.zeros((layers, experts), dtype=np.int64)
    if load_LE.shape != (layers, experts):
        raise FormatError(f"{where} has {layers} layers of {experts} experts, lines before {load_LE.shape}")
    held = experts_LS >= 0
    np.add.at(load_LE, (np.nonzero(held)[0], experts_LS[held]), slots_LS[held])
    return load_LE


def _matrix(where: str, record: dict[str, Any], name: str) -> np.ndarray:
    """(L, S) int64 from nested lists of numbers."""
    rows = record.get(name)
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_LAYERS:
        raise FormatError(f"{where} has no {name} (layers x slots)")
    for row in rows:
        if not isinstance(row, list) or len(row) != len(rows[0]) or not row:
            raise FormatError(f"{where}: the rows of {name} must be lists of one length")
        if not all(type(value) is int and abs(value) < 1 << 53 for value in row):
            raise FormatError(f"{where}: {name} must hold whole numbers")
    return np.array(rows, dtype=np.int64)
