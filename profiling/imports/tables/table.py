"""CountTable: counts by layer and expert as a source gives them, before anything is judged.

Shape letters: L layers, E experts per layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moeplace.profiling.errors import FormatError
from moeplace.profiling.traces.trace import MOST_EXPERTS

MOST_LAYERS = 4096
_MOST_CELLS = 1 << 26


@dataclass(frozen=True)
class CountTable:
    """Counts by layer.

    Attributes:
        rows: one array of int64 or float64 a layer, by expert; lengths may differ.
        layer_ids: number of each row, rising; None = rows are counted from 0.
        sparse: rows end with the last expert that has a count: experts that are absent have none.
        num_hidden_layers: decoder layers that the source says, 0 = unknown.
        num_experts: experts per layer that the source says, 0 = unknown.
        model: name of the model.
    """

    rows: tuple[np.ndarray, ...]
    layer_ids: tuple[int, ...] | None = None
    sparse: bool = False
    num_hidden_layers: int = 0
    num_experts: int = 0
    model: str = ""

    @classmethod
    def of_rows(cls, rows: Sequence[np.ndarray], where: str) -> "CountTable":
        """From rows of numbers; -1 or NaN at the ends of rows, and nowhere else, pad layers with fewer experts.

        Raises:
            FormatError: no row, too many, or one without an expert.
        """
        if not 1 <= len(rows) <= MOST_LAYERS or not all(1 <= len(row) <= MOST_EXPERTS for row in rows):
            sizes = f"{len(rows)} rows of up to {max((len(row) for row in rows), default=0)} numbers"
            raise FormatError(f"{where}: loads are numbers (layers, experts), not {sizes}")
        kind = np.float64 if any(row.dtype.kind == "f" for row in rows) else np.int64
        return cls(_without_padding([row.astype(kind) for row in rows]))

    @classmethod
    def of_cells(cls, cells: dict[tuple[int, int], float], where: str, *, whole: bool) -> "CountTable":
        """From counts by (layer, expert); what is absent is 0.

        Raises:
            FormatError: no cell, or a layer or an expert out of range.
        """
        if not cells:
            raise FormatError(f"{where} has no counts")
        layers = sorted({layer for layer, _ in cells})
        experts = max(expert for _, expert in cells) + 1
        if layers[0] < 0 or layers[-1] > MOST_LAYERS or min(expert for _, expert in cells) < 0:
            raise FormatError(f"{where}: layers must lie in 0..{MOST_LAYERS}, and experts from 0")
        if experts > MOST_EXPERTS or experts * len(layers) > _MOST_CELLS:
            raise FormatError(f"{where}: expert {experts - 1} must be below {MOST_EXPERTS}")
        table = np.zeros((len(layers), experts), np.int64 if whole else np.float64)
        index = {layer: row for row, layer in enumerate(layers)}
        for (layer, expert), count in cells.items():
            table[index[layer], expert] = count
        return cls(tuple(table), tuple(layers), sparse=True)

    def numbered(self) -> tuple[int, ...]:
        """Number of each row."""
        return tuple(range(len(self.rows))) if self.layer_ids is None else self.layer_ids


def _without_padding(rows: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Rows without -1 or NaN at their ends; as they are where either stands anywhere else."""
    lengths = []
    for row in rows:
        blank = np.isnan(row) | (row == -1)
        length = len(row) - int(blank[::-1].cumprod().sum())
        if blank[:length].any() or not length:
            return tuple(rows)
        lengths.append(length)
    return tuple(row[:length] for row, length in zip(rows, lengths, strict=True))


def add_tables(tables: Sequence[CountTable], where: str) -> CountTable:
    """The sum of tables of one model: of steps, passes or ranks. A layer or expert that one lacks counts as 0.

    Raises:
        FormatError: no table, or layers with other numbers of experts.
    """
    if not tables:
        raise FormatError(f"{where} has no counts")
    sums: dict[int, np.ndarray] = {}
    sparse = any(table.sparse for table in tables)
    for table in tables:
        for layer, row in zip(table.numbered(), table.rows, strict=True):
            before = sums.get(layer)
            if before is None:
                sums[layer] = row.copy()
            elif len(before) == len(row):
                sums[layer] = before + row
            elif sparse:
                size = max(len(before), len(row))
                sums[layer] = np.pad(before, (0, size - len(before))) + np.pad(row, (0, size - len(row)))
            else:
                raise FormatError(
                    f"{where}: layer {layer} has {len(before)} experts in one table, {len(row)} in another"
                )
    layers = sorted(sums)
    first = next((table for table in tables if table.layer_ids is not None), None)
    return replace(
        tables[0],
        rows=tuple(sums[layer] for layer in layers),
        layer_ids=tuple(layers) if first is not None else None,
        sparse=sparse,
        num_hidden_layers=max(table.num_hidden_layers for table in tables),
        num_experts=max(table.num_experts for table in tables),
    )
