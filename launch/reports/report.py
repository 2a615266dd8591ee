"""The HTML report: what placements do to a trace, and what was measured under them.

Shape letters: L MoE layers, B = L - 1 layer boundaries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Self

import numpy as np

from moeplace.launch.reports import page
from moeplace.launch.reports.charts import affinity_chart, bar_chart, flow_caption, flow_chart, load_chart, travel_chart
from moeplace.launch.reports.comparison import FIGURES, Figure, Run, best_run, runs_from_json, shown_figures, verdict
from moeplace.launch.reports.front_chart import Front, front_chart, front_table
from moeplace.launch.reports.timeline import event_table, timeline_chart
from moeplace.launch.reports.views import PlacementView, make_views
from moeplace.placement.placement import Placement
from moeplace.profiling.files import atomic_write
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.replanning.event_log import Event

_MOST_BOUNDARIES = 5
_TILES = ("collectives_per_layer", "copies_per_token", "imbalance", "tokens_per_second")


@dataclass(frozen=True, eq=False)
class Report:
    """What a page shows.

    Attributes:
        views: the placements; the first is the one the others are compared with.
        runs: measurements, may be none; the first is the baseline.
        conditions: how all of it came to be.
        check: the outcome of a comparison with the plain model, may be empty.
        equal: whether it went well.
        fronts: traffic against balance, may be none.
        events: of a service, may be none.
    """

    views: Sequence[PlacementView]
    runs: Sequence[Run] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)
    check: str = ""
    equal: bool = True
    fronts: Sequence[Front] = ()
    events: Sequence[Event] = ()

    @classmethod
    def of(
        cls,
        trace: RoutingTrace,
        placements: dict[str, Placement],
        document: Mapping[str, Any],
        *,
        fronts: Sequence[Front] = (),
        events: Sequence[Event] = (),
    ) -> Self:
        """A report on placements seen through `trace`.

        Args:
            trace: the tokens to judge by.
            placements: by name; the first is the baseline.
            document: conditions, runs and checks, as in report.json; may lack any.
            fronts: see `fronts_from_json`.
            events: see `read_events`.

        Raises:
            InputError: a placement is for another model.
            FormatError: the runs are not runs.
        """
        checks = document.get("checks", {})
        runs = runs_from_json(document, "the measurements") if "runs" in document else []
        return cls(
            views=make_views(trace, placements),
            runs=runs,
            conditions=document.get("conditions", {}),
            check=checks.get("sentence", ""),
            equal=checks.get("equal", True),
            fronts=fronts,
            events=events,
        )

    @property
    def before(self) -> PlacementView:
        return self.views[0]

    @property
    def after(self) -> PlacementView:
        """The placement that keeps most tokens where they are, the first one excepted."""
        return max(self.views[1:] or self.views, key=lambda view: view.stay_rate)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.runs:
            return verdict(self.runs)
        a, b = self.before, self.after
        return (
            f"{b.name} keeps {b.stay_rate:.0%} of the tokens on their rank from layer to layer ({a.name}: "
            f"{a.stay_rate:.0%}), with imbalance {b.imbalance:.2f} ({a.imbalance:.2f})."
        )


def write_report(path: str | Path, report: Report) -> None:
    """Write the page, atomically."""
    with atomic_write(path) as file:
        file.write(render(report).encode())


def render(report: Report) -> str:
    """The page as text."""
    body = [_header(report)]
    if report.runs:
        body += [_tiles(report.runs), _comparison(report.runs)]
    if report.fronts:
        body.append(_fronts(report.fronts))
    body += [_flows(report), _loads(report)]
    if len(report.before.travel_BRR):
        body.append(_affinities(report))
    if report.events:
        body.append(_timeline(report.events))
    if report.conditions:
        body.append(page.section("Conditions", "What was run, and how.", [page.definitions(report.conditions)]))
    return page.page("moeplace report", body)


def _header(report: Report) -> str:
    placement = report.before.placement
    kicker = (
        f"moeplace report · {report.conditions.get('model', 'routing trace')} · {placement.num_ranks} ranks · "
        f"judged on {int(report.before.stats.num_tokens):,} tokens"
    )
    check = f'<p class="check{"" if report.equal else " bad"}">{escape(report.check)}</p>' if report.check else ""
    return f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(report.verdict)}</h1>{check}</header>'


def _tiles(runs: Sequence[Run]) -> str:
    """The baseline's figures and those of the recommended run."""
    best = best_run(runs)
    tiles = [_tile(figure, runs[0], best) for figure in FIGURES if figure.key in _TILES]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(figure: Figure, first: Run, best: Run) -> str:
    a, b = first.measured(figure), best.measured(figure)
    if a is None or b is None:
        return ""
    change = b / a - 1 if a else 0.0
    good = change <= 0 if figure.lower_is_better else change >= 0
    words = f'<em class="{"" if good else "bad"}">{change:+.0%}</em>' if abs(change) >= 0.005 else "unchanged"
    numbers = f"<b><s>{figure.text(a)} →</s> {figure.text(b)}</b>"
    return f'<div class="tile">{numbers}<span>{escape(figure.label)}</span><span>{words}</span></div>'


def _comparison(runs: Sequence[Run]) -> str:
    figures = shown_figures(runs)
    head = "".join(f"<th>{escape(run.placement)}<small>{escape(run.mode)}</small></th>" for run in runs)
    rows = "".join(_table_row(figure, runs) for figure in figures)
    table = f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    charts = [page.figure(f.label, bar_chart(f, runs)) for f in figures if f.charted]
    legend = page.key([("first", runs[0].placement), ("accent", "other placements")], tick=True)
    return page.section(
        "The comparison",
        "Measured while serving; predictions are in small print, and marks in the bars. Green is the best of a row.",
        [table, legend, page.row(charts)],
    )


def _table_row(figure: Figure, runs: Sequence[Run]) -> str:
    known = [value for run in runs if (value := run.measured(figure)) is not None]
    best = (min if figure.lower_is_better else max)(known, default=None)
    distinct = len({figure.text(value) for value in known}) > 1
    return f"<tr><td>{escape(figure.label)}</td>{''.join(_cell(figure, run, best, distinct) for run in runs)}</tr>"


def _cell(figure: Figure, run: Run, best: float | None, distinct: bool) -> str:
    value, predicted = run.measured(figure), run.predicted(figure)
    small = "" if predicted is None else f"<small>{figure.text(predicted)}</small>"
    won = distinct and value is not None and best is not None and figure.text(value) == figure.text(best)
    return f'<td class="{"best" if won else ""}">{figure.text(value)}{small}</td>'


def _flows(report: Report) -> str:
    pair = _pair(report)
    flows = [
        page.figure(f"{view.name}: {view.stay_rate:.0%} stay", flow_chart(view), flow_caption(view))
        for view in pair
        if len(view.travel_BRR)
    ]
    matrices = [
        page.figure(f"{view.name}, rank to rank", travel_chart(view), "Per cent of tokens, mean of all boundaries.")
        for view in pair
        if len(view.travel_BRR)
    ]
    note = (
        "Each token is followed from the rank of its primary expert in one MoE layer to that in the next. What leaves "
        "its rank must be sent; straight bands and the diagonal cost nothing in coherent mode."
    )
    return page.section("Where tokens travel", note, [page.row(flows), page.row(matrices)])


def _loads(report: Report) -> str:
    legend = page.key(
        [("d0", "far below the mean"), ("d2", "below"), ("d3", "mean"), ("d4", "above"), ("d6", "far above the mean")]
    )
    charts = [page.figure(view.name, load_chart(view), f"imbalance {view.imbalance:.2f}") for view in report.views]
    note = (
        "One row per MoE layer. Above, every expert at its place; below, the sum on every rank over that of the mean "
        "rank: all ranks wait for the busiest one. Imbalance is the greatest number of a row, mean over the rows."
    )
    return page.section("Load per expert and rank", note, [legend, page.row(charts)])


def _affinities(report: Report) -> str:
    pair = _pair(report)
    gain_B = pair[-1].stay_B - pair[0].stay_B
    count = min(len(gain_B), _MOST_BOUNDARIES)
    chosen = sorted(np.argsort(-gain_B, kind="stable")[:count].tolist())
    figures = [
        page.figure(f"layer {b} → {b + 1}", affinity_chart(view, b), f"{view.name}, {view.stay_B[b]:.0%} stay")
        for b in chosen
        for view in pair
    ]
    layout = f"grid-template-rows:repeat({len(pair)},auto);grid-auto-flow:column;grid-auto-columns:1fr"
    note = (
        "Row: an expert of one MoE layer; column: the next layer's expert; the stronger the colour, the more probable. "
        "Experts are in the order of their ranks, whose blocks are outlined: a good placement draws colour into them."
        + (f" The {count} boundaries that gain most." if count < len(gain_B) else "")
    )
    return page.section(
        "Affinity between layers", note, [f'<div class="small" style="{layout}">{"".join(figures)}</div>']
    )


def _fronts(fronts: Sequence[Front]) -> str:
    note = (
        "Every point is a placement, judged on held-out tokens; down and left is better. Joined are those that no "
        "other beats in both: which of them to take depends on what your cluster waits for."
    )
    rows = [page.row([page.figure(front.trace, front_chart(front)), front_table(front)]) for front in fronts]
    return page.section("Traffic against balance", note, rows)


def _timeline(events: Sequence[Event]) -> str:
    note = (
        "When the routing was looked at, what was decided, and when placements changed. The line is what a step was "
        "predicted to cost, dashed what had been promised for the placement in force."
    )
    legend = page.key([("accent", "nothing to do"), ("good", "led to a change"), ("bad", "failed or cancelled")])
    chart = page.figure("Reviews and migrations", timeline_chart(events))
    return page.section("Re-placement while serving", note, [legend, page.row([chart, event_table(events)])])


def _pair(report: Report) -> list[PlacementView]:
    """Before and after; one where there is no other."""
    return [report.before] if report.after is report.before else [report.before, report.after]
