"""What was measured: tiles, the table of runs, and their bars."""

from collections.abc import Sequence
from html import escape

from moeplace.launch.reports import page
from moeplace.launch.reports.bars import Bar, bar_chart
from moeplace.launch.reports.comparison import Figure, Run, best_run, gains, shown_figures


def tiles(runs: Sequence[Run], *, figures: Sequence[Figure] | None = None) -> str:
    """The baseline's figures and those of the recommended run, what got worse too.

    Args:
        runs: the first is the baseline.
        figures: what to show, by default what was measured while serving.
    """
    best = best_run(runs) if figures is None else runs[-1]
    shown = [figure for figure in shown_figures(runs) if figure.tile] if figures is None else figures
    return f'<div class="tiles">{"".join(_tile(figure, runs[0], best) for figure in shown)}</div>'


def _tile(figure: Figure, first: Run, best: Run) -> str:
    a, b = first.measured(figure), best.measured(figure)
    if a is None or b is None:
        return ""
    change = b / a - 1 if a else 0.0
    good = change <= 0 if figure.lower_is_better else change >= 0
    words = f'<em class="{"" if good else "bad"}">{change:+.0%}</em>' if abs(change) >= 0.005 else "unchanged"
    numbers = f"<b><s>{figure.text(a)} →</s> {figure.text(b)}</b>"
    return f'<div class="tile">{numbers}<span>{escape(figure.label)}</span><span>{words}</span></div>'


def comparison(runs: Sequence[Run], *, replayed: bool) -> str:
    """What was measured, run by run."""
    figures = shown_figures(runs)
    charts = [page.figure(f.label, figure_bars(f, runs)) for f in figures if f.charted]
    legend = page.key([("first", runs[0].placement), ("accent", "other placements")], tick="predicted")
    how = "Measured while replaying recorded routing with stand-in experts" if replayed else "Measured while serving"
    note = f"{how}; predictions are in small print, and marks in the bars. Green is the best of a row. {gains(runs)}"
    return page.section("The comparison", note.strip(), [figure_table(figures, runs), legend, page.row(charts)])


def figure_table(figures: Sequence[Figure], runs: Sequence[Run]) -> str:
    """One column per run."""
    head = "".join(f'<th scope="col">{escape(run.placement)}<small>{escape(run.mode)}</small></th>' for run in runs)
    rows = "".join(_table_row(figure, runs) for figure in figures)
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def figure_bars(figure: Figure, runs: Sequence[Run]) -> str:
    """One bar per run, with its prediction as a mark."""
    first = runs[0].placement
    bars = [
        Bar(f"{run.placement} · {run.mode}", run.measured(figure), run.predicted(figure), run.placement == first)
        for run in runs
    ]
    return bar_chart(figure.label, bars, figure.digits, scale=figure.scale)


def _table_row(figure: Figure, runs: Sequence[Run]) -> str:
    known = [value for run in runs if (value := run.measured(figure)) is not None]
    best = (min if figure.lower_is_better else max)(known, default=None)
    distinct = len({figure.text(value) for value in known}) > 1
    cells = "".join(_cell(figure, run, best, distinct) for run in runs)
    return f'<tr><th scope="row">{escape(figure.label)}</th>{cells}</tr>'


def _cell(figure: Figure, run: Run, best: float | None, distinct: bool) -> str:
    value, predicted = run.measured(figure), run.predicted(figure)
    small = "" if predicted is None else f"<small>{figure.text(predicted)}</small>"
    won = distinct and value is not None and best is not None and figure.text(value) == figure.text(best)
    return f'<td class="{"best" if won else ""}">{figure.text(value)}{small}</td>'
