"""Load per expert and rank: two heat maps of a placement, every cell over its layer's mean.

Shape letters: L MoE layers, R ranks, S slots per layer, G columns of ranks.
"""

import itertools

import numpy as np

from moeplace.launch.reports.groups import Groups
from moeplace.launch.reports.raster import DIVERGING, raster
from moeplace.launch.reports.svg import LEFT, WIDTH, hover, layer_labels, picture, text
from moeplace.launch.reports.views import PlacementView

SLOT_EDGES = np.array([0.5, 0.75, 0.9, 1.1, 1.35, 1.75])
RANK_EDGES = np.array([0.8, 0.9, 0.97, 1.03, 1.1, 1.25])
MOST_COLUMNS = 40
_MOST_NUMBERS = (12, 8)
"""Layers and columns up to which numbers are written into the cells."""


def load_chart(view: PlacementView) -> str:
    """Slots by rank above, and below them the busiest rank of every column."""
    layers, _ = view.rank_load_LR.shape
    row = 16.0 if layers <= _MOST_NUMBERS[0] else 8.0
    groups = Groups.of(view.placement, most=MOST_COLUMNS)
    high, wide = layers * row, WIDTH - LEFT
    top, bottom = 18.0, 18.0 + high + 26.0
    slot_levels = np.where(np.isnan(view.slot_load_LS), -1, np.digitize(view.slot_load_LS, SLOT_EDGES))
    parts = [text("every expert, in its slot", LEFT, top - 6, "muted"), *layer_labels(view.layer_ids, top, row)]
    parts += raster(slot_levels, DIVERGING, (LEFT, top, wide, high))
    busiest_LG = groups.busiest(view.rank_load_LR)
    what = "every rank" if groups.word == "rank" else f"the busiest rank of every {groups.word}"
    parts += [text(what, LEFT, bottom - 6, "muted"), *layer_labels(view.layer_ids, bottom, row)]
    parts += raster(np.digitize(busiest_LG, RANK_EDGES), DIVERGING, (LEFT, bottom, wide, high))
    parts += _numbers(view, groups, busiest_LG, bottom, row)
    edges = LEFT + wide * np.concatenate([[0], np.cumsum(groups.size_G)]) / view.placement.num_ranks
    parts += _labels(groups, edges, bottom + high + 12)
    return picture(WIDTH, bottom + high + 16, f"load per expert and rank, {view.name}", parts)


def rank_chart(view: PlacementView) -> str:
    """Every rank by itself, where `load_chart` shows groups."""
    layers, _ = view.rank_load_LR.shape
    levels = np.digitize(view.rank_load_LR, RANK_EDGES)
    parts = [*layer_labels(view.layer_ids, 4, 8), *raster(levels, DIVERGING, (LEFT, 4, WIDTH - LEFT, layers * 8))]
    return picture(WIDTH, layers * 8 + 8, f"load of every rank, {view.name}", parts)


def legend(edges: np.ndarray, prefix: str) -> list[tuple[str, str]]:
    """(colour, range of values) of each level."""
    words = [f"below {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges))]
    return [(f"{prefix}{level}", word) for level, word in enumerate([*words, f"above {edges[-1]:g}"])]


def _numbers(view: PlacementView, groups: Groups, busiest_LG: np.ndarray, top: float, row: float) -> list[str]:
    """What a cell stands for: written in it where there is room, and shown on hovering."""
    parts = []
    layers, columns = busiest_LG.shape
    step = (WIDTH - LEFT) / columns
    written = layers <= _MOST_NUMBERS[0] and columns <= _MOST_NUMBERS[1]
    for (layer, column), load in np.ndenumerate(busiest_LG):
        x, y = LEFT + column * step, top + layer * row
        if written:
            level = int(np.digitize(load, RANK_EDGES))
            parts.append(text(f"{load:.2f}", x + step / 2, y + row / 2 + 3.6, f"cell t{level}", text_anchor="middle"))
        words = f"MoE layer {view.layer_ids[layer]}, {groups.names[column]}: {load:.3f} of the mean rank"
        parts.append(hover(words, x, y, step, row))
    return parts


def _labels(groups: Groups, edges: np.ndarray, y: float) -> list[str]:
    every = -(-len(groups) // 11)  # more names than that would touch
    middles = (edges[1:] + edges[:-1]) / 2
    return [
        text(groups.labels[i], float(middles[i]), y, "muted", text_anchor="middle")
        for i in range(0, len(groups), every)
    ]
