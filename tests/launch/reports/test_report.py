"""The report: one page that is well formed, needs nothing from elsewhere, and shows the numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.cli import DONE, FAILED, main
from moeplace.launch.reports.comparison import FIGURES, Run, best_run, text_table, verdict
from moeplace.launch.reports.report import Report, render
from moeplace.launch.reports.travel import apart
from moeplace.launch.reports.views import make_views
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import save_placement
from moeplace.profiling.traces.file import save_trace
from tests.launch.reports.pages import baseline, check_page, make_trace, striped


def runs() -> list[Run]:
    first = {"collectives_per_layer": 2.0, "copies_per_token": 9.0, "tokens_per_second": 1000.0, "imbalance": 1.25}
    second = {"collectives_per_layer": 1.0, "copies_per_token": 3.6, "tokens_per_second": 1543.0, "imbalance": 1.04}
    second |= {"predicted_tokens_per_second": 1604.0}
    return [Run("index order", "dispatch-combine", first), Run("solved", "coherent", second)]


@pytest.mark.parametrize(
    ("layers", "experts", "ranks"), [(6, 16, 4), (1, 4, 2), (26, 64, 8), (3, 32, 16)], ids=lambda n: str(n)
)
def test_page_is_self_contained_at_every_size(layers: int, experts: int, ranks: int) -> None:
    """From one layer to many experts and ranks, with and without measurements."""
    trace = make_trace(layers=layers, experts=experts)
    placements = {"index order": baseline(trace, ranks), "a <b>": striped(trace, ranks)}
    for document in ({}, {"runs": [run.to_json() for run in runs()], "conditions": {"who & what": "<none>"}}):
        html = render(Report.of(trace, placements, document))
        words = check_page(html)
        assert "a <b>" in words
        assert len(html) < 2_000_000
        if document:
            assert "<none>" in words


def test_numbers_are_on_the_page() -> None:
    """Measured, predicted, and the verdict that follows from them."""
    trace = make_trace(layers=4, experts=8)
    document = {
        "runs": [run.to_json() for run in runs()],
        "checks": {"sentence": "Logits equal.", "equal": True},
        "conditions": {"seed": 17},
    }
    words = check_page(render(Report.of(trace, {"index order": baseline(trace, 2)}, document)))
    for number in ("1,543", "1,604", "3.60", "9.00", "1.04", "17", "Logits equal.", "+54%", "-60%", "1.54 times"):
        assert number in words, number


def test_views_agree_with_the_evaluator() -> None:
    """Imbalance, stay rate and travel are those that `evaluate` computes."""
    trace = make_trace(layers=5, experts=16, top_k=2)
    for placement in (baseline(trace, 4), striped(trace, 4)):
        view = make_views(trace, {"p": placement})[0]
        found = evaluate(trace, placement)
        assert view.imbalance == pytest.approx(found.imbalance_mean)
        assert view.stay_rate == pytest.approx(found.stay_rate)
        np.testing.assert_allclose(view.travel_BRR.mean(axis=0), found.travel_RR / found.travel_RR.sum(), atol=1e-12)
        np.testing.assert_allclose(
            view.rank_load_LR, found.load_LR / found.load_LR.mean(axis=1, keepdims=True), atol=1e-12
        )


def test_empty_slots_and_replicas_are_drawn() -> None:
    """Slots without an expert stay blank; a replicated expert's load is split."""
    trace = make_trace(layers=2, experts=4)
    rows = np.array([[0, 1, 2, 0, 3, -1], [0, 1, -1, 2, 3, 1]])
    placement = Placement(rows, np.array([3, 3]), np.zeros(2, int), trace.experts_per_layer)
    view = make_views(trace, {"p": placement})[0]
    assert np.isnan(view.slot_load_LS).sum() == 2
    assert view.slot_load_LS[0, 0] == view.slot_load_LS[0, 3]
    check_page(render(Report.of(trace, {"p": placement}, {})))


def test_labels_do_not_lie_on_each_other() -> None:
    """Ranks without tokens have no room in the picture of flows: their labels are left out, the first one stays."""
    assert apart(np.array([20.0, 50.0, 55.0, 60.9, 61.0, 90.0])) == [0, 1, 4, 5]
    assert apart(np.zeros(4)) == [0]


def test_verdict_names_the_best_run() -> None:
    """The fastest; among runs about as fast the one with fewest copies; none better, then nothing is to be changed."""
    first, second = runs()
    assert verdict([first, second]).startswith("Run coherent with the solved placement: 50% fewer collectives")
    third = Run("index order", "coherent", {**second.figures, "copies_per_token": 4.6, "tokens_per_second": 1560.0})
    assert best_run([first, third, second]) is second
    assert verdict([second, first]).startswith("Leave the experts as they are")


def test_text_table_shows_what_is_known() -> None:
    """Unknown figures are a dash, figures of no run are left out."""
    table = text_table(runs())
    assert "KiB" not in table
    assert [line for line in table.splitlines() if line.startswith("  predicted")][-1].split() == [
        "predicted",
        "-",
        "1,604",
    ]
    assert {figure.key for figure in FIGURES} >= {"copies_per_token", "imbalance"}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    trace = make_trace(layers=4, experts=8)
    save_trace(tmp_path / "t.trace", trace)
    save_placement(tmp_path / "p.json", striped(trace, 2))
    return tmp_path / "t.trace", tmp_path / "p.json"


def test_report_command_writes_a_page(
    tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A trace, a placement and the JSON of a benchmark become a page."""
    trace, placement = files
    bench = {"conditions": {"hosts": 2}, "runs": [{**run.to_json(), "seconds_per_step": 0.01} for run in runs()]}
    measured, out = tmp_path / "m.json", tmp_path / "r.html"
    measured.write_text(json.dumps(bench))
    arguments = [
        "report",
        str(trace),
        "--placement",
        str(placement),
        "--measurements",
        str(measured),
        "--out",
        str(out),
    ]
    assert main(arguments) == DONE
    words = check_page(out.read_text())
    assert "hosts" in words
    assert "1,543" in words
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", "[]", '{"runs": []}', '{"runs": [{"mode": "x"}]}', '{"runs": 3}'])
def test_foreign_measurements_are_refused(
    content: str, tmp_path: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON that is not a file of measurements is named; nothing is written."""
    trace, placement = files
    (tmp_path / "m.json").write_text(content)
    arguments = ["report", str(trace), "--placement", str(placement), "--measurements", str(tmp_path / "m.json")]
    assert main([*arguments, "--out", str(tmp_path / "r.html")]) == FAILED
    error = capsys.readouterr().err
    assert "measurements" in error
    assert "internal error" not in error
    assert not (tmp_path / "r.html").exists()
