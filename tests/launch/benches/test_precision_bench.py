"""`moeplace bench precision`: plans keep budgets, predicted errors order what logits suffer, evaluate reads them."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.benches.precision import rank_correlation
from moeplace.launch.cli import main
from moeplace.placement.placement import index_order
from moeplace.placement.placement_file import save_placement
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.loads import LoadStats, save_load
from moeplace.profiling.traces.trace import RoutingTrace


def test_budgets_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes fall, errors rise; no plan is predicted worse than all experts alike; the order is the logits'."""
    out, plan = tmp_path / "f.json", tmp_path / "p.json"
    words = ["bench", "precision", "--budgets", "80,50,30", "--sequences", "4", "--length", "32", "--out", str(plan)]
    assert main([*words, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    plans = [run for run in document["runs"] if run["choice"] == "plan"]
    whole = document["conditions"]["exact_bytes"]
    for run in plans:
        assert run["bytes"] <= run["budget"] * whole
        assert run["lower_bound"] <= run["predicted_error"] * (1 + 1e-9)
        alike = [r for r in document["runs"] if r["budget"] == run["budget"] and r["choice"] != "plan"]
        assert all(run["predicted_error"] <= r["predicted_error"] for r in alike)
    assert np.diff([run["predicted_error"] for run in plans]).min() > 0
    assert np.diff([run["logit_error"] for run in plans]).min() > 0
    assert document["rank_correlation"] > 0.8
    assert "rank correlation" in capsys.readouterr().out
    ids = np.random.default_rng(0).integers(0, 16, (40, 6, 1))
    save_trace(tmp_path / "t.trace", RoutingTrace(ids, np.full(6, 16), sequence_ids=np.arange(40) // 4))
    save_placement(tmp_path / "pl.json", index_order(np.full(6, 16), np.array([8, 8]), np.zeros(2, int)))
    words = ["evaluate", str(tmp_path / "t.trace"), str(tmp_path / "pl.json"), "--precision", str(plan)]
    assert main([*words, "--json", str(out)]) == 0
    found = json.loads(out.read_text())["precision"]
    assert sum(found["bytes_per_rank"]) == plans[0]["bytes"]
    assert sum(found["exact_bytes_per_rank"]) == whole
    assert found["predicted_error"] == plans[0]["predicted_error"]
    save_load(tmp_path / "l.npz", LoadStats(np.arange(1, 97).reshape(6, 16), np.full(6, 16)))
    assert main(["evaluate", str(tmp_path / "l.npz"), *words[2:], "--json", str(out)]) == 0
    assert json.loads(out.read_text())["precision"] == found
    assert main(["evaluate", str(tmp_path / "l.npz"), *words[2:-1], str(tmp_path / "none.json")]) == 1
    assert "cannot read" in capsys.readouterr().err
    save_placement(tmp_path / "pl.json", index_order(np.full(6, 8), np.array([4, 4]), np.zeros(2, int)))
    save_trace(tmp_path / "t.trace", RoutingTrace(ids % 8, np.full(6, 8), sequence_ids=np.arange(40) // 4))
    assert main(words) == 1
    assert "is for another number of layers or experts" in capsys.readouterr().err


def test_bad_values_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A budget that no precision keeps, first or last, leaves no file; a length that is none; folders that hold no
    checkpoint."""
    for budgets in ("10", "80,10"):
        words = ["bench", "precision", "--budgets", budgets, "--sequences", "1", "--length", "8"]
        assert main([*words, "--out", str(tmp_path / "p.json"), "--json", str(tmp_path / "f.json")]) == 1
        assert "its experts take at least" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    for bench in ("precision", "offload"):
        for model, reason in ((tmp_path, "is not a checkpoint folder"), (tmp_path / "m", "no such checkpoint folder")):
            assert main(["bench", bench, str(model)]) == 1
            assert reason in capsys.readouterr().err
    assert main(["bench", "precision", "--length", "3"]) == 1
    assert "--length (3) must be at least 8" in capsys.readouterr().err


def test_rank_correlation() -> None:
    """1 for the same order, -1 for the other way round, None where there is none."""
    assert rank_correlation([(1, 2), (2, 5), (3, 9)]) == pytest.approx(1)
    assert rank_correlation([(1, 9), (2, 5), (3, 2)]) == pytest.approx(-1)
    assert rank_correlation([(1, 2), (2, 2)]) is None
