"""Counts in nested containers: JSON documents and the dictionaries of `torch.save`.

Understood are, under any of the usual names or bare: rows by layer, of one or several lengths; such tables by step,
added up; layer -> expert -> count and layer -> row; histories (a list of objects with a table each); lists of
{layer, expert, count}; tables by rank.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moeplace.profiling.containers.torch_archive import StoredTensor
from moeplace.profiling.errors import FormatError
from moeplace.profiling.imports.tables.delimited import COUNT, EXPERT, LAYER
from moeplace.profiling.imports.tables.table import CountTable, add_tables

NAMES = (
    "load", "loads", "logical_count", "logical_counts", "layer_expert_activation_counts", "layer_expert_counts",
    "layer_expert_count", "expert_load", "expert_loads", "logical_expert_load", "activation_freq",
    "activation_frequency", "expert_counts", "expert_count", "expert_frequency", "expert_frequencies",
    "expert_activation_counts",
    "tokens_per_expert", "num_tokens_per_expert", "load_history", "history", "weight", "weights", "counts", "count",
    "frequencies", "layers", "data",
)  # fmt: skip
_EXPERTS = ("num_experts", "n_experts", "n_routed_experts", "num_local_experts", "num_routed_experts")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers")
_MODEL = ("model", "model_name")
_DEPTH = 6


def find_table(document: Any, where: str) -> CountTable:
    """The one table of counts in a document.

    Raises:
        FormatError: there is none, or more than one; the message names the keys found.
    """
    table = _table(document, where, _DEPTH)
    if table is not None:
        return table
    if isinstance(document, Mapping):
        keys = ", ".join(repr(str(key)[:40]) for key in list(document)[:8]) or "none"
        raise FormatError(
            f"{where} has no loads by layer and expert under the keys {keys} "
            f"(looked for {', '.join(NAMES[:4])} and the like, or one table under any name)"
        )
    raise FormatError(f"{where}: loads must be lists of numbers, a row a layer, or layer -> expert -> count")


def _table(value: Any, where: str, depth: int) -> CountTable | None:
    """The table in a value, None where it is no table."""
    if depth == 0:
        return None
    if isinstance(value, StoredTensor | np.ndarray):
        return _of_array(value.read() if isinstance(value, StoredTensor) else value, where)
    if isinstance(value, Mapping):
        return _of_mapping(value, where, depth)
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return _of_sequence(value, where, depth)
    return None


def _of_array(array: np.ndarray, where: str) -> CountTable | None:
    """(L, E), or (steps, L, E), summed."""
    if array.ndim not in (2, 3) or array.dtype.kind not in "iufb" or not array.size:
        return None
    if array.ndim == 3:
        array = array.sum(axis=0, dtype=np.float64 if array.dtype.kind == "f" else np.int64)
    return CountTable.of_rows(list(array), where)


def _of_sequence(value: Sequence[Any], where: str, depth: int) -> CountTable | None:
    rows = [_row(item) for item in value]
    if all(row is not None for row in rows):
        return CountTable.of_rows([row for row in rows if row is not None], where)
    if all(isinstance(item, Mapping) for item in value):
        records = _of_records(value, where)
        if records is not None:
            return records
    tables = [_table(item, where, depth - 1) for item in value]
    found = [table for table in tables if table is not None]
    if len(found) < len(tables):
        return None
    return add_tables(found, where)


def _row(value: Any) -> np.ndarray | None:
    """(E,) counts of one layer, None where it is no row of numbers."""
    if isinstance(value, StoredTensor | np.ndarray):
        array = value.read() if isinstance(value, StoredTensor) else value
        return array if array.ndim == 1 and array.dtype.kind in "iuf" and array.size else None
    if not isinstance(value, list | tuple) or not value or not all(_is_count(item) or item is None for item in value):
        return None
    if any(item is None or isinstance(item, float) for item in value):
        return np.array([np.nan if item is None else item for item in value], dtype=np.float64)
    return np.array(value, dtype=np.int64)


def _is_count(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**62) or value != value


def _number_in(key: Any) -> int | None:
    """The one number in a key such as 3, "3", "layer_3" or "model.layers.3.mlp"."""
    if isinstance(key, bool):
        return None
    if isinstance(key, int):
        return key if 0 <= key < 1 << 30 else None
    found = re.findall(r"\d+", key) if isinstance(key, str) and len(key) < 200 else []
    return int(found[0]) if len(found) == 1 and len(found[0]) < 10 else None


def _of_mapping(value: Mapping[Any, Any], where: str, depth: int) -> CountTable | None:
    by_layer = _by_layer(value, where)
    if by_layer is not None:
        return _with_companions(by_layer, value)
    if value and all(isinstance(key, str) and re.fullmatch(r"\D*rank\D*\d+\D*", key) for key in value):
        tables = [_table(item, where, depth - 1) for item in value.values()]
        found = [table for table in tables if table is not None]
        return add_tables(found, where) if len(found) == len(tables) else None
    named = (_table(value.get(name), where, depth - 1) for name in NAMES)
    table = next((one for one in named if one is not None), None)
    if table is None:
        others = {key: _table(item, where, depth - 1) for key, item in value.items() if not isinstance(item, str)}
        known = {key: other for key, other in others.items() if other is not None}
        if len(known) > 1:
            keys = ", ".join(repr(str(key)[:40]) for key in list(known)[:8])
            raise FormatError(f"{where} has tables under the keys {keys}: save the one with the loads alone")
        table = next(iter(known.values()), None)
    return None if table is None else _with_companions(table, value)


def _by_layer(value: Mapping[Any, Any], where: str) -> CountTable | None:
    """From layer -> row or layer -> expert -> count."""
    value = {key: item for key, item in value.items() if not isinstance(item, str | int | float | None)}
    layers = [_number_in(key) for key in value]
    if not layers or None in layers or len(set(layers)) < len(layers):
        return None
    names = [key for key in value if isinstance(key, str)]
    if any("rank" in name.lower() or "step" in name.lower() for name in names):
        return None
    numbers = [layer for layer in layers if layer is not None]
    items = sorted(zip(numbers, value.values(), strict=True), key=lambda item: item[0])
    rows = [_row(item) for _, item in items]
    if all(row is not None for row in rows):
        table = CountTable.of_rows([row for row in rows if row is not None], where)
        return replace(table, layer_ids=tuple(layer for layer, _ in items))
    cells: dict[tuple[int, int], float] = {}
    for layer, item in items:
        if not isinstance(item, Mapping):
            return None
        for key, count in item.items():
            expert = _number_in(key)
            if expert is None or not _is_count(count):
                return None
            cells[layer, expert] = cells.get((layer, expert), 0) + count
    whole = all(float(count).is_integer() for count in cells.values())
    return CountTable.of_cells(cells, where, whole=whole) if cells else None


def _of_records(value: Sequence[Mapping[Any, Any]], where: str) -> CountTable | None:
    """From a list of {layer, expert, count}, or of {layer, row of counts}."""
    cells: dict[tuple[int, int], float] = {}
    rows: dict[int, np.ndarray] = {}
    for record in value:
        layer = next((record[name] for name in LAYER if name in record), None)
        expert = next((record[name] for name in EXPERT if name in record), None)
        count = next((record[name] for name in COUNT if name in record), 1)
        if type(layer) is not int:
            return None
        row = next((found for name in (*NAMES, *COUNT) if (found := _row(record.get(name))) is not None), None)
        nested = next((_by_layer({layer: item}, where) for item in record.values() if isinstance(item, Mapping)), None)
        if nested is not None and expert is None and row is None and layer >= 0:
            cells |= {(layer, number): float(count) for number, count in enumerate(nested.rows[0]) if count}
        elif type(expert) is int and _is_count(count):
            cells[layer, expert] = cells.get((layer, expert), 0) + count
        elif row is not None and layer not in rows:
            rows[layer] = row
        else:
            return None
    if rows and not cells and min(rows) >= 0:
        order = sorted(rows)
        return replace(CountTable.of_rows([rows[layer] for layer in order], where), layer_ids=tuple(order))
    whole = all(float(count).is_integer() for count in cells.values())
    return CountTable.of_cells(cells, where, whole=whole) if cells and not rows else None


def _with_companions(table: CountTable, value: Mapping[Any, Any]) -> CountTable:
    """The table with what stands beside it."""
    experts, layers = (
        next((value[name] for name in names if type(value.get(name)) is int), 0) for names in (_EXPERTS, _LAYERS)
    )
    model = next((value[name] for name in _MODEL if isinstance(value.get(name), str)), "")
    return replace(
        table,
        num_experts=table.num_experts or (experts if 0 < experts < 1 << 20 else 0),
        num_hidden_layers=table.num_hidden_layers or (layers if table.numbered()[-1] < layers < 1 << 16 else 0),
        model=table.model or model[:200],
    )
