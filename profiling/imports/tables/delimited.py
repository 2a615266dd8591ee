"""Counts as delimited text: a matrix, `layer,expert` once per token, or `layer,expert,count`; with or without header.

Separators are comma, semicolon, tab, bar or blanks; comments (#), blank lines, quotes, a byte-order mark and gzip are
understood. Long tables are added up in pieces, so that memory follows the model, not the file.
"""

import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np

from moeplace.profiling.errors import FormatError
from moeplace.profiling.imports.tables.table import MOST_LAYERS, CountTable
from moeplace.profiling.imports.tables.text import open_text
from moeplace.profiling.traces.trace import MOST_EXPERTS

LAYER = ("layer", "layer_id", "layer_idx", "layer_index", "layer_number", "moe_layer", "moe_layer_id", "l")
EXPERT = (
    "expert",
    "expert_id",
    "expert_idx",
    "expert_index",
    "expert_number",
    "logical_expert",
    "logical_expert_id",
    "e",
)
COUNT = (
    "count", "counts", "load", "loads", "tokens", "num_tokens", "token_count", "token_counts", "value", "hits",
    "frequency", "freq", "activations", "activation_count", "activation_freq", "n", "num",
)  # fmt: skip
_SEPARATORS = ("\t", ";", ",", "|", None)
_SAMPLE, _PIECE = 256, 1 << 15
_GRID_ROWS = 8
_MOST_LINE = 1 << 24
_MOST_CELLS = 1 << 22

Line = tuple[int, str]


@dataclass(frozen=True)
class _Form:
    """How lines are read: the columns of layer, expert and count (-1 = each line counts 1), or a matrix."""

    separator: str | None
    columns: tuple[int, int, int] | None = None
    index_column: bool = False
    transposed: bool = False


def read_delimited(path: Path) -> CountTable:
    """The counts in a text file.

    Raises:
        FormatError: it is not text, a line is not numbers, or the columns have no known names.
    """
    try:
        with open_text(path) as file:
            lines = _lines(path, file)
            sample = list(islice(lines, _SAMPLE))
            if not sample:
                raise FormatError(f"{path} is empty: counts by layer and expert are needed")
            form, start = _find_form(path, sample)
            rest = chain(sample[start:], lines)
            return _read_cells(path, form, rest) if form.columns else _read_matrix(path, form, rest)
    except (UnicodeError, EOFError, OSError, zlib.error) as error:
        raise FormatError(f"{path} is not readable text: {' '.join(str(error).split())[:120]}") from error


def _lines(path: Path, file: Iterable[str]) -> Iterator[Line]:
    """(number, text) of the lines that are neither blank nor a comment."""
    readline = file.readline  # type: ignore[attr-defined]
    number = 0
    while line := readline(_MOST_LINE):
        number += 1
        if len(line) == _MOST_LINE:
            raise FormatError(f"{path}, line {number} is longer than {_MOST_LINE} characters")
        text = line.split("#", 1)[0].strip(" \r\n\x00")
        if text.strip():
            yield number, text


def _cells(text: str, separator: str | None) -> list[str]:
    cells = text.split() if separator is None else text.split(separator)
    return [cell.strip().strip("\"'").strip() for cell in cells]


def _find_form(path: Path, sample: list[Line]) -> tuple[_Form, int]:
    """The form, and how many lines of the sample are a header."""
    first = sample[0][1]
    separator = next((mark for mark in _SEPARATORS if mark is None or mark in first), None)
    head = _cells(first, separator)
    if len(head) > 2 and not head[0] and head[1:] == [str(n) for n in range(len(head) - 1)]:
        return _Form(separator, index_column=True), 1  # as pandas writes a table
    if all(_is_number(cell, separator) for cell in head):
        counted = len(head) >= 4 and len(sample) > 1 and head == [str(n) for n in range(len(head))]
        return (_Form(separator), 1) if counted else (_guess(separator, sample), 0)
    return _named_form(path, separator, head), 1


def _named_form(path: Path, separator: str | None, head: list[str]) -> _Form:
    names = [re.sub(r"[\s\-.]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) for name in head]
    layer, expert, count = (
        next((names.index(one) for one in known if one in names), -1) for known in (LAYER, EXPERT, COUNT)
    )
    if layer >= 0 and expert >= 0:
        return _Form(separator, (layer, expert, count))
    rest = names[1:]
    if rest and all(re.fullmatch(r"(?:.*\D)?\d+", name) for name in rest):
        is_index = names[0] in ("", "index", "unnamed:_0", *LAYER, *EXPERT) or not re.search(r"\d$", names[0])
        turned = names[0] in EXPERT or (all("layer" in name for name in rest) and "layer" not in names[0])
        return _Form(separator, index_column=is_index, transposed=turned)
    shown = ", ".join(repr(name[:30]) for name in head[:8])
    raise FormatError(
        f"{path}: columns {shown} are not understood: counts are a matrix (a layer a line), or have columns named "
        "layer and expert, and count where each line stands for more than one token"
    )


def _guess(separator: str | None, sample: list[Line]) -> _Form:
    """A matrix, unless two or three columns look like layer, expert and count."""
    rows = [_cells(text, separator) for _, text in sample]
    if len({len(row) for row in rows}) != 1 or len(rows) < 3 or not 2 <= len(rows[0]) <= 3:
        return _Form(separator)
    try:
        table = np.array([[int(cell) for cell in row] for row in rows])
    except (ValueError, OverflowError):
        return _Form(separator)
    layers = table[:, 0]
    is_grouped = (np.diff(layers) >= 0).all() and (np.diff(layers) == 0).any()
    if table[:, :2].min() < 0 or layers.max() > MOST_LAYERS:
        return _Form(separator)
    if len(rows[0]) == 2:
        return _Form(separator, (0, 1, -1) if is_grouped else None)
    cells = len(np.unique(layers)) * len(np.unique(table[:, 1]))
    is_grid = len(rows) >= _GRID_ROWS and cells <= 2 * len(rows)
    is_cells = len(np.unique(table[:, :2], axis=0)) == len(rows) and (is_grouped or is_grid)
    return _Form(separator, (0, 1, 2) if is_cells else None)


def _is_number(cell: str, separator: str | None) -> bool:
    try:
        float(cell.replace(",", ".") if separator == ";" else cell)
    except ValueError:
        return not cell
    return True


def _number(path: Path, number: int, cell: str, separator: str | None) -> float:
    try:
        return float(cell.replace(",", ".") if separator == ";" else cell)
    except ValueError:
        raise FormatError(f"{path}, line {number}: {cell[:40]!r} is not a number") from None


def _label(path: Path, number: int, cell: str, separator: str | None) -> float:
    """The number of a layer or an expert: 3, or that in `layers.3`."""
    named = re.fullmatch(r"[A-Za-z_][A-Za-z_. ]*(\d{1,9})", cell)
    return float(named.group(1)) if named else _number(path, number, cell, separator)


def _read_matrix(path: Path, form: _Form, lines: Iterable[Line]) -> CountTable:
    """A layer a line; empty cells at the end of a line are no experts."""
    rows: list[np.ndarray] = []
    labels: list[str] = []
    total = 0
    for number, text in lines:
        cells = _cells(text, form.separator)
        while cells and not cells[-1]:
            cells.pop()
        if form.index_column and cells:
            labels.append(cells.pop(0))
        total += len(cells)
        if (len(rows) >= MOST_LAYERS and not form.transposed) or total > _MOST_CELLS:
            raise FormatError(
                f"{path}, line {number}: a matrix has a layer a line, at most {MOST_LAYERS}; a table of single tokens "
                "needs a header with layer and expert"
            )
        rows.append(_whole(np.array([_number(path, number, cell, form.separator) for cell in cells])))
    if form.transposed:
        if len({len(row) for row in rows}) > 1:
            raise FormatError(f"{path}: all lines must have one length where experts are the lines")
        return CountTable.of_rows(list(np.array(rows).T), str(path))
    table = CountTable.of_rows(rows, str(path))
    layers = _label_numbers(labels, len(rows))
    return table if layers is None else CountTable(table.rows, layers)


def _label_numbers(labels: list[str], rows: int) -> tuple[int, ...] | None:
    """Layers that the first column names, None where it does not name rising ones."""
    found = [re.search(r"(\d{1,4})(?:\.0)?$", label) for label in labels]
    numbers = tuple(int(match.group(1)) for match in found if match)
    rising = len(numbers) == rows and list(numbers) == sorted(set(numbers))
    return numbers if rising else None


def _whole(row: np.ndarray) -> np.ndarray:
    """The row in int64 where it holds whole numbers."""
    is_whole = np.isfinite(row).all() and not (row % 1).any() and (np.abs(row) < 2.0**53).all()
    return row.astype(np.int64) if is_whole else row


def _read_cells(path: Path, form: _Form, lines: Iterable[Line]) -> CountTable:
    """One cell a line, added up."""
    assert form.columns is not None
    layer_at, expert_at, count_at = form.columns
    sums: dict[tuple[int, int], float] = {}
    pending = iter(lines)
    while piece := list(islice(pending, _PIECE)):
        table = np.empty((len(piece), 3))
        for row, (number, text) in enumerate(piece):
            cells = _cells(text, form.separator)
            if len(cells) <= max(form.columns):
                raise FormatError(f"{path}, line {number} has {len(cells)} columns, {max(form.columns) + 1} are needed")
            table[row, 0] = _label(path, number, cells[layer_at], form.separator)
            table[row, 1] = _label(path, number, cells[expert_at], form.separator)
            table[row, 2] = 1 if count_at < 0 else _number(path, number, cells[count_at], form.separator)
        _check_piece(path, piece, table)
        _add_piece(path, sums, table)
    is_whole = all(float(count).is_integer() for count in sums.values())
    return CountTable.of_cells(sums, str(path), whole=is_whole)


def _check_piece(path: Path, piece: list[Line], table: np.ndarray) -> None:
    for column, name, most in ((0, "layer", MOST_LAYERS), (1, "expert", MOST_EXPERTS - 1)):
        values = table[:, column]
        bad = ~((values >= 0) & (values <= most) & (np.floor(values) == values))
        if bad.any():
            row = int(bad.argmax())
            raise FormatError(
                f"{path}, line {piece[row][0]}: {name} {values[row]:g} must be a whole number in 0..{most}"
            )
    bad = ~((table[:, 2] >= 0) & (table[:, 2] < 2.0**53))
    if bad.any():
        row = int(bad.argmax())
        raise FormatError(f"{path}, line {piece[row][0]}: count {table[row, 2]:g} must lie in 0..2^53")


def _add_piece(path: Path, sums: dict[tuple[int, int], float], table: np.ndarray) -> None:
    keys, inverse = np.unique(table[:, :2].astype(np.int64), axis=0, return_inverse=True)
    totals = np.bincount(inverse.ravel(), weights=table[:, 2])
    for (layer, expert), total in zip(keys.tolist(), totals.tolist(), strict=True):
        sums[layer, expert] = sums.get((layer, expert), 0) + total
    if len(sums) > _MOST_CELLS:
        raise FormatError(f"{path} names more than {_MOST_CELLS} pairs of layer and expert")
