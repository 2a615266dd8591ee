"""A scatter plot as a self-contained SVG: traffic against balance, every point named."""

from collections.abc import Sequence
from html import escape

import numpy as np

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _MARGIN = 760, 460, 72, 56, 28


def scatter_svg(points: Sequence[tuple[float, float, str]], *, x_label: str, y_label: str) -> str:
    """SVG text of named points; points that no other point beats in both coordinates are joined (the Pareto front).

    Args:
        points: (x, y, name), both better when smaller.
        x_label, y_label: axis titles.
    """
    xs, ys = round_ticks([x for x, _, _ in points]), round_ticks([y for _, y, _ in points])

    def place(x: float, y: float) -> tuple[float, float]:
        share_x = (x - xs[0]) / (xs[-1] - xs[0])
        share_y = (y - ys[0]) / (ys[-1] - ys[0])
        wide, high = _WIDTH - _LEFT - 6 * _MARGIN, _HEIGHT - _BOTTOM - _MARGIN
        return _LEFT + share_x * wide, _HEIGHT - _BOTTOM - share_y * high

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="system-ui,sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
    ]
    right, top = place(xs[-1], ys[-1])
    for x in xs:
        px, bottom = place(x, ys[0])
        parts.append(f'<path d="M{px:.1f} {bottom:.1f}V{top:.1f}" stroke="#e3e6ea"/>')
        parts.append(f'<text x="{px:.1f}" y="{bottom + 18:.1f}" text-anchor="middle" fill="#444">{x:g}</text>')
    for y in ys:
        left, py = place(xs[0], y)
        parts.append(f'<path d="M{left:.1f} {py:.1f}H{right:.1f}" stroke="#e3e6ea"/>')
        parts.append(f'<text x="{left - 8:.1f}" y="{py + 4:.1f}" text-anchor="end" fill="#444">{y:g}</text>')
    front = pareto_front(points)
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y, _ in front))
    parts.append(f'<polyline points="{path}" fill="none" stroke="#1f77b4" stroke-width="1.5" stroke-dasharray="5 4"/>')
    for x, y, name in points:
        px, py = place(x, y)
        colour = "#1f77b4" if (x, y, name) in front else "#8a8f98"
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{px + 9:.1f}" y="{py + 4:.1f}" fill="#222">{escape(name)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 12}" text-anchor="middle" fill="#222">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(18 {(_HEIGHT - _BOTTOM + top) / 2:.1f}) rotate(-90)" text-anchor="middle" '
        f'fill="#222">{escape(y_label)}</text></svg>'
    )
    return "\n".join(parts) + "\n"


LEAST_SPAN = 0.05
"""Share of the greatest value that an axis spans at least: what differs by less is to look as small as it is."""


def round_ticks(values: Sequence[float]) -> list[float]:
    """Four to nine round numbers that enclose the values."""
    low, high = min(values), max(values)
    if high - low < LEAST_SPAN * abs(high):
        middle, half = (low + high) / 2, LEAST_SPAN * abs(high) / 2
        low, high = middle - half, middle + half
    span = max(high - low, 1e-12)
    step = 10.0 ** np.floor(np.log10(span))
    for factor in (0.2, 0.25, 0.5, 1.0):
        if span / (step * factor) <= 6:
            step *= factor
            break
    first, last = np.floor(low / step), np.ceil(high / step)
    return [round(float(i * step), 10) for i in np.arange(first, max(last, first + 1) + 1)]


def pareto_front(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Points that no other beats in both coordinates, by x."""
    best, front = np.inf, []
    for point in sorted(points):
        if point[1] < best:
            best = point[1]
            front.append(point)
    return front
