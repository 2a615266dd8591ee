"""`moeplace bench offload` on the shipped checkpoint: every run is exact, counted and predicted."""

import json
from pathlib import Path

import pytest

from moeplace.launch.cli import main
from moeplace.launch.options.policy import budgets_of
from moeplace.profiling.errors import InputError
from tests.launch.precision_plans import random_plan


def test_budgets_and_policies_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each; logits are the plain model's; shares add up; nothing is loaded where everything is resident."""
    out = tmp_path / "f.json"
    words = "--budgets 25,100 --policies pinned,lookahead --steps 4 --rounds 2 --prompt 8 --latency 1e-4"
    assert main(["bench", "offload", *words.split(), "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert [(run["budget"], run["policy"]) for run in document["runs"]] == [
        (0.25, "pinned"), (0.25, "lookahead"), (1.0, "pinned"), (1.0, "lookahead"),
    ]  # fmt: skip
    for run in document["runs"]:
        assert run["logits_difference"] < 1e-4
        assert run["predicted_seconds"] > 0
        assert sum(run["found"].values()) == pytest.approx(1)
        assert 0 <= run["hit_rate"] <= 1
        assert (run["accuracy"] is not None) == (run["policy"] == "lookahead")
        assert run["residents"] <= run["fast_slots"] * 6 - 2
        if run["policy"] == "pinned":  # of decode steps alone, one expert per layer; nothing is loaded but on demand
            asked = 6 * document["conditions"]["expert_bytes"]
            assert run["bytes_loaded"] == pytest.approx(run["found"]["loaded"] * asked)
            assert run["predicted_bytes"] == pytest.approx(run["bytes_loaded"])
    assert document["without_tiers"]["logits_difference"] < 1e-4
    text = capsys.readouterr().out
    assert "lookahead" in text
    assert "everything in fast memory" in text


def test_a_plan_of_precisions_moves_fewer_bytes(tmp_path: Path, dated_seed: int) -> None:
    """Logits are those of the plan's numbers in plain matrices; loads carry the bytes that are stored, and are
    predicted to; on a link that knows but bytes, that is what a load takes."""
    out, plan = tmp_path / "f.json", random_plan(tmp_path / "plan.json", dated_seed)
    words = "--budgets 25 --policies pinned --steps 3 --rounds 1 --prompt 8 --latency 0 --bandwidth 2e7 --precision"
    assert main(["bench", "offload", *words.split(), str(tmp_path / "plan.json"), "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    conditions, run = document["conditions"], document["runs"][0]
    assert conditions["precision"] == plan.summary()
    assert conditions["mean_expert_bytes"] < conditions["expert_bytes"]
    assert conditions["seconds_per_load"] > 0.5 * conditions["mean_expert_bytes"] / 2e7
    assert run["logits_difference"] < 1e-4
    assert run["predicted_bytes"] == pytest.approx(run["bytes_loaded"])
    assert 0 < run["bytes_loaded"] < run["found"]["loaded"] * 6 * conditions["expert_bytes"]


def test_wrong_budgets_are_named() -> None:
    """A percentage above 0 and up to 100."""
    assert budgets_of("25, 100%") == (0.25, 1.0)
    for text in ("0", "101", "x", "50,-1"):
        with pytest.raises(InputError, match="must be a percentage above 0"):
            budgets_of(text)


@pytest.mark.parametrize(
    "words",
    ["--rounds 0", "--look-ahead 0 --policies lookahead", "--look-ahead -1", "--latency -1", "--latency nan",
     "--latency inf", "--bandwidth 0", "--bandwidth nan", "--transit 0", "--timeout 0", "--timeout -1", "--timeout nan",
     "--timeout inf", "--policies no", "--budgets 0", "--batch 0", "--steps 1"],
)  # fmt: skip
def test_wrong_values_are_one_sentence(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything is served; nothing is written."""
    short = "--steps 2 --rounds 1 --prompt 8 --budgets 50 --policies pinned --json"
    assert main(["bench", "offload", *short.split(), str(tmp_path / "f.json"), *words.split()]) == 1
    error = capsys.readouterr().err
    assert "internal error" not in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
