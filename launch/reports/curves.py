"""Lines over a common axis: figures of several policies against the budget, with a mark where the question is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeplace.launch.reports.scatter import round_ticks
from moeplace.launch.reports.svg import WIDTH, element, hover, number, picture, text

COLOURS = 8
_HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 220.0, 40.0, 14.0, 38.0, 10.0
_REACH = 14.0
"""Side of the area around a point that says its numbers."""


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        name: what it is.
        points: (x, y), by rising x.
        colour: 0 .. COLOURS - 1.
        dashed: whether it is a bound or a prediction.
        dots: whether it is points alone.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False
    dots: bool = False


def curve_chart(
    title: str, curves: Sequence[Curve], *, x_label: str, y_label: str, marks: Mapping[str, float] | None = None
) -> str:
    """The lines from zero on, with upright marks at places of the x axis.

    Args:
        title: for who cannot see it.
        curves: at least one, each of a point or more.
        x_label, y_label: what the axes are.
        marks: words -> x.
    """
    marks = marks or {}
    points = [point for curve in curves for point in curve.points]
    xs = round_ticks([0.0, *(x for x, _ in points), *marks.values()])
    ys = round_ticks([0.0, *(y for _, y in points)])
    wide, high = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x / xs[-1] * wide, _TOP + high - y / ys[-1] * high

    parts = []
    for x in xs:
        parts.append(text(f"{x:g}", place(x, 0)[0], _TOP + high + 14, "muted", text_anchor="middle"))
    for y in ys:
        height = place(0, y)[1]
        parts.append(element("path", d=f"M{number(_LEFT)} {number(height)}h{number(wide)}", class_="grid"))
        parts.append(text(f"{y:g}", _LEFT - 6, height + 4, "muted", text_anchor="end"))
    for words, x in marks.items():
        across = place(x, 0)[0]
        parts.append(element("path", d=f"M{number(across)} {number(_TOP)}v{number(high)}", class_="front"))
        parts.append(text(words, across + 4, _TOP + 8, "muted"))
    for curve in curves:
        parts += _drawn(curve, [place(x, y) for x, y in curve.points])
    parts.append(text(x_label, _LEFT + wide, _HEIGHT - 6, "muted", text_anchor="end"))
    parts.append(text(y_label, 0, _HEIGHT - 6, "muted"))
    return picture(WIDTH, _HEIGHT, title, parts)


def _drawn(curve: Curve, places: Sequence[tuple[float, float]]) -> list[str]:
    """A line with its points, each of which says its numbers."""
    colour = f"c{curve.colour % COLOURS}"
    parts = []
    if not curve.dots:
        joined = " ".join(f"{number(x)},{number(y)}" for x, y in places)
        parts.append(element("polyline", points=joined, class_=f"line {colour}{' dashed' if curve.dashed else ''}"))
    for (px, py), (x, y) in zip(places, curve.points, strict=True):
        if not curve.dashed:
            parts.append(element("circle", cx=px, cy=py, r=3.4 if curve.dots else 2.2, class_=f"dot {colour}"))
        words = f"{curve.name}: {y:.4g} at {x:.4g}"
        parts.append(hover(words, px - _REACH / 2, py - _REACH / 2, _REACH, _REACH))
    return parts


def curve_legend(curves: Sequence[Curve]) -> list[tuple[str, str]]:
    """(colour variable, name) of lines that are not dashed, and of those that are if they stand for themselves."""
    seen: dict[int, str] = {}
    for curve in curves:
        seen.setdefault(curve.colour % COLOURS, curve.name)
    return [(f"r{colour}", name) for colour, name in seen.items()]
