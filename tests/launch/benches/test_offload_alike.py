"""`moeplace bench offload --alike` on the shipped checkpoint: the same requests in two orders, with the same tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from moeplace.launch.cli import main

SHORT = "--budgets 25 --policies pinned,lru --batch 2 --requests 12 --steps 8 --prompt 8 --rounds 1 --latency 0"


def measure(out: Path, *words: str) -> dict[str, Any]:
    assert main(["bench", "offload", *SHORT.split(), *words, "--json", str(out)]) == 0
    return dict(json.loads(out.read_text()))


def test_orders_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str], dated_seed: int) -> None:
    """A row for each N, the order of arrival first; tokens are equal, nobody is overtaken more often than may be, and
    what is loaded is what was asked for and not there. The same seed gives the same counts."""
    seed = str(dated_seed % 1000)
    document = measure(tmp_path / "f.json", "--alike", "5", "--seed", seed)
    runs, conditions = document["runs"], document["conditions"]
    assert [(run["policy"], run["overtaken"]) for run in runs] == [("pinned", 0), ("pinned", 5), ("lru", 0), ("lru", 5)]
    for run in runs:
        assert run["other_tokens"] == 0
        assert run["most_overtaken"] <= run["overtaken"]
        assert 1 <= run["active_experts"] <= 2
        missing = (1 - run["hit_rate"]) * run["experts_asked"]
        assert run["bytes_loaded"] == pytest.approx(missing * conditions["expert_bytes"])
        first = runs[0 if run["policy"] == "pinned" else 2]
        assert run["bytes_share"] == pytest.approx(run["bytes_loaded"] / first["bytes_loaded"])
        if run is first:
            assert run["longest_delay"] == 0
    assert runs[0]["mean_wait"] == runs[2]["mean_wait"]
    assert runs[1]["mean_wait"] == runs[3]["mean_wait"]  # who comes next does not depend on what stays in memory
    assert -1 <= document["forecast_correlation"] <= 1
    assert "overtaken <=" in capsys.readouterr().out
    again = measure(tmp_path / "again.json", "--alike", "5", "--seed", seed)
    for run, other in zip(runs, again["runs"], strict=True):
        assert {**run, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize(
    "words",
    ["--alike x", "--alike -1", "--alike 3,", "--alike 3 --batch 1", "--alike 3 --requests 2",
     "--alike 3 --temperature -1", "--alike 3 --temperature inf", "--alike 3 --temperature nan", "--alike 3 --seed -1"],
)  # fmt: skip
def test_wrong_values_are_one_sentence(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is served; nothing is written."""
    assert main(["bench", "offload", *SHORT.split(), "--json", str(tmp_path / "f.json"), *words.split()]) == 1
    error = capsys.readouterr().err
    assert "internal error" not in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
