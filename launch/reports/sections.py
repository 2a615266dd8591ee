"""The sections of the report that show placements: where they stand, where tokens travel, loads, affinities.

Shape letters: B layer boundaries.
"""

from collections.abc import Sequence
from html import escape

import numpy as np

from moeplace.launch.reports import affinity, page
from moeplace.launch.reports import loads as load_maps
from moeplace.launch.reports.affinity import affinity_chart
from moeplace.launch.reports.front_chart import Front, front_chart, front_table
from moeplace.launch.reports.groups import Groups
from moeplace.launch.reports.loads import load_chart, rank_chart
from moeplace.launch.reports.measured import figure_bars, figure_table
from moeplace.launch.reports.standing import (
    figures_of,
    layer_table,
    made_views,
    objective_chart,
    objective_figure,
    objective_name,
    origin_rows,
    standing_run,
)  # fmt: skip
from moeplace.launch.reports.timeline import event_table, timeline_chart
from moeplace.launch.reports.travel import CHANCE_EDGES, flow_caption, flow_chart, travel_chart
from moeplace.launch.reports.views import PlacementView
from moeplace.runtime.event import Event

_MOST_BOUNDARIES = 5


def placements_section(views: Sequence[PlacementView]) -> str:
    """The objective first, its bound, and how every placement came to be."""
    runs = [standing_run(view) for view in views]
    last = views[-1]
    note = (
        "Counted on the tokens that the page judges by. The objective and its proven bound are those of the tokens "
        "that a placement was fitted to; milliseconds are predictions, with nominal links where no file says otherwise."
    )
    charts = [page.figure(objective_figure(last).label, figure_bars(objective_figure(last), runs))]
    if objective := objective_chart(views):
        title = f"objective: {objective_name(made_views(views)[-1])}"
        charts.append(page.figure(title, objective, "The mark is proven: no placement is below it."))
    table = figure_table(figures_of(last), runs)
    return page.section("The placements", note, [table, page.row(charts), origin_table(views), layer_table(views)])


def origin_table(views: Sequence[PlacementView]) -> str:
    """How the placements came to be, a column for each that a solver made."""
    made = made_views(views)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in origin_rows(made)
    )
    names = "".join(f'<th scope="col">{escape(view.name)}</th>' for view in made)
    return (
        '<div class="scroll"><table class="origin"><thead><tr><th>how it was made</th>'
        f"{names}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def flows(views: Sequence[PlacementView]) -> str:
    """Where the tokens of primary experts go from layer to layer."""
    drawn = [
        page.figure(f"{view.name}: {view.stay_rate:.0%} stay", flow_chart(view), flow_caption(view)) for view in views
    ]
    matrices = [
        page.figure(f"{view.name}, all boundaries", travel_chart(view), "Per cent of tokens, mean of all boundaries.")
        for view in views
    ]
    finer = [
        page.figure(view.name, travel_chart(view, most=view.placement.num_ranks))
        for view in views
        if view.placement.num_ranks > len(Groups.of(view.placement, most=load_maps.MOST_COLUMNS))
    ]
    note = (
        "Each token is followed from the rank of its primary expert in one MoE layer to that in the next. What leaves "
        "its rank must be sent; straight bands and the diagonal cost nothing in coherent mode."
    )
    legend = page.key(load_maps.legend(CHANCE_EDGES, "s"), title="times as often as by chance")
    content = [page.row(drawn), legend, page.row(matrices)]
    return page.section("Where tokens travel", note, content + ([page.details("Rank to rank", finer)] if finer else []))


def loads(views: Sequence[PlacementView]) -> str:
    """Who waits for whom."""
    legends = [
        page.key(load_maps.legend(load_maps.SLOT_EDGES, "d"), title="slot over mean slot"),
        page.key(load_maps.legend(load_maps.RANK_EDGES, "d"), title="rank over mean rank"),
    ]
    charts = [page.figure(view.name, load_chart(view), f"imbalance {view.imbalance:.2f}") for view in views]
    finer = [
        page.figure(view.name, rank_chart(view))
        for view in views
        if view.placement.num_ranks > len(Groups.of(view.placement, most=load_maps.MOST_COLUMNS))
    ]
    note = (
        "One row per MoE layer. Above, every expert in its slot (replicas share evenly); below, what each rank serves "
        "over the mean rank: all ranks wait for the busiest one. Imbalance is the greatest number of a row, mean over "
        "the rows. Point at a cell for its number."
    )
    content = [*legends, page.row(charts)]
    return page.section(
        "Load per expert and rank", note, content + ([page.details("Every rank", finer)] if finer else [])
    )


def affinities(views: Sequence[PlacementView]) -> str:
    """P(next expert), experts in the order of their ranks."""
    gain_B = views[-1].stay_B - views[0].stay_B
    count = min(len(gain_B), _MOST_BOUNDARIES)
    chosen = sorted(np.argsort(-gain_B, kind="stable")[:count].tolist())
    ids = views[0].layer_ids
    figures = [
        page.figure(
            f"layer {ids[b]} → {ids[b + 1]}", affinity_chart(view, b), f"{view.name}, {view.stay_B[b]:.0%} stay"
        )
        for b in chosen
        for view in views
    ]
    layout = f"grid-template-rows:repeat({len(views)},auto);grid-auto-flow:column;grid-auto-columns:1fr"
    note = (
        "Row: an expert of one MoE layer; column: the next layer's expert; the stronger the colour, the more probable. "
        "Experts are in the order of their ranks, whose blocks are outlined: a good placement draws colour into them."
        + (f" The {count} boundaries that gain most." if count < len(gain_B) else "")
    )
    legend = page.key(load_maps.legend(affinity.EDGES, "s"), title="probability")
    grid = f'<div class="small" style="{layout}">{"".join(figures)}</div>'
    return page.section("Affinity between layers", note, [legend, grid])


def sweeps(fronts: Sequence[Front]) -> str:
    """Traffic against balance."""
    note = (
        "Every point is a placement, judged on held-out tokens; down and left is better. Joined are those that no "
        "other beats in both: which of them to take depends on what your cluster waits for."
    )
    rows = [page.row([page.figure(front.trace, front_chart(front)), front_table(front)]) for front in fronts]
    return page.section("Traffic against balance", note, rows)


def timeline(events: Sequence[Event]) -> str:
    """What a service decided and did."""
    note = (
        "When the routing was looked at, what was decided, and when placements changed. The line is what a step was "
        "predicted to cost, dashed what had been promised for the placement in force."
    )
    legend = page.key([("accent", "nothing to do"), ("good", "led to a change"), ("bad", "failed or cancelled")])
    chart = page.figure("Reviews and migrations", timeline_chart(events))
    return page.section("Re-placement while serving", note, [legend, page.row([chart, event_table(events)])])
