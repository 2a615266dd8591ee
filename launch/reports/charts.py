"""The charts of the report. Each takes numbers and returns one SVG drawing of about the width of a phone.

Shape letters: L MoE layers, E experts per layer, R ranks, S slots per layer, B layer boundaries.
"""

from collections.abc import Sequence

import numpy as np

from moeplace.launch.reports.comparison import Figure, Run
from moeplace.launch.reports.svg import cells, element, number, picture, ribbon, text
from moeplace.launch.reports.views import PlacementView

WIDTH = 340.0
_LEFT, _RANK_GAP = 30.0, 4.0
_SLOT_EDGES = np.array([0.5, 0.75, 0.9, 1.1, 1.35, 1.75])
_RANK_EDGES = np.array([0.8, 0.9, 0.97, 1.03, 1.1, 1.25])
_AFFINITY_EDGES = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45])
_MOST_FLOW_LAYERS = 8
_MOST_LABELLED = 8
NUM_COLOURS = 8


def load_chart(view: PlacementView) -> str:
    """Two heat maps: load of every slot, grouped by rank, and below it of every rank."""
    layers, ranks = view.rank_load_LR.shape
    row = 16.0 if layers <= 12 else 8.0
    edges = _block_edges(view.placement.slots_of_rank.tolist())
    width = (edges[1] - edges[0] - _RANK_GAP) / max(int(view.placement.slots_of_rank[0]), 1)
    slot_x = [
        edges[r] + i * (edges[r + 1] - edges[r] - _RANK_GAP) / n
        for r, n in enumerate(view.placement.slots_of_rank)
        for i in range(n)
    ]
    top, bottom = 18.0, 18.0 + layers * row + 26.0
    slot_y = [top + layer * row for layer in range(layers)]
    rank_y = [bottom + layer * row for layer in range(layers)]
    levels = np.where(np.isnan(view.slot_load_LS), -1, np.digitize(view.slot_load_LS, _SLOT_EDGES))
    parts = [text("every expert", _LEFT, top - 6, "muted"), *_layer_labels(slot_y, row)]
    parts += cells(levels, slot_x, slot_y, (max(width - 0.8, 0.6), row - 0.8))
    parts += [text("every rank", _LEFT, bottom - 6, "muted"), *_layer_labels(rank_y, row)]
    rank_levels = np.digitize(view.rank_load_LR, _RANK_EDGES)
    block = edges[1] - edges[0] - _RANK_GAP
    parts += cells(rank_levels, edges[:-1], rank_y, (block, row - 0.8))
    if layers <= 12 and ranks <= _MOST_LABELLED:
        parts += [
            text(f"{load:.2f}", edges[rank] + block / 2, y + row / 2 + 3.6, f"cell t{level}", text_anchor="middle")
            for y, loads, found in zip(rank_y, view.rank_load_LR, rank_levels, strict=True)
            for rank, (load, level) in enumerate(zip(loads, found, strict=True))
        ]
    height = bottom + layers * row + 16
    parts += _rank_labels(edges, height - 4)
    return picture(WIDTH, height, f"load per expert and rank, {view.name}", [_group("div", parts)])


def affinity_chart(view: PlacementView, boundary: int) -> str:
    """P(next expert given this one), experts in the order of their ranks, blocks of one rank outlined."""
    size, top = 150.0, 4.0
    matrix = view.affinity(boundary)
    (_, rows), (_, columns) = view.order(boundary), view.order(boundary + 1)
    height, width = size / matrix.shape[0], size / matrix.shape[1]
    x = [2 + i * width for i in range(matrix.shape[1])]
    y = [top + i * height for i in range(matrix.shape[0])]
    gap = 0.6 if len(x) <= 32 else 0.0
    parts = cells(np.digitize(matrix, _AFFINITY_EDGES), x, y, (width - gap, height - gap))
    row_edges, column_edges = np.cumsum([0, *rows]), np.cumsum([0, *columns])
    for rank in range(len(rows)):
        parts.append(
            element(
                "rect",
                x=2 + column_edges[rank] * width - gap,
                y=top + row_edges[rank] * height - gap,
                width=columns[rank] * width + gap,
                height=rows[rank] * height + gap,
                class_="block",
            )
        )
    return picture(size + 4, size + 2 * top, f"affinity, {view.name}, boundary {boundary}", [_group("seq", parts)])


def flow_chart(view: PlacementView) -> str:
    """Bands of tokens from rank to rank through the layers; straight bands of the rank's colour stay."""
    boundaries = min(len(view.travel_BRR), _MOST_FLOW_LAYERS - 1)
    ranks = view.travel_BRR.shape[1]
    height, top, node, gap = 210.0, 16.0, 7.0, 5.0
    usable = height - (ranks - 1) * gap
    left, step = 34.0, (WIDTH - 34.0 - node - 2) / max(boundaries, 1)
    bands, nodes = [], []
    for boundary in range(boundaries + 1):
        x = left + boundary * step
        size_R = _node_sizes(view, boundary) * usable
        edges_R = top + np.concatenate([[0], np.cumsum(size_R + gap)])[:-1]
        nodes += [
            element("rect", x=x, y=y, width=node, height=size, class_=f"r{rank % NUM_COLOURS}", rx=1.5)
            for rank, (y, size) in enumerate(zip(edges_R, size_R, strict=True))
        ]
        nodes.append(text(f"{boundary}", x + node / 2, height + top + 14, "muted", text_anchor="middle"))
        if boundary < boundaries:
            next_R = _node_sizes(view, boundary + 1) * usable
            target_R = top + np.concatenate([[0], np.cumsum(next_R + gap)])[:-1]
            bands += _bands(view.travel_BRR[boundary] * usable, x + node, edges_R, x + step, target_R)
    first = _node_sizes(view, 0) * usable
    y_R = top + np.concatenate([[0], np.cumsum(first + gap)])[:-1] + first / 2 + 4
    labels = [text(f"r{rank}", left - 6, y, "muted", text_anchor="end") for rank, y in enumerate(y_R)]
    labels.append(text("MoE layer", WIDTH, height + top + 28, "muted", text_anchor="end"))
    return picture(WIDTH, height + top + 34, f"where tokens travel, {view.name}", [*bands, *nodes, *labels])


def flow_caption(view: PlacementView) -> str:
    """How to read a flow chart, and what it leaves out."""
    words = "Bands in full colour stay on their rank."
    layers = view.placement.num_layers
    return words if layers <= _MOST_FLOW_LAYERS else f"{words} The first {_MOST_FLOW_LAYERS} of {layers} MoE layers."


def _node_sizes(view: PlacementView, layer: int) -> np.ndarray:
    """(R,) share of the primary experts' tokens on each rank in a layer."""
    if layer < len(view.travel_BRR):
        return view.travel_BRR[layer].sum(axis=1)
    return view.travel_BRR[layer - 1].sum(axis=0)


def _bands(flow_RR: np.ndarray, x0: float, start_R: np.ndarray, x1: float, end_R: np.ndarray) -> list[str]:
    """Bands between two columns: moving tokens first, those that stay on top of them."""
    ranks = len(flow_RR)
    top0 = start_R[:, None] + np.cumsum(flow_RR, axis=1) - flow_RR
    top1 = end_R[None, :] + np.cumsum(flow_RR, axis=0) - flow_RR
    drawn = []
    for source, target in sorted(np.ndindex(ranks, ranks), key=lambda pair: pair[0] == pair[1]):
        size = float(flow_RR[source, target])
        if size > 0:
            a, b = float(top0[source, target]), float(top1[source, target])
            kind = "stay" if source == target else "move"
            data = ribbon(x0, a, a + size, x1, b, b + size)
            drawn.append(element("path", d=data, class_=f"{kind} r{source % NUM_COLOURS}"))
    return drawn


def travel_chart(view: PlacementView) -> str:
    """Rank-to-rank matrix of all boundaries together, in per cent of the tokens; the diagonal stays."""
    share = view.travel_BRR.mean(axis=0) * 100
    ranks = len(share)
    size = (WIDTH - _LEFT - 4) / ranks
    height = min(size, 34.0)
    x, y = [_LEFT + i * size for i in range(ranks)], [18 + i * height for i in range(ranks)]
    levels = np.clip((share * ranks / 100 * 11).astype(int), 0, 7)  # the same colours in every matrix of so many ranks
    parts = cells(levels, x, y, (size - 1, height - 1))
    for rank in range(ranks):
        parts.append(element("rect", x=x[rank], y=y[rank], width=size - 1, height=height - 1, class_="block"))
        parts.append(text(f"r{rank}", _LEFT - 6, y[rank] + height / 2 + 4, "muted", text_anchor="end"))
        parts.append(text(f"r{rank}", x[rank] + size / 2, 12, "muted", text_anchor="middle"))
    if ranks <= _MOST_LABELLED:
        parts += [
            text(f"{value:.1f}", x[j] + size / 2, y[i] + height / 2 + 4, f"cell s{levels[i, j]}", text_anchor="middle")
            for (i, j), value in np.ndenumerate(share)
        ]
    return picture(WIDTH, 22 + ranks * height, f"rank to rank, {view.name}", [_group("seq", parts)])


def bar_chart(figure: Figure, runs: Sequence[Run]) -> str:
    """One bar per run, as measured; a mark where it was predicted."""
    values = [v for run in runs for v in (run.measured(figure), run.predicted(figure)) if v is not None]
    scale = (WIDTH - 62) / max([*values, 1e-12])
    parts, step, bar = [], 44.0, 16.0
    for index, run in enumerate(runs):
        y = index * step + 16
        measured, predicted = run.measured(figure), run.predicted(figure)
        parts.append(text(f"{run.placement} · {run.mode}", 0, y - 4, "label"))
        end = 0.0
        if measured is not None:
            end = measured * scale
            kind = "bar first" if run.placement == runs[0].placement else "bar"
            parts.append(element("rect", x=0, y=y, width=max(end, 1), height=bar, rx=2, class_=kind))
        if predicted is not None:
            mark = predicted * scale
            parts.append(element("path", d=f"M{number(mark)} {number(y - 2)}v{number(bar + 4)}", class_="mark"))
            end = max(end, mark)
        parts.append(text(figure.text(measured), end + 6, y + bar - 4, "value"))
    return picture(WIDTH, len(runs) * step + 2, figure.label, parts)


def _block_edges(sizes: Sequence[int]) -> list[float]:
    """Left edge of each rank's block of columns, and the end of the last."""
    width = (WIDTH - _LEFT) / len(sizes)
    return [_LEFT + width * rank for rank in range(len(sizes) + 1)]


def _layer_labels(y_of: Sequence[float], row: float) -> list[str]:
    every = 1 if row >= 12 else 5
    return [
        text(str(layer), _LEFT - 6, y + row / 2 + 3.6, "muted", text_anchor="end")
        for layer, y in enumerate(y_of)
        if layer % every == 0
    ]


def _rank_labels(edges: Sequence[float], y: float) -> list[str]:
    short = "r" if len(edges) > 6 else "rank "
    middle = (edges[1] - edges[0] - _RANK_GAP) / 2
    return [text(f"{short}{r}", x + middle, y, "muted", text_anchor="middle") for r, x in enumerate(edges[:-1])]


def _group(class_: str, parts: Sequence[str]) -> str:
    return element("g", "".join(parts), class_=class_)
