"""Readable tables on standard output."""

from collections.abc import Sequence

Cell = str | int | float | None


def format_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Columns aligned: numbers to the right with four significant digits, text to the left."""
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(header)), line(["-" * w for w in widths]), *(line(row) for row in cells)])


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        if cell != 0 and (abs(cell) < 1e-3 or abs(cell) >= 1e5):
            return f"{cell:.3g}"
        return f"{cell:.4f}" if abs(cell) < 10 else f"{cell:.2f}"
    return str(cell)
