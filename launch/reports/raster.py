"""Matrices as pictures of one pixel a cell: a quarter of a byte where a drawn cell takes thirty.

A picture cannot follow the page's colours, so it is there twice, in those of the light page and of the dark one; the
page shows the one that fits.
"""

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from moeplace.launch.reports.svg import element

DIVERGING = {
    "light": ("#2f7fc1", "#7fb2dc", "#c3dcef", "#edf0f2", "#fbd3b4", "#f0975a", "#cf4f17"),
    "dark": ("#4aa0e8", "#35719f", "#26475f", "#27313b", "#5c4130", "#a5612f", "#ee7f3b"),
}
"""From far below the mean to far above it."""
SEQUENTIAL = {
    "light": ("#f1f4f7", "#d9e7f5", "#b5d1ee", "#86b4e2", "#5593d3", "#2b72bd", "#12539a", "#083a70"),
    "dark": ("#202a34", "#213a52", "#244d73", "#2a6497", "#3a80bd", "#57a0dd", "#86c1f0", "#c4e2fb"),
}
"""From nothing to much."""


def raster(
    levels: np.ndarray, palette: Mapping[str, Sequence[str]], box: tuple[float, float, float, float]
) -> list[str]:
    """SVG images of a matrix, for light pages and for dark ones.

    Args:
        levels: (rows, columns) integers, an index of the palette; negative = transparent.
        palette: "light" and "dark" colours, `#rrggbb`.
        box: x, y, width and height of the drawing.
    """
    x, y, width, height = box
    return [
        element(
            "image", x=x, y=y, width=width, height=height, class_=f"pixels {theme}", preserveAspectRatio="none",
            href=f"data:image/png;base64,{base64.b64encode(_png(levels, colours)).decode()}",
        )
        for theme, colours in palette.items()
    ]  # fmt: skip


def _png(levels: np.ndarray, colours: Sequence[str]) -> bytes:
    """A palette image (PNG, W3C 2003): colour 0 is transparent, colour i + 1 is level i."""
    rows, columns = levels.shape
    indexed = (levels + 1).clip(0).astype(np.uint8)
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), indexed], axis=1)  # each line begins with its filter: none
    palette = b"\0\0\0" + b"".join(bytes.fromhex(colour[1:]) for colour in colours)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"tRNS", b"\0"), (b"IDAT", zlib.compress(lines.tobytes(), 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in (*chunks, (b"IEND", b"")))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
