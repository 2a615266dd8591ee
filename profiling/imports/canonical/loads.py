"""A table of counts becomes a load file: ragged layers, fractions, dense rows, null experts, suspicions.

Shape letters: L MoE layers, E experts per layer.
"""

from pathlib import Path

import numpy as np

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.imports.canonical.findings import Findings
from moeplace.profiling.imports.canonical.imported import Imported
from moeplace.profiling.imports.canonical.options import ImportOptions
from moeplace.profiling.imports.canonical.suspicions import report_padding, report_use
from moeplace.profiling.imports.canonical.tokens import expert_count
from moeplace.profiling.imports.tables.table import CountTable
from moeplace.profiling.traces.loads import LoadStats, save_load

_SCALE = 1_000_000
_MOST_CELLS = 1 << 27


def write_load(out: str | Path, table: CountTable, options: ImportOptions, findings: Findings) -> Imported:
    """Write a table as a load file.

    Args:
        out: load file.
        table: counts; rows without any are dense layers and left out.
        options: what the user knows.
        findings: gets a sentence for everything that looks wrong.

    Raises:
        InputError: an option contradicts the source, or a load is negative.
        FormatError: data looks wrong and `options.strict` holds.
    """
    if options.top_k is not None:
        raise InputError(f"top-k ({options.top_k}) cannot be applied: the source has loads, not tokens")
    _check_numbers(table, findings)
    kept = np.flatnonzero([row.any() for row in table.rows])
    if not len(kept):
        raise InputError(f"{findings.source}: all loads are zero: no token was counted")
    numbers = np.array(table.numbered())
    if len(kept) < len(table.rows):
        findings.remark_dense(np.delete(numbers, kept))
    experts_L = _experts(table, kept, options, findings)
    load_LE = _matrix(table, kept, experts_L, findings)
    load_LE = report_padding(load_LE, findings, drop=options.drop_padding)
    report_use(load_LE, experts_L, findings)
    says_layers = table.layer_ids is not None or len(kept) < len(table.rows)
    layer_ids = options.layer_ids_of(numbers if says_layers else None, len(table.rows), kept)
    counted = len(table.rows) if table.layer_ids is None and says_layers else 0
    stats = LoadStats(
        load_LE,
        experts_per_layer=experts_L,
        layer_ids=layer_ids,
        num_hidden_layers=options.num_hidden_layers or table.num_hidden_layers or counted,
        model=options.model or table.model,
        notes=tuple(findings.notes),
        expert_bytes=options.expert_bytes or 0,
        hidden_size=options.hidden_size,
        kv_dim=options.kv_dim,
        shared_experts=options.shared_experts,
    )
    save_load(out, stats)
    assert stats.layer_ids is not None
    return Imported(
        Path(out), "load", 0, stats.num_layers, stats.num_experts, 0, stats.notes,
        experts_per_layer=tuple(experts_L.tolist()), layer_ids=tuple(stats.layer_ids.tolist()),
        num_hidden_layers=stats.num_hidden_layers, dropped=tuple(findings.dropped), remarks=tuple(findings.remarks),
    )  # fmt: skip


def _check_numbers(table: CountTable, findings: Findings) -> None:
    for layer, row in zip(table.numbered(), table.rows, strict=True):
        bad = ~((row >= 0) & (row < 2.0**53))
        if bad.any():
            expert = int(bad.argmax())
            if not (row[expert] < 0):
                raise FormatError(f"{findings.source}: loads must be finite, not negative and below 2^53")
            raise InputError(
                f"{findings.source}: the load {row[expert]:g} of expert {expert} in layer {layer} is negative: loads "
                "must not be, they count tokens (a table of -1, 0, 1 and the like says where experts are)"
            )


def _experts(table: CountTable, kept: np.ndarray, options: ImportOptions, findings: Findings) -> np.ndarray:
    """(L,) experts of the layers that are kept.

    Raises:
        InputError: the user says fewer than have load, or more than the rows have.
    """
    rows = [table.rows[index] for index in kept]
    lengths_L = np.array([len(row) for row in rows])
    used_L = np.array([int(np.flatnonzero(row)[-1]) + 1 for row in rows])
    given_L = options.experts_of_layers(len(table.rows), kept)
    if given_L is None and table.num_experts >= used_L.max():
        given_L = np.full(len(rows), table.num_experts)
    if given_L is None and table.sparse:
        given_L = np.full(len(rows), expert_count(int(used_L.max()) - 1, options, findings))
    if given_L is None:
        return np.maximum(lengths_L - options.null_experts, 1)
    over_L = used_L > given_L + options.null_experts
    longer_L = (given_L > lengths_L) & (not table.sparse) & (table.num_experts == 0)
    if over_L.any() or longer_L.any():
        layer = int((over_L | longer_L).argmax())
        what = f"expert {used_L[layer] - 1} has load" if over_L[layer] else "that of the source"
        raise InputError(
            f"{findings.source}: num-experts ({given_L[layer]}) must be {lengths_L[layer]} in MoE layer {layer}, {what}"
        )
    return given_L


def _matrix(table: CountTable, kept: np.ndarray, experts_L: np.ndarray, findings: Findings) -> np.ndarray:
    """(L, E) int64; fractions keep their proportions to one in a million of the busiest layer."""
    most = int(experts_L.max())
    if most * len(kept) > _MOST_CELLS:
        raise FormatError(f"{findings.source}: {len(kept)} layers of {most} experts are too many")
    rows = [table.rows[index][:experts] for index, experts in zip(kept, experts_L.tolist(), strict=True)]
    load_LE = np.zeros((len(rows), most), np.result_type(*{row.dtype for row in rows}))
    for row, values in zip(load_LE, rows, strict=True):
        row[: len(values)] = values
    if load_LE.dtype.kind != "f" or not (load_LE % 1).any():
        return load_LE.astype(np.int64)
    scale = _SCALE / load_LE.sum(axis=1).max()
    findings.warn(f"fractional loads scaled by {scale:.6g} and rounded")
    return np.rint(load_LE * scale).astype(np.int64)
