"""Bars: a figure of several runs or placements side by side, with a mark for what was predicted or is proven."""

from collections.abc import Sequence
from dataclasses import dataclass

from moeplace.launch.reports.svg import WIDTH, element, number, picture, text

_STEP, _BAR, _VALUE = 44.0, 16.0, 62.0


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: above it.
        value: its length; None = not known.
        mark: where a tick is drawn; None = none.
        first: whether it is the baseline.
    """

    name: str
    value: float | None
    mark: float | None = None
    first: bool = False


def bar_chart(title: str, bars: Sequence[Bar], digits: int, *, scale: float = 1.0) -> str:
    """The bars below each other, from zero on.

    Args:
        title: what the figure is.
        bars: what to draw.
        digits: after the point of a value.
        scale: multiplies a value before it is written.
    """
    known = [value for bar in bars for value in (bar.value, bar.mark) if value is not None]
    per_unit = (WIDTH - _VALUE) / max([*known, 1e-12])
    parts = []
    for index, bar in enumerate(bars):
        y = index * _STEP + 16
        parts.append(text(bar.name, 0, y - 4, "label"))
        end = 0.0
        if bar.value is not None:
            end = bar.value * per_unit
            kind = "bar first" if bar.first else "bar"
            parts.append(element("rect", x=0, y=y, width=max(end, 1), height=_BAR, rx=2, class_=kind))
        if bar.mark is not None:
            mark = bar.mark * per_unit
            parts.append(element("path", d=f"M{number(mark)} {number(y - 2)}v{number(_BAR + 4)}", class_="mark"))
            end = max(end, mark)
        words = "-" if bar.value is None else f"{bar.value * scale:,.{digits}f}"
        parts.append(text(words, end + 6, y + _BAR - 4, "value"))
    return picture(WIDTH, len(bars) * _STEP + 2, title, parts)
