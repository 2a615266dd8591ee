"""SVG as text: elements, labels, areas to hover over, bands."""

from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH = 340.0
"""Of a drawing: about that of a phone."""
LEFT = 30.0
"""Room for the names of rows."""


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


def hover(words: str, x: float, y: float, width: float, height: float) -> str:
    """An unseen area that says something to who points at it."""
    return element("rect", element("title", escape(words)), x=x, y=y, width=width, height=height, class_="hover")


def layer_labels(layer_ids: np.ndarray, top: float, row: float) -> list[str]:
    """Decoder-layer numbers beside the rows of a matrix, every fifth where rows are narrow."""
    every = 1 if row >= 12 else 5
    return [
        text(str(layer_ids[index]), LEFT - 6, top + index * row + row / 2 + 3.6, "muted", text_anchor="end")
        for index in range(0, len(layer_ids), every)
    ]


def ribbon(x0: float, top0: float, bottom0: float, x1: float, top1: float, bottom1: float) -> str:
    """The outline of a band from one vertical edge to another, as path data."""
    middle = number((x0 + x1) / 2)
    a, b = number(x0), number(x1)
    return (
        f"M{a} {number(top0)}C{middle} {number(top0)} {middle} {number(top1)} {b} {number(top1)}"
        f"V{number(bottom1)}C{middle} {number(bottom1)} {middle} {number(bottom0)} {a} {number(bottom0)}Z"
    )
