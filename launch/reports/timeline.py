"""The timeline of a service: what its event log says, as a drawing and as a table.

Reviews and migrations are bars from their first event to their last, other events are marks. Above them runs what a
step was predicted to cost, against what the placement in force had promised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from moeplace.launch.reports.scatter import round_ticks
from moeplace.launch.reports.svg import WIDTH, element, number, picture, text
from moeplace.runtime.event import Event

_LEFT, _LANE, _CAPTION, _CURVE, _AXIS = 64.0, 26.0, 20.0, 110.0, 34.0
_REVIEW_ENDS = {"kept": "", "candidate-kept": "", "move": "good", "review-failed": "bad", "placement-changed": "bad"}
_MOVE_ENDS = {"committed": "good", "move-failed": "bad", "placement-changed": "bad"}
_ROUTINE = ("review-started", "kept", "window-too-small")
_MOST_ROWS = 40


@dataclass(frozen=True)
class Bar:
    """Something that lasted.

    Attributes:
        start, end: positions on the axis.
        outcome: "good", "bad" or "" (nothing came of it).
    """

    start: float
    end: float
    outcome: str


def bars_between(events: Sequence[Event], begins: str, ends: dict[str, str], axis: str) -> list[Bar]:
    """From each event of the kind `begins` to the next of `ends`; what never ended lasts until the last event."""
    bars, start = [], None
    for event in events:
        at = float(getattr(event, axis))
        if start is not None and event.kind in ends:
            bars.append(Bar(start, at, ends[event.kind]))
            start = None
        if event.kind == begins:
            start = at
    if start is not None:
        bars.append(Bar(start, float(getattr(events[-1], axis)), ""))
    return bars


def timeline_chart(events: Sequence[Event]) -> str:
    """Predicted seconds of a step above; reviews, migrations and other events below, over seconds (or steps)."""
    events = sorted(events, key=lambda event: (event.time, event.step))
    axis = "time" if events[-1].time > events[0].time else "step"
    origin = float(getattr(events[0], axis))
    last = max(float(getattr(events[-1], axis)) - origin, 1e-9)
    ticks = [tick for tick in round_ticks([0.0, last]) if tick <= last * 1.05]
    scale = (WIDTH - _LEFT - 10) / max(last, ticks[-1])

    def place(value: float) -> float:
        return _LEFT + (value - origin) * scale

    lanes = {
        "reviews": bars_between(events, "review-started", _REVIEW_ENDS, axis),
        "migrations": bars_between(events, "move", _MOVE_ENDS, axis),
    }
    known = {*_REVIEW_ENDS, *_MOVE_ENDS, "watching", *_ROUTINE}
    others = [place(float(getattr(event, axis))) for event in events if event.kind not in known]
    curve = _curve(events, axis, place)
    top = _CURVE if curve else 8.0
    bottom = top + _LANE * (len(lanes) + bool(others))
    parts = []
    for tick in ticks:
        x = place(origin + tick)
        parts.append(
            element("path", d=f"M{number(x)} {number(_CAPTION if curve else 0)}V{number(bottom)}", class_="grid")
        )
        parts.append(text(f"{tick:g}", x, bottom + 14, "muted", text_anchor="middle"))
    parts += curve
    unit = "seconds" if axis == "time" else "steps"
    parts.append(text(f"{unit} since the first event", WIDTH - 10, bottom + 30, "muted", text_anchor="end"))
    for index, (name, bars) in enumerate(lanes.items()):
        y = top + index * _LANE
        parts.append(text(name, 0, y + 16, "muted"))
        for bar in bars:
            start, width = place(bar.start), max((bar.end - bar.start) * scale, 2.0)
            kind = f"event {bar.outcome}".strip()
            parts.append(element("rect", x=start, y=y + 5, width=width, height=15, rx=2, class_=kind))
    if others:
        y = top + len(lanes) * _LANE
        parts.append(text("service", 0, y + 16, "muted"))
        parts += [element("path", d=f"M{number(x)} {number(y + 5)}v15", class_="mark") for x in others]
    return picture(WIDTH, bottom + _AXIS, "what happened when", parts)


def event_table(events: Sequence[Event]) -> str:
    """What was decided, latest last; routine looks are counted, of one decision many times the last is told."""
    events = sorted(events, key=lambda event: (event.time, event.step))
    told: list[tuple[Event, int]] = []
    for event in (event for event in events if event.kind not in _ROUTINE):
        again = told.pop()[1] if told and told[-1][0].kind == event.kind else 0
        told.append((event, again + 1))
    shown = told[-_MOST_ROWS:]
    rows = "".join(_row(event, count, events[0].time) for event, count in shown)
    looks = sum(event.kind == "kept" for event in events)
    left_out = f"; {len(told) - len(shown)} earlier decisions are left out" if len(told) > len(shown) else ""
    caption = f"{looks} looks found nothing to do{left_out}."
    table = f'<div class="scroll"><table class="events"><tbody>{rows}</tbody></table></div>'
    return f'<div>{table}<p class="note">{caption}</p></div>'


def _row(event: Event, count: int, start: float) -> str:
    often = f" ({count} times, the last:)" if count > 1 else ""
    return (
        f"<tr><td>{event.time - start:,.1f} s<small>step {event.step:,}</small></td>"
        f"<td><b>{escape(event.kind)}</b>{often} {escape(event.sentence)}</td></tr>"
    )


def _curve(events: Sequence[Event], axis: str, place: Callable[[float], float]) -> list[str]:
    """Predicted milliseconds per step at every review, and the promise in force; nothing without two reviews."""
    seen, promised = (
        [(float(getattr(event, axis)), float(event.figures[name])) for event in events if _known(event, name)]
        for name in ("seconds_per_step", "promised_seconds")
    )
    if len(seen) < 2:
        return []
    values = round_ticks([value * 1e3 for _, value in seen + promised])
    high = _CURVE - _CAPTION - 16

    def height(seconds: float) -> float:
        return _CAPTION + 4 + high * (1 - (seconds * 1e3 - values[0]) / (values[-1] - values[0]))

    parts = [text("predicted ms per step", 0, 10, "muted")]
    for value in (values[0], values[-1]):
        parts.append(text(f"{value:g}", _LEFT - 6, height(value / 1e3) + 4, "muted", text_anchor="end"))
    if promised:  # it holds until the next one
        steps = "".join(f"H{number(place(at))}V{number(height(value))}" for at, value in promised[1:])
        at, value = promised[0]
        end = f"H{number(place(seen[-1][0]))}" if seen[-1][0] > promised[-1][0] else ""
        parts.append(element("path", d=f"M{number(place(at))} {number(height(value))}{steps}{end}", class_="front"))
    joined = " ".join(f"{number(place(at))},{number(height(value))}" for at, value in seen)
    parts.append(element("polyline", points=joined, class_="seen"))
    return parts


def _known(event: Event, figure: str) -> bool:
    return isinstance(event.figures.get(figure), int | float)
