"""Where a placement stands: its figures beside the baseline's, how near the proven best it is, and what made it.

A report without measurements rests on these; all figures are of the tokens that the page judges by, except the
objective and its bound, which are of the tokens that the placement was fitted to.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from moeplace.launch.reports.bars import Bar, bar_chart
from moeplace.launch.reports.comparison import Figure, Run
from moeplace.launch.reports.views import PlacementView

RANKS = Figure("ranks_per_token", "ranks per token", 3)
NODES = Figure("nodes_per_token", "nodes per token", 3)
COPIES = Figure("copies_per_token", "copies across ranks, per token and MoE layer", 3)
KV = Figure("kv_bytes_per_token", "KiB of K/V across ranks, per token", 2, scale=1 / 1024)
IMBALANCE = Figure("imbalance", "imbalance (busiest rank / mean)", 3)
SECONDS = Figure("predicted_seconds", "predicted milliseconds per step", 3, scale=1e3)
_PERCENT = 100.0


def standing_run(view: PlacementView) -> Run:
    """A placement's figures in the form of a run, so that tables and tiles show both alike."""
    e = view.evaluation
    figures = {
        "ranks_per_token": e.ranks_per_token, "nodes_per_token": e.nodes_per_token,
        "copies_per_token": e.copies_per_token, "kv_bytes_per_token": e.kv_bytes_per_token,
        "imbalance": view.imbalance, "predicted_seconds": view.predicted_seconds,
    }  # fmt: skip
    return Run(view.name, e.mode, figures)


def objective_figure(view: PlacementView) -> Figure:
    """What the placement's mode pays for first."""
    if view.evaluation.mode == "coherent":
        return COPIES
    if view.evaluation.mode == "allgather":
        return IMBALANCE
    return NODES if view.placement.num_nodes > 1 else RANKS


def figures_of(view: PlacementView) -> list[Figure]:
    """The figures that say something in the placement's mode, the objective first."""
    mode, nodes = view.evaluation.mode, view.placement.num_nodes > 1
    figures = [objective_figure(view)]
    if mode == "dispatch-combine":
        figures += [RANKS] * nodes + [COPIES]
    if mode == "coherent":
        figures += [NODES] * nodes + [KV]
    return list(dict.fromkeys([*figures, IMBALANCE, SECONDS]))


def sentence(before: PlacementView, after: PlacementView) -> str:
    """What the placement gains, how near the proven best that is, and what it costs."""
    figure = objective_figure(after)
    a, b = (standing_run(view).figures[figure.key] for view in (before, after))
    nodes = f", {after.evaluation.ranks_per_token:.2f} ranks" if figure is NODES else ""
    words = f"{after.name} has {b:.2f} {figure.label.split(',')[0]}{nodes} where {before.name} has {a:.2f}"
    words += f" ({change(a, b)})" if a else ""
    return f"{words}, at imbalance {after.imbalance:.2f} ({before.imbalance:.2f}). {gap_words(after)}".strip()


def change(before: float, after: float) -> str:
    """A change in words."""
    share = (after / before - 1) * _PERCENT
    return (
        "the same"
        if abs(share) < 0.05
        else f"{abs(share):.{0 if abs(share) >= 10 else 1}f} % {'fewer' if share < 0 else 'more'}"
    )


def gap_words(view: PlacementView) -> str:
    """What the solver proved, in a sentence; nothing where the file does not say."""
    gap, name = view.solver.get("gap"), view.solver.get("objective_name", "objective")
    if not isinstance(gap, int | float):
        return ""
    if view.solver.get("status") == "optimal":
        return f"Proven: no placement has less {_unit(name)} on the fitted tokens."
    return f"Proven: no placement saves more than another {gap:.0%} of the {_unit(name)} on the fitted tokens."


def made_views(views: Sequence[PlacementView]) -> list[PlacementView]:
    """Those of which a file says how they came to be: index order is made by nothing."""
    return [view for view in views if view.solver] or list(views)


def origin_rows(views: Sequence[PlacementView]) -> list[list[str]]:
    """Rows of a table: how each placement came to be; a row that no file can fill is left out."""
    rows = [[label, *(str(value(view) or "-") for view in views)] for label, value in _ORIGIN]
    return [row for row in rows if any(cell != "-" for cell in row[1:])]


def objective_chart(views: Sequence[PlacementView]) -> str:
    """The objective of each solved placement on its fitted tokens; the mark is what is proven to be the least."""
    solved = [view for view in views if isinstance(view.solver.get("objective"), int | float)]
    if not solved:
        return ""
    bars = [Bar(view.name, float(view.solver["objective"]), float(view.solver["lower_bound"])) for view in solved]
    name = objective_name(solved[0])
    in_seconds = solved[0].solver.get("objective_name") == "seconds"
    scale, digits = (1e3, 3) if in_seconds else (1.0, 4)
    return bar_chart(f"{name} on the fitted tokens, and its proven bound", bars, digits, scale=scale)


def objective_name(view: PlacementView) -> str:
    """The objective in words, with its unit."""
    name = str(view.solver.get("objective_name", "objective"))
    return {"seconds": "predicted milliseconds per step"}.get(name, name)


def layer_table(views: Sequence[PlacementView]) -> str:
    """The numbers of every layer, for who cannot see the charts or wants to copy them."""
    head = "".join(f'<th scope="col" colspan="3">{escape(view.name)}</th>' for view in views)
    names = "".join(f'<th scope="col">{name}</th>' for name in ("ranks per token", "imbalance", "busiest rank"))
    rows = "".join(
        f'<tr><th scope="row">{number}</th>{"".join(_layer_cells(view, layer) for view in views)}</tr>'
        for layer, number in enumerate(views[0].layer_ids)
    )
    titles = f'<tr><th></th>{head}</tr><tr><th scope="col">MoE layer</th>{names * len(views)}</tr>'
    table = f'<div class="scroll"><table><thead>{titles}</thead><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>Numbers of every layer</summary>{table}</details>"


def _layer_cells(view: PlacementView, layer: int) -> str:
    e, busiest = view.evaluation, int(view.rank_load_LR[layer].argmax())
    return f"<td>{e.ranks_per_token_L[layer]:.3f}</td><td>{e.imbalance_L[layer]:.3f}</td><td>{busiest}</td>"


def _unit(objective: str) -> str:
    return {"seconds": "predicted time", "traffic": "traffic", "imbalance": "imbalance"}.get(objective, objective)


def _replicas(view: PlacementView) -> str:
    extra = view.placement.replica_counts.sum(axis=1) - view.placement.experts_per_layer
    rule = view.evidence.get("replica_rule")
    return f"{extra.mean():g} slots per layer" + (f", served by the rule {rule}" if rule and extra.any() else "")


def _solver(view: PlacementView) -> str:
    s = view.solver
    if not s:
        return ""
    seconds = f", {s['seconds']:.1f} s" if isinstance(s.get("seconds"), int | float) else ""
    return f"{s.get('name', '?')}, {s.get('status', '?')}, seed {s.get('seed', '?')}{seconds}"


def _objective(view: PlacementView) -> str:
    s = view.solver
    return f"{objective_name(view)}: {_in_unit(view, s.get('objective'))}" if s.get("objective_name") else ""


def _bound(view: PlacementView) -> str:
    s = view.solver
    return (
        f"{_in_unit(view, s.get('lower_bound'))} (gap {s['gap']:.1%})" if isinstance(s.get("gap"), int | float) else ""
    )


def _cap(view: PlacementView) -> str:
    if "max_imbalance" not in view.solver:
        return ""
    cap = view.solver["max_imbalance"]
    return "none" if cap is None else f"{cap:g}, or what the layer allows"


def _in_unit(view: PlacementView, value: Any) -> str:
    """A value of the objective, seconds in milliseconds."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value * 1e3:.4g} ms" if view.solver.get("objective_name") == "seconds" else f"{value:.6g}"


_ORIGIN = (
    ("mode", lambda view: view.evaluation.mode),
    ("objective, fitted tokens", _objective),
    ("proven least", _bound),
    ("cap on imbalance", _cap),
    ("redundant", _replicas),
    ("solver", _solver),
    ("notes", lambda view: " ".join(f"{note}." for note in view.solver.get("notes", ()))),
    ("made by", lambda view: view.solver.get("command")),
    ("digest", lambda view: view.placement.digest[:19]),
)
