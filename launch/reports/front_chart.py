"""Traffic against balance: the points of `moeplace compare --sweep`, and those that no other point beats."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from moeplace.launch.reports.scatter import pareto_front, round_ticks
from moeplace.launch.reports.svg import WIDTH, element, number, picture, text
from moeplace.profiling.errors import FormatError

_HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 250.0, 40.0, 12.0, 40.0, 12.0
_TRAFFIC = {"dispatch-combine": ("ranks_per_token", "ranks per token")}
_COPIES = ("copies_per_token", "copies per token")


@dataclass(frozen=True)
class FrontPoint:
    """A solver's placement, held-out.

    Attributes:
        name: of the solver, with the cap on imbalance that it had.
        imbalance: mean over layers.
        traffic: ranks or copies per token.
        is_best: whether no other point has both less.
    """

    name: str
    imbalance: float
    traffic: float
    is_best: bool


@dataclass(frozen=True)
class Front:
    """The points of one trace.

    Attributes:
        trace: its name.
        unit: what traffic is.
        points: by rising imbalance.
    """

    trace: str
    unit: str
    points: tuple[FrontPoint, ...]


def fronts_from_json(document: Any, source: str) -> list[Front]:
    """One front per trace of a file that `moeplace compare --json` wrote.

    Raises:
        FormatError: it is something else.
    """
    try:
        key, unit = _TRAFFIC.get(document["mode"], _COPIES)
        by_trace: dict[str, list[tuple[float, float, str]]] = {}
        caps = {(run["solver"], run.get("max_imbalance")) for run in document["runs"]}
        swept = Counter(solver for solver, _ in caps)
        for run in document["runs"]:
            name = _name(run, with_cap=swept[run["solver"]] > 1)
            point = (float(run["imbalance_mean"]), float(run[key]), name)
            by_trace.setdefault(str(run["trace"]), []).append(point)
        if not by_trace:
            raise ValueError("no runs")
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{source} is not the JSON of `moeplace compare`: {error}") from error
    return [Front(Path(trace).name, unit, _marked(points)) for trace, points in by_trace.items()]


def _name(run: Mapping[str, Any], *, with_cap: bool) -> str:
    cap = run.get("max_imbalance")
    return str(run["solver"]) + (f", cap {float(cap):g}" if with_cap and cap is not None else "")


def _marked(points: Sequence[tuple[float, float, str]]) -> tuple[FrontPoint, ...]:
    best = set(pareto_front(points))
    return tuple(FrontPoint(name, x, y, (x, y, name) in best) for x, y, name in sorted(points))


def front_chart(front: Front) -> str:
    """Numbered points; those of the front are joined."""
    xs, ys = round_ticks([p.imbalance for p in front.points]), round_ticks([p.traffic for p in front.points])
    wide, high = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - xs[0]) / (xs[-1] - xs[0]) * wide,
            _TOP + high - (y - ys[0]) / (ys[-1] - ys[0]) * high,
        )

    parts = []
    for x in xs:
        px, _ = place(x, ys[0])
        parts.append(element("path", d=f"M{number(px)} {number(_TOP)}v{number(high)}", class_="grid"))
        parts.append(text(f"{x:g}", px, _TOP + high + 14, "muted", text_anchor="middle"))
    for y in ys:
        _, py = place(xs[0], y)
        parts.append(element("path", d=f"M{number(_LEFT)} {number(py)}h{number(wide)}", class_="grid"))
        parts.append(text(f"{y:g}", _LEFT - 6, py + 4, "muted", text_anchor="end"))
    best = [place(p.imbalance, p.traffic) for p in front.points if p.is_best]
    joined = " ".join(f"{number(x)},{number(y)}" for x, y in best)
    parts.append(element("polyline", points=joined, class_="front"))
    for index, point in enumerate(front.points, start=1):
        px, py = place(point.imbalance, point.traffic)
        parts.append(element("circle", cx=px, cy=py, r=8, class_="bar" if point.is_best else "bar first"))
        parts.append(text(str(index), px, py + 3.6, "number", text_anchor="middle"))
    parts.append(text("imbalance", _LEFT + wide, _HEIGHT - 8, "muted", text_anchor="end"))
    parts.append(text(front.unit, 0, _HEIGHT - 8, "muted"))
    return picture(WIDTH, _HEIGHT, f"{front.unit} against imbalance, {front.trace}", parts)


def front_table(front: Front) -> str:
    """The numbers of the points."""
    rows = "".join(
        f"<tr><td{' class=best' if p.is_best else ''}>{index} {escape(p.name)}</td><td>{p.imbalance:.3f}</td>"
        f"<td>{p.traffic:.3f}</td></tr>"
        for index, p in enumerate(front.points, start=1)
    )
    head = f"<tr><th></th><th>imbalance</th><th>{escape(front.unit)}</th></tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
