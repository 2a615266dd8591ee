"""What `calibrate` measures and what `solve` plans for have the same sizes, or a warning names those that differ."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.cli import DONE, main
from moeplace.placement.cost.calibration import Calibration
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.trace import RoutingTrace

SIZES = {
    "ranks": "ranks", "batch": "batch", "hidden": "hidden size", "experts": "experts", "top_k": "top-",
    "expert_bytes": "bytes an expert", "kv_dim": "kv_dim",
}  # fmt: skip
"""Condition of a calibration -> its words in the warning."""
OTHER = "was measured with"


def write_trace(path: Path, rng: np.random.Generator, *, knows_experts: bool = True) -> RoutingTrace:
    """Of a random small model, which knows its sizes."""
    layers, experts, top_k = (int(rng.integers(low, high)) for low, high in ((2, 4), (5, 9), (1, 4)))
    hidden = 8 * int(rng.integers(1, 6))
    ids_TLK = np.argsort(rng.random((64, layers, experts)), axis=2)[..., :top_k]
    size_LE = np.full((layers, experts), 6 * hidden * int(rng.integers(3, 20))) if knows_experts else None
    trace = RoutingTrace(
        ids_TLK, np.full(layers, experts), sequence_ids=np.arange(64) // 8, expert_bytes=size_LE, hidden_size=hidden,
        kv_dim=4 * int(rng.integers(1, 9)),
    )  # fmt: skip
    save_trace(path, trace)
    return trace


def solve_with(trace: Path, calibration: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What `solve` says on standard error."""
    words = ["--ranks", "1", "--batch", "32", "--time-limit", "0.2", "--calibration", str(calibration), *flags]
    assert main(["solve", str(trace), *words]) == DONE
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trace, and a calibration of one rank with its sizes."""
    folder = tmp_path_factory.mktemp("sizes")
    trace, calibration = folder / "t.trace", folder / "c.json"
    write_trace(trace, np.random.default_rng(0))
    assert main(["calibrate", "--trace", str(trace), "--batch", "32", "--out", str(calibration)]) == DONE
    return trace, calibration


def test_sizes_of_the_trace_are_measured_and_fit(
    measured: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """`calibrate --trace`, then `solve`, `evaluate`, `stats`: no warning of sizes."""
    trace, calibration = measured
    assert OTHER not in solve_with(trace, calibration, capsys, "--out", str(trace.with_name("p.json")))
    for words in (["evaluate", str(trace), str(trace.with_name("p.json"))], ["stats", str(trace), "--ranks", "1"]):
        assert main([*words, "--batch", "32", "--calibration", str(calibration)]) == DONE
        assert OTHER not in capsys.readouterr().err


@pytest.mark.parametrize("name", SIZES)
def test_any_other_size_is_named_once(
    measured: tuple[Path, Path], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file with one condition changed: the warning names that one with both values, and no other."""
    trace, calibration = measured
    document = json.loads(calibration.read_text())
    right = document["conditions"][name]
    document["conditions"][name] = 3 * right
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    said = solve_with(trace, other, capsys, "--mode", "auto")
    assert said.count(OTHER) == 1, "one warning for three modes"
    assert f"{3 * right:,}" in said
    assert f"{right:,}" in said
    sentence = said[said.index(OTHER) : said.index("predicted seconds")]
    assert {each for each, words in SIZES.items() if words in sentence} == {name}


def test_defaults_of_calibrate_are_not_taken_for_a_model_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dated_seed: int
) -> None:
    """`calibrate` without sizes measures nominal ones; `solve` says so, and which command measures the right ones."""
    trace, calibration = tmp_path / "t.trace", tmp_path / "c.json"
    model = write_trace(trace, np.random.default_rng(dated_seed))
    Calibration(conditions={"hidden": 2048, "batch": 256, "experts": 64, "ranks": 1}).save(calibration)
    said = solve_with(trace, calibration, capsys)
    step = f"batch 32, hidden size {model.hidden_size:,}, {model.num_experts:,} experts"
    assert f"was measured with batch 256, hidden size 2,048, 64 experts, but a step here has {step}:" in said
    assert f"moeplace calibrate --trace {trace} --batch 32" in said


def test_old_calibrations_and_traces_that_know_little_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dated_seed: int
) -> None:
    """A file without conditions says nothing of sizes; an imported trace knows neither hidden size nor experts."""
    trace, calibration = tmp_path / "t.trace", tmp_path / "c.json"
    write_trace(trace, np.random.default_rng(dated_seed), knows_experts=False)
    Calibration().save(calibration)
    assert OTHER not in solve_with(trace, calibration, capsys)
    words = ["calibrate", "--trace", str(trace), "--batch", "32", "--hidden", "16", "--out", str(calibration)]
    assert main(words) == DONE
    assert "does not say how large the experts of its model are" in capsys.readouterr().err
    assert Calibration.load(calibration).conditions["hidden"] == 16, "a flag wins"
