"""Where tokens travel: bands from layer to layer, and the matrix of all boundaries together.

Shape letters: G columns of ranks (see `groups`), B layer boundaries.
"""

import numpy as np

from moeplace.launch.reports.groups import Groups
from moeplace.launch.reports.raster import SEQUENTIAL, raster
from moeplace.launch.reports.svg import LEFT, WIDTH, element, hover, number, picture, ribbon, text
from moeplace.launch.reports.views import PlacementView

MOST_BANDS, MOST_COLUMNS, MOST_HOVERS = 8, 40, 1600
_MOST_FLOW_LAYERS = 8
_HEIGHT, _TOP, _NODE, _GAP, _FIRST = 210.0, 16.0, 7.0, 5.0, 34.0
NUM_COLOURS = 8
CHANCE_EDGES = np.array([0.5, 0.8, 1.2, 1.7, 2.5, 4.0, 6.0])
"""Of the matrices' colours: how much more often than if a token went anywhere alike."""


def flow_chart(view: PlacementView) -> str:
    """Bands of tokens from column to column through the layers; straight bands of the column's colour stay."""
    groups = Groups.of(view.placement, most=MOST_BANDS)
    travel_BGG = groups.joined(view.travel_BRR[: _MOST_FLOW_LAYERS - 1])
    boundaries, count = len(travel_BGG), len(groups)
    usable = _HEIGHT - (count - 1) * _GAP
    size_BG = np.concatenate([travel_BGG.sum(axis=2), travel_BGG[-1:].sum(axis=1)]) * usable
    edge_BG = _TOP + np.cumsum(size_BG + _GAP, axis=1) - size_BG - _GAP
    step = (WIDTH - _FIRST - _NODE - 2) / max(boundaries, 1)
    bands, nodes = [], []
    for column in range(boundaries + 1):
        x = _FIRST + column * step
        nodes += [
            element("rect", x=x, y=float(y), width=_NODE, height=float(size), class_=f"r{g % NUM_COLOURS}", rx=1.5)
            for g, (y, size) in enumerate(zip(edge_BG[column], size_BG[column], strict=True))
        ]
        nodes.append(
            text(str(view.layer_ids[column]), x + _NODE / 2, _HEIGHT + _TOP + 14, "muted", text_anchor="middle")
        )
        if column < boundaries:
            bands += _bands(travel_BGG[column] * usable, x + _NODE, edge_BG[column], x + step, edge_BG[column + 1])
    middle_G = edge_BG[0] + size_BG[0] / 2 + 4
    labels = [
        text(groups.labels[g], _FIRST - 6, float(middle_G[g]), "muted", text_anchor="end") for g in apart(middle_G)
    ]
    labels.append(text("MoE layer", WIDTH, _HEIGHT + _TOP + 28, "muted", text_anchor="end"))
    return picture(WIDTH, _HEIGHT + _TOP + 34, f"where tokens travel, {view.name}", [*bands, *nodes, *labels])


def apart(y_G: np.ndarray, *, least: float = 11.0) -> list[int]:
    """Which labels are written, from above: those of groups with few tokens or none would lie on each other."""
    kept: list[int] = []
    for g, y in enumerate(y_G):
        if not kept or y - y_G[kept[-1]] >= least:
            kept.append(g)
    return kept


def flow_caption(view: PlacementView) -> str:
    """How to read a flow chart, and what it leaves out."""
    groups = Groups.of(view.placement, most=MOST_BANDS)
    what = {"rank": "rank", "node": "node", "block": f"block of {groups.size_G.max()} ranks"}[groups.word]
    words = f"Bands in full colour stay on their {what}."
    layers = view.placement.num_layers
    return words if layers <= _MOST_FLOW_LAYERS else f"{words} The first {_MOST_FLOW_LAYERS} of {layers} MoE layers."


def travel_chart(view: PlacementView, *, most: int = MOST_COLUMNS) -> str:
    """Column-to-column matrix of all boundaries together, in per cent of the tokens; the diagonal stays."""
    groups = Groups.of(view.placement, most=most)
    share_GG = groups.joined(view.travel_BRR).mean(axis=0) * 100
    count = len(groups)
    size = (WIDTH - LEFT - 4) / count
    height = min(size, 34.0)
    levels = np.digitize(share_GG * count**2 / 100, CHANCE_EDGES)
    parts = raster(levels, SEQUENTIAL, (LEFT, 18, count * size, count * height))
    every = -(-count // 11)
    for g in range(0, count, every):
        parts.append(text(groups.labels[g], LEFT - 6, 18 + (g + 0.5) * height + 4, "muted", text_anchor="end"))
        parts.append(text(groups.labels[g], LEFT + (g + 0.5) * size, 12, "muted", text_anchor="middle"))
    for (i, j), value in np.ndenumerate(share_GG):
        x, y = LEFT + j * size, 18 + i * height
        if count <= MOST_BANDS:
            parts.append(
                text(f"{value:.1f}", x + size / 2, y + height / 2 + 4, f"cell s{levels[i, j]}", text_anchor="middle")
            )
        if count**2 <= MOST_HOVERS:
            parts.append(
                hover(f"{groups.names[i]} to {groups.names[j]}: {value:.2f} % of the tokens", x, y, size, height)
            )
    if count <= MOST_COLUMNS:
        outline = "".join(
            f"M{number(LEFT + g * size)} {number(18 + g * height)}h{number(size)}v{number(height)}h-{number(size)}z"
            for g in range(count)
        )
        parts.append(element("path", d=outline, class_="block"))
    return picture(WIDTH, 22 + count * height, f"{groups.word} to {groups.word}, {view.name}", parts)


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
