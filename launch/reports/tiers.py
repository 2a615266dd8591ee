"""The section of the report on experts that do not fit: what sits where and why, and what more fast memory is worth.

Shape letters: L MoE layers, E experts per layer, R ranks, S slots per layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from moeplace.launch.reports import loads as load_maps
from moeplace.launch.reports import page
from moeplace.launch.reports.curves import Curve, curve_chart, curve_legend
from moeplace.launch.reports.raster import SEQUENTIAL, raster
from moeplace.launch.reports.svg import LEFT, WIDTH, element, hover, layer_labels, number, picture, text
from moeplace.placement.memory import RESIDENT
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.placement.tiers.budgets import BudgetPoint
from moeplace.placement.tiers.evaluation import TierEvaluation
from moeplace.profiling.errors import FormatError

ASKED_EDGES = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8])
"""Between shares of steps that ask for an expert."""
WAIT_EDGES = np.array([0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0])
"""Between waits, over what a layer takes with everything in fast memory."""
TWICE = 2.0


@dataclass(frozen=True, eq=False)
class TierView:
    """A placement with tiers, walked.

    Attributes:
        name: what to call it.
        placement: with tiers.
        asked_LE: (L, E) share of steps that ask for each expert.
        judged: the walk.
    """

    name: str
    placement: Placement
    asked_LE: np.ndarray
    judged: TierEvaluation


@dataclass(frozen=True, eq=False)
class Budgets:
    """What more fast memory is worth.

    Attributes:
        points: by budget and policy.
        measured: whether seconds are a runtime's.
        predicted: for those, what was predicted; may be empty.
    """

    points: Sequence[BudgetPoint]
    measured: bool = False
    predicted: Sequence[BudgetPoint] = ()


def tier_section(views: Sequence[TierView], budgets: Sequence[Budgets]) -> str:
    """The whole section."""
    content = [page.row([page.figure(view.name, seat_chart(view), _caption(view)) for view in views])] if views else []
    if views:
        legends = [
            page.key(load_maps.legend(ASKED_EDGES, "s"), title="share of steps that ask for the expert"),
            page.key(load_maps.legend(WAIT_EDGES, "s"), title="wait over the layer's time with everything there"),
        ]
        content = [*legends, *content]
    for each in budgets:
        content += _budget_figures(each)
    note = (
        "Above, every expert in its slot, on each rank from the most wanted to the least: left of the line those in "
        "fast memory, right of it those that are fetched when they are asked for. A dark cell on the right is wanted "
        "often and still not resident: another layer gains more by the row, or its misses fall into steps that wait "
        "anyway. Below, how long each rank waits. "
        if views
        else ""
    )
    note += "The curves say what another budget would be worth." if budgets else ""
    return page.section("Fast memory", note, content)


def seat_chart(view: TierView) -> str:
    """Slots by rank and tier above, waits below."""
    placement, layers = view.placement, view.placement.num_layers
    row, wide = (16.0 if layers <= 12 else 8.0), WIDTH - LEFT
    high, top = layers * row, 18.0
    bottom = top + high + 26.0
    ids = np.arange(layers) if placement.layer_ids is None else placement.layer_ids
    asked_LS, resident_LR = _seats(view)
    levels = np.where(np.isnan(asked_LS), -1, np.digitize(asked_LS, ASKED_EDGES))
    parts = [text("experts by rank, resident ones first", LEFT, top - 6, "muted"), *layer_labels(ids, top, row)]
    parts += raster(levels, SEQUENTIAL, (LEFT, top, wide, high))
    edges = LEFT + wide * np.concatenate([[0], np.cumsum(placement.slots_of_rank)]) / max(placement.num_slots, 1)
    for rank in range(placement.num_ranks):
        steps_L = edges[rank] + wide * resident_LR[:, rank] / max(placement.num_slots, 1)
        parts.append(element("path", d=_stair(steps_L, top, row), class_="seen"))
        parts.append(element("path", d=f"M{number(edges[rank])} {number(top)}v{number(high)}", class_="grid"))
    parts += [text("how long each rank waits", LEFT, bottom - 6, "muted"), *layer_labels(ids, bottom, row)]
    share_LR = view.judged.waited_LR / max(view.judged.resident_seconds / layers, 1e-12)
    parts += raster(np.digitize(share_LR, WAIT_EDGES), SEQUENTIAL, (LEFT, bottom, wide, high))
    parts += _hovers(view, resident_LR, ids, edges, top, bottom, row)
    return picture(WIDTH, bottom + high + 6, f"what sits where, {view.name}", parts)


def _seats(view: TierView) -> tuple[np.ndarray, np.ndarray]:
    """(L, S) share of steps that ask for the expert of each seat, on each rank residents first, the most wanted first,
    NaN = empty; (L, R) residents."""
    placement = view.placement
    slots, tier = placement.slot_to_expert, placement.tier
    asked_LS = np.where(slots == EMPTY_SLOT, np.nan, np.take_along_axis(view.asked_LE, slots.clip(0), axis=1))
    is_resident = (tier == RESIDENT if tier is not None else np.ones(slots.shape, bool)) & (slots != EMPTY_SLOT)
    sorted_LS, resident_LR = np.empty(asked_LS.shape), np.zeros((len(slots), placement.num_ranks), np.int64)
    for rank in range(placement.num_ranks):
        here = placement.slots_on(rank)
        order = np.lexsort((-np.nan_to_num(asked_LS[:, here], nan=-1.0), ~is_resident[:, here]), axis=1)
        sorted_LS[:, here] = np.take_along_axis(asked_LS[:, here], order, axis=1)
        resident_LR[:, rank] = is_resident[:, here].sum(axis=1)
    return sorted_LS, resident_LR


def _stair(x_L: np.ndarray, top: float, row: float) -> str:
    """A line down through all layers."""
    return "".join(
        f"{'M' if index == 0 else 'L'}{number(x)} {number(top + index * row)}V{number(top + (index + 1) * row)}"
        for index, x in enumerate(x_L.tolist())
    )


def _hovers(
    view: TierView, resident_LR: np.ndarray, ids: np.ndarray, edges: np.ndarray, top: float, bottom: float, row: float
) -> list[str]:
    """What a layer of a rank holds and waits for."""
    found_LRU, ranks = view.judged.uses_LRU, view.placement.num_ranks
    held_LR = (view.placement.tier_LER >= 0).sum(axis=1)
    hit_LR = found_LRU[:, :, :3].sum(axis=2) / np.maximum(found_LRU.sum(axis=2), 1)
    wide, parts = WIDTH - LEFT, []
    for layer, rank in np.ndindex(resident_LR.shape):
        words = (
            f"MoE layer {ids[layer]}, rank {rank}: {resident_LR[layer, rank]} of {held_LR[layer, rank]} resident, "
            f"{hit_LR[layer, rank]:.0%} of what is asked for is there, waits "
            f"{view.judged.waited_LR[layer, rank] * 1e6:.3g} us per step"
        )
        y = top + layer * row
        parts.append(hover(words, float(edges[rank]), y, float(edges[rank + 1] - edges[rank]), row))
        parts.append(hover(words, LEFT + rank * wide / ranks, bottom + layer * row, wide / ranks, row))
    return parts


def _caption(view: TierView) -> str:
    judged = view.judged
    return (
        f"{judged.policy}, batch {judged.batch}: {judged.hit_rate:.0%} of what is asked for is in fast memory, a step "
        f"takes {judged.seconds * 1e3:.3g} ms, {judged.resident_seconds * 1e3:.3g} with everything there"
    )


def _budget_figures(budgets: Budgets) -> list[str]:
    """Two charts and their numbers."""
    curves, seconds = _curves(budgets.points, "hit_rate"), _curves(budgets.points, "seconds", scale=1e3)
    bound = sorted((100 * p.budget, p.belady_hit_rate) for p in budgets.points if p.belady_hit_rate is not None)
    if bound:
        curves.append(Curve("no cache without foresight hits more", bound, len(curves), dashed=True))
    predicted = _curves(budgets.predicted, "seconds", scale=1e3, dashed=True)
    marks = {"twice the active": 100 * at} if (at := twice_active(budgets.points)) is not None else {}
    what = "measured" if budgets.measured else "predicted"
    axis = "fast memory, % of a rank's experts"
    charts = [
        page.figure("hit rate", curve_chart("hit rate", curves, x_label=axis, y_label="share", marks=marks)),
        page.figure(
            f"milliseconds of a step, {what}",
            curve_chart("seconds", [*seconds, *predicted], x_label=axis, y_label="ms", marks=marks),
            "Dashed: predicted." if predicted else "",
        ),
    ]
    return [page.key(curve_legend(curves)), page.row(charts), _answer(budgets), budget_table(budgets.points)]


def _curves(points: Sequence[BudgetPoint], figure: str, *, scale: float = 1.0, dashed: bool = False) -> list[Curve]:
    policies = list(dict.fromkeys(point.policy for point in points))
    return [
        Curve(
            policy, sorted((100 * p.budget, scale * getattr(p, figure)) for p in points if p.policy == policy), index,
            dashed,
        )
        for index, policy in enumerate(policies)
    ]  # fmt: skip


def twice_active(points: Sequence[BudgetPoint]) -> float | None:
    """The budget that holds twice the experts which a layer of a rank activates in a step; None = above all budgets."""
    known = sorted({(point.times_active, point.budget) for point in points})
    if not known or known[-1][0] < TWICE:
        return None
    return TWICE * known[0][1] / known[0][0]


def _answer(budgets: Budgets) -> str:
    """One sentence on twice the active experts."""
    at = twice_active(budgets.points)
    if at is None:
        return ""
    said = []
    for policy in dict.fromkeys(point.policy for point in budgets.points):
        own = sorted((p.budget, p.hit_rate, p.seconds) for p in budgets.points if p.policy == policy)
        if own[0][0] <= at:
            hit, seconds = (float(np.interp(at, [o[0] for o in own], [o[i] for o in own])) for i in (1, 2))
            said.append(f"{policy} {hit:.0%} and {seconds / own[-1][2]:.2g} times the step of the greatest budget")
    if not said:
        return ""
    words = f"Twice the active experts are {at:.0%} of a rank's. About there, what is asked for is in fast memory: "
    return f'<p class="note">{escape(words + "; ".join(said))}.</p>'


def budget_table(points: Sequence[BudgetPoint]) -> str:
    """The numbers of the curves."""
    rows = "".join(
        f"<tr><td>{p.budget:.1%}</td><td>{p.fast_slots:.3g}</td><td>{p.times_active:.2f}</td><td>{escape(p.policy)}</td>"
        f"<td>{p.hit_rate:.3f}</td><td>{p.seconds * 1e3:.4g}</td></tr>"
        for p in points
    )
    names = ("budget", "rows a layer", "times active", "policy", "hit rate", "ms/step")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def budgets_from_json(document: Mapping[str, Any], source: str) -> Budgets:
    """The curves of a file that `moeplace bench offload --json` wrote, measured and predicted.

    Raises:
        FormatError: it is something else, or a figure of it cannot be.
    """
    try:
        conditions = document["conditions"]
        active = _positive(conditions, "active_experts") / _positive(conditions, "ranks")
        measured, predicted = [], []
        for run in document["runs"]:
            common = (_positive(run, "budget"), _positive(run, "fast_slots"), str(run["policy"]))
            bound = None if run["belady_hit_rate"] is None else _share(run, "belady_hit_rate")
            times = common[1] / active
            measured.append(
                BudgetPoint(*common, _share(run, "hit_rate"), bound, _positive(run, "seconds_per_step"), times)
            )
            predicted.append(
                BudgetPoint(
                    *common, _share(run, "predicted_hit_rate"), None, _positive(run, "predicted_seconds"), times
                )
            )
        if not measured:
            raise ValueError("no runs")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise FormatError(f"{source} is not the JSON of `moeplace bench offload`: {reason}") from error
    return Budgets(measured, measured=True, predicted=predicted)


def _positive(part: Mapping[str, Any], name: str) -> float:
    value = float(part[name])
    if not 0 < value < np.inf:
        raise ValueError(f"{name} ({value:g}) must be positive")
    return value


def _share(part: Mapping[str, Any], name: str) -> float:
    value = float(part[name])
    if not 0 <= value <= 1 + 1e-9:  # a sum of shares
        raise ValueError(f"{name} ({value:g}) must lie in 0..1")
    return value
