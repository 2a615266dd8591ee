"""SVG as text: elements, and cells of a matrix drawn as one path per colour level."""

from collections.abc import Sequence
from html import escape

import numpy as np


def number(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def element(tag: str, content: str = "", **attributes: str | float) -> str:
    """One element; underscores in attribute names become hyphens, `class_` is `class`."""
    parts = [tag]
    for name, value in attributes.items():
        text = value if isinstance(value, str) else number(value)
        parts.append(f'{name.rstrip("_").replace("_", "-")}="{escape(text)}"')
    return f"<{' '.join(parts)}>{content}</{tag}>" if content else f"<{' '.join(parts)}/>"


def text(content: str, x: float, y: float, class_: str = "", **attributes: str | float) -> str:
    """A label; its content is escaped."""
    return element("text", escape(content), x=x, y=y, class_=class_, **attributes)


def picture(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    """A drawing that scales with its column and is named for screen readers."""
    body = element("title", escape(title)) + "".join(parts)
    return element("svg", body, viewBox=f"0 0 {number(width)} {number(height)}", role="img", class_="chart")


def cells(levels: np.ndarray, x_of: Sequence[float], y_of: Sequence[float], size: tuple[float, float]) -> list[str]:
    """The cells of a matrix, one path per level.

    Args:
        levels: (rows, columns) integers: the class of a cell is its prefix and level; negative = not drawn.
        x_of: left edge of each column.
        y_of: upper edge of each row.
        size: width and height of a cell.
    """
    width, height = number(size[0]), number(size[1])
    paths = []
    for level in np.unique(levels[levels >= 0]):
        strokes = (
            f"M{number(x_of[column])} {number(y_of[row])}h{width}v{height}h-{width}z"
            for row, column in np.argwhere(levels == level)
        )
        paths.append(f'<path class="l{level}" d="{"".join(strokes)}"/>')
    return paths


def ribbon(x0: float, top0: float, bottom0: float, x1: float, top1: float, bottom1: float) -> str:
    """The outline of a band from one vertical edge to another, as path data."""
    middle = number((x0 + x1) / 2)
    a, b = number(x0), number(x1)
    return (
        f"M{a} {number(top0)}C{middle} {number(top0)} {middle} {number(top1)} {b} {number(top1)}"
        f"V{number(bottom1)}C{middle} {number(bottom1)} {middle} {number(bottom0)} {a} {number(bottom0)}Z"
    )
