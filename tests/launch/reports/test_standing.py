"""Where a placement stands: objective first, bound, provenance; and the pictures of large clusters."""

import base64
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.cli import DONE, main
from moeplace.launch.reports.comparison import Run, best_run, gains, shown_figures
from moeplace.launch.reports.groups import Groups
from moeplace.launch.reports.raster import DIVERGING, raster
from moeplace.launch.reports.report import Report, render
from moeplace.launch.reports.scatter import round_ticks
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.placement_file import PlacementFile
from moeplace.profiling.traces.file import save_trace
from tests.launch.reports.pages import baseline, check_page, make_trace, striped

SOLVER = {
    "name": "auto", "seed": 7, "status": "time_limit", "seconds": 2.0, "objective_name": "traffic", "objective": 2.5,
    "lower_bound": 2.0, "gap": 0.2, "max_imbalance": 1.05, "command": "moeplace solve t --ranks 4", 
    "notes": ["so it is"],
}  # fmt: skip


def decode(png: bytes) -> tuple[np.ndarray, list[str]]:
    """Pixels and palette of a picture, by the PNG specification alone."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + data)
        chunks[kind], at = data, at + 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 3)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:], ["#" + chunks[b"PLTE"][i : i + 3].hex() for i in range(0, len(chunks[b"PLTE"]), 3)]


def test_pictures_hold_every_level() -> None:
    """A pixel a cell, in the colours of both themes; what is not there is the transparent colour 0."""
    levels = np.random.default_rng(0).integers(-1, 7, (5, 9))
    for image, theme in zip(raster(levels, DIVERGING, (1, 2, 30, 40)), ("light", "dark"), strict=True):
        assert f'class="pixels {theme}"' in image
        found = re.search(r'href="data:image/png;base64,([^"]+)"', image)
        assert found
        pixels, colours = decode(base64.b64decode(found[1]))
        for (row, column), level in np.ndenumerate(levels):
            if level < 0:
                assert pixels[row, column] == 0
            else:
                assert colours[pixels[row, column]] == DIVERGING[theme][level]


@pytest.mark.parametrize(
    ("ranks", "per_node", "most", "word", "count"),
    [
        (8, 8, 8, "rank", 8),
        (32, 8, 8, "node", 4),
        (32, 32, 8, "block", 8),
        (320, 8, 40, "node", 40),
        (90, 1, 40, "block", 40),
    ],
)
def test_columns_of_large_clusters(ranks: int, per_node: int, most: int, word: str, count: int) -> None:
    """Ranks while there is room, else nodes, else blocks of neighbours; nothing is lost in them."""
    placement = index_order(np.full(3, ranks), np.ones(ranks, int), np.arange(ranks) // per_node)
    groups = Groups.of(placement, most=most)
    assert (groups.word, len(groups), len(groups.names)) == (word, count, count)
    assert groups.size_G.sum() == ranks
    assert groups.size_G.min() >= 1
    rng = np.random.default_rng(1)
    travel = rng.random((2, ranks, ranks))
    expected = np.zeros((2, count, count))
    np.add.at(expected, (slice(None), groups.group_R[:, None], groups.group_R[None]), travel)
    np.testing.assert_allclose(groups.joined(travel), expected)
    load = rng.random((3, ranks))
    busiest = [[row[groups.group_R == g].max() for g in range(count)] for row in load]
    np.testing.assert_allclose(groups.busiest(load), busiest)


def test_the_objective_comes_first_with_its_bound_and_origin() -> None:
    """Headline, gap in words, cap, seed, status, command, notes."""
    trace = make_trace(layers=3, experts=8, top_k=2)
    files = {"index order": PlacementFile(baseline(trace, 4)), "p": PlacementFile(striped(trace, 4), SOLVER)}
    report = Report.of(trace, files, {})
    words = check_page(render(report))
    assert "ranks per token where index order has" in report.verdict
    assert "no placement saves more than another 20% of the traffic" in report.verdict
    for expected in ("1.05, or what the layer allows", "auto, time_limit, seed 7, 2.0 s", "moeplace solve t --ranks 4",
                     "so it is.", "2 (gap 20.0%)", "Numbers of every layer"):  # fmt: skip
        assert expected in words, expected
    optimal = Report.of(trace, {**files, "p": PlacementFile(striped(trace, 4), {**SOLVER, "status": "optimal"})}, {})
    assert "Proven: no placement has less traffic" in optimal.verdict


def test_every_placement_given_is_shown() -> None:
    """Three placements: each has its flows, loads and figures."""
    trace = make_trace(layers=3, experts=8)
    given = {name: striped(trace, 4) for name in ("a", "b", "c")}
    html = render(Report.of(trace, given, {}))
    for title in ("where tokens travel", "rank to rank", "load per expert and rank"):
        assert [name for name in given if f"{title}, {name}" in html] == ["a", "b", "c"]


def test_the_page_of_a_large_cluster_is_small() -> None:
    """40 nodes of 8 ranks: less than 3 MB, by node, with every rank on demand."""
    trace = make_trace(layers=20, experts=320, top_k=2)
    rng = np.random.default_rng(2)
    solved = np.stack([rng.permutation(320) for _ in range(20)])
    node = np.arange(320) // 8
    first = index_order(trace.experts_per_layer, np.ones(320, int), node)
    html = render(
        Report.of(
            trace, {"first": first, "second": Placement(solved, np.ones(320, int), node, trace.experts_per_layer)}, {}
        )
    )
    words = check_page(html)
    assert len(html) < 3_000_000
    assert "node 39" in words
    assert "Every rank" in words


def test_of_runs_as_fast_the_one_with_fewer_bytes_between_nodes() -> None:
    """A replay counts bytes and no copies: the baseline does not win by being first."""
    a = Run("index order", "dispatch-combine", {"tokens_per_second": 100.0, "bytes_inter_node": 5e6})
    b = Run("solved", "dispatch-combine", {"tokens_per_second": 99.0, "bytes_inter_node": 3e6})
    assert best_run([a, b]) is b


def test_tiers_are_told_where_there_are_several() -> None:
    """Bytes between nodes and inside them stand in the table once some cross nodes."""
    one = Run("a", "coherent", {"tokens_per_second": 1.0, "bytes_inter_node": 0.0, "bytes_intra_node": 5e6})
    two = Run("b", "coherent", {"tokens_per_second": 1.0, "bytes_inter_node": 1e6, "bytes_intra_node": 5e6})
    assert [f.key for f in shown_figures([one])] == ["tokens_per_second"]
    assert [f.key for f in shown_figures([one, two])] == ["bytes_inter_node", "bytes_intra_node", "tokens_per_second"]


def test_gains_are_told_apart() -> None:
    """Mode 2 times, placement 1.5 times; nothing is said where the runs do not tell."""
    speeds = {("x", "m"): 10.0, ("x", "n"): 20.0, ("y", "n"): 30.0}
    runs = [Run(placement, mode, {"tokens_per_second": speed}) for (placement, mode), speed in speeds.items()]
    assert "the mode makes 2.00 times, the placement 1.50 times" in gains(runs)
    assert gains([runs[0], runs[2]]) == gains(runs[:2]) == ""


@pytest.mark.parametrize("values", [(1.0, 1.004), (250.0, 250.5), (3.0, 3.0)])
def test_axes_do_not_blow_up_what_hardly_differs(values: tuple[float, float]) -> None:
    """Values within 5 % of each other fill at most their share of the axis."""
    ticks = round_ticks(values)
    assert ticks[0] <= min(values) <= max(values) <= ticks[-1]
    assert ticks[-1] - ticks[0] >= 0.05 * max(values)


def test_solve_writes_how_it_was_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The placement file knows its command and cap, and the report shows them."""
    save_trace(tmp_path / "t.trace", make_trace(layers=2, experts=8))
    words = ["solve", str(tmp_path / "t.trace"), "--ranks", "2", "--max-imbalance", "1.3", "--time-limit", "1"]
    assert main([*words, "--mode", "auto", "--out", str(tmp_path / "p.json")]) == DONE
    said = capsys.readouterr().out
    assert "nominal links" in said
    assert "shared by 3 modes" in said
    out = ["--placement", str(tmp_path / "p.json"), "--out", str(tmp_path / "r.html")]
    assert main(["report", str(tmp_path / "t.trace"), *out]) == DONE
    page = check_page((tmp_path / "r.html").read_text())
    assert "moeplace solve" in page
    assert "--max-imbalance 1.3" in page
