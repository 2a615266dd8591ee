"""Tables of measured figures: medians and spreads are those of the runs, aims are judged, pages keep their text."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.commands import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import result_pages


def evidence(ranks: float, imbalance: float) -> dict[str, Any]:
    by_rule = {rule: {"ranks_per_token": ranks + 0.5, "imbalance_mean": imbalance} for rule in result_pages.RULES}
    return {"ranks_per_token": ranks, "imbalance_mean": imbalance, "by_replica_rule": by_rule}


def figures() -> dict[str, Any]:
    """Three seeds of one instance, two of everything else."""
    known = {"date": "2026-01-02", "cores": 2, "python": "3.11", "numpy": "2", "numba": "0.6", "torch": "2",
             "commit": "abc", "seeds": [0, 1, 2], "time_limit": 30, "load_before": 0.1}  # fmt: skip
    row = {
        "name": "8 ranks", "flags": "--ranks 8 --max-imbalance 1.01", "figures": ["ranks_per_token", "imbalance_mean"],
        "goal": [3.5, 1.06], "baselines": {"index order": evidence(4.5, 1.25), "EPLB": evidence(4.625, 1.05)},
        "solved": [evidence(3.5, 1.07), evidence(3.25, 1.05), evidence(3.75, 1.03)],
        "solver": [{"lower_bound": bound, "gap": 0.1} for bound in (2.5, 3.0, 2.75)],
    }  # fmt: skip
    run = {"placement": "index-order", "mode": "dispatch-combine", "form": "plain", "seconds_per_step": 2.0,
           "speedup": 1.0, "prediction_error": 0.01, "bytes_inter_node": 4e6}  # fmt: skip
    solved = {**run, "placement": "p.json", "mode": "coherent", "form": "", "seconds_per_step": 1.0}
    replays = [
        {"top_k": 1, "goal": 2.2, "solve": "--ranks 4", "runs": [run, {**solved, "speedup": speedup}]}
        for speedup in (2.0, 2.1)
    ]
    elastic = [
        {
            "mode": "coherent", "requests": 10, "lost": 0, "changed": 0, "median_step_seconds": 0.05,
            "worst_step_ratio": ratio, "throughput_ratio": 1.0, "seconds_from_kill_to_token": [0.2, 0.3],
            "bytes_moved": 5, "bytes_lower_bound": 5,
        }
        for ratio in (1.25, 1.75)
    ]  # fmt: skip
    return {
        "solver": {"conditions": known, "rows": [row], "loads": [{"name": "Zipf", "imbalance": 1.0, "seconds": 0.01}]},
        "replay": {"conditions": known, "hosts": 2, "link": "200 Mbit/s", "runs": replays},
        "elastic": {"conditions": known, "flags": "--ranks 4", "runs": elastic, "goal": {"worst_step_ratio": 1.5}},
        "quickstart": {"conditions": known, "output": "[1/5] all of it"},
    }


def test_a_row_has_median_spread_bound_aim_and_flags() -> None:
    """The best proven bound counts; the median decides whether the aim is reached."""
    (line,) = [line for line in result_pages.solver_table(figures()["solver"]).splitlines() if "8 ranks" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:5] == [
        "4.500 / 1.250", "4.625 / 1.050", "**3.500 (3.250 to 3.750) / 1.050 (1.030 to 1.070)**", ">= 3.000"
    ]  # fmt: skip
    assert cells[5] == "reached: ranks per token <= 3.5, imbalance <= 1.06"
    assert cells[6] == "`--ranks 8 --max-imbalance 1.01`"


def test_what_is_not_reached_is_said() -> None:
    """An aim of the speedup, of the worst step, of a stay rate (more is better)."""
    found = figures()
    assert "**not reached**: 2.2" in result_pages.replay_table(found["replay"])
    assert result_pages.solved_with(found["replay"]) == "top-1 solved by `moeplace solve t.trace --ranks 4`"
    assert "**not reached**: worst step <= 1.5" in result_pages.elastic_table(found["elastic"])
    row = {"figures": ["stay_rate"], "goal": [0.51], "solved": [{"stay_rate": 0.5}]}
    assert result_pages.reached(row) == "**not reached**: stay rate >= 0.51"
    row["solved"] = [{"stay_rate": 0.52}]
    assert result_pages.reached(row) == "reached: stay rate >= 0.51"


def test_pages_are_written_and_keep_what_is_not_theirs(tmp_path: Path) -> None:
    """README and comparison as they are in the repository: only their blocks change, twice the same."""
    for name in ("README.md", "docs/comparison.md", "benchmarks/results/.keep"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text() if name.endswith(".md") else "")
    before = (tmp_path / "README.md").read_text()
    written = result_pages.write_pages(tmp_path, json.loads(json.dumps(figures())))
    after = (tmp_path / "README.md").read_text()
    assert after.split("<!-- output -->")[0] == before.split("<!-- output -->")[0]
    assert after.split("<!-- /results -->")[1] == before.split("<!-- /results -->")[1]
    assert "[1/5] all of it" in after
    assert "nearest-static" in (tmp_path / "docs/comparison.md").read_text()
    assert written[2].is_file()
    result_pages.write_pages(tmp_path, figures())
    assert (tmp_path / "README.md").read_text() == after


def test_a_block_that_is_gone_is_noticed() -> None:
    with pytest.raises(ValueError, match="0 blocks are called results"):
        result_pages.replaced("no marks here", "results", "new")
