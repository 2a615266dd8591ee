"""Affinity between layers: P(next expert given this one), experts in the order of their ranks.

Shape letters: E experts of a layer.
"""

import numpy as np

from moeplace.launch.reports.raster import SEQUENTIAL, raster
from moeplace.launch.reports.svg import element, picture
from moeplace.launch.reports.views import PlacementView

EDGES = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45])
_SIZE, _EDGE = 150.0, 3.0
_MOST_BLOCKS = 40


def affinity_chart(view: PlacementView, boundary: int) -> str:
    """The matrix of one boundary, with the blocks of one rank outlined while there are few."""
    matrix = view.affinity(boundary)
    (_, rows), (_, columns) = view.order(boundary), view.order(boundary + 1)
    parts = raster(np.digitize(matrix, EDGES), SEQUENTIAL, (_EDGE, _EDGE, _SIZE, _SIZE))
    height, width = _SIZE / matrix.shape[0], _SIZE / matrix.shape[1]
    y, x = _EDGE + np.cumsum([0, *rows]) * height, _EDGE + np.cumsum([0, *columns]) * width
    if len(rows) <= _MOST_BLOCKS:
        parts += [
            element(
                "rect", x=float(x[r]), y=float(y[r]), width=columns[r] * width, height=rows[r] * height, class_="block"
            )
            for r in range(len(rows))
        ]
    size = _SIZE + 2 * _EDGE
    return picture(size, size, f"affinity, {view.name}, layer {view.layer_ids[boundary]}", parts)
