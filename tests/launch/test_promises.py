"""`solve --cap-on held-out` from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.commands import solve, verify
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.loads import LoadStats, save_load
from tests.launch.commands import run
from tests.placement.instances import skewed_trace

FLAGS = ("--ranks", "2", "--objective", "traffic", "--time-limit", "2", "--cap-on", "held-out")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Twelve experts, top-2, forty sequences."""
    tokens = skewed_trace(5, tokens=1600, layers=2, experts=12, top_k=2)
    path = tmp_path / "t.npz"
    save_trace(path, tokens.replace(sequence_ids=np.arange(1600) // 40))
    return path


def test_the_file_says_what_was_promised(tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the solver's figures and in a note; `verify` confirms the problem under the cap on fitted tokens."""
    out = tmp_path / "p.json"
    assert run(solve, trace, *FLAGS, "--max-imbalance", "1.3", "--confidence", "0.8", "--out", out) == 0
    assert "with 80% confidence on as many unseen sequences (20)" in capsys.readouterr().out
    document = json.loads(out.read_text())
    promise = document["solver"]["promise"]
    assert promise["asked"] == document["solver"]["max_imbalance"] == 1.3
    assert promise["kept"] == (promise["forecast"]["bound"] <= 1.3)
    assert document["problem"]["max_imbalance"] == promise["fitted_cap"] <= 1.3
    assert run(verify, out, "--trace", trace) == 0


def test_what_cannot_be_promised_is_said(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Perfect balance of unseen sequences: a plan all the same, and a sentence that it is not."""
    assert run(solve, trace, *FLAGS, "--max-imbalance", "1.0") == 0
    assert "imbalance 1 cannot be promised" in capsys.readouterr().out


def test_loads_and_missing_caps_are_refused(tmp_path: Path, trace: Path) -> None:
    """Loads know no sequences; without a cap nothing is asked for."""
    loads = tmp_path / "loads.npz"
    save_load(loads, LoadStats(np.arange(1, 25).reshape(2, 12), np.full(2, 12)))
    with pytest.raises(InputError, match="--cap-on held-out needs a trace"):
        run(solve, loads, *FLAGS, "--max-imbalance", "1.1")
    with pytest.raises(InputError, match="needs --max-imbalance"):
        run(solve, trace, *FLAGS)


def test_what_would_be_ignored_is_refused(tmp_path: Path, trace: Path) -> None:
    """A confidence in nothing; a promise on a placement that planning of memory tiers changes afterwards."""
    flags = ("--max-imbalance", "1.3", "--time-limit", "1")
    with pytest.raises(InputError, match=r"--confidence \(0\.9\) is of a promise: it needs --cap-on held-out"):
        run(solve, trace, "--ranks", "2", *flags, "--confidence", "0.9")
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(
        "ranks_per_node = 2\nslots_per_rank = 6\n[fast]\nslots = 3\n[host]\nlatency = 1e-5\nbandwidth = 1e9\n"
    )
    with pytest.raises(InputError, match="--cap-on held-out cannot be kept where memory has tiers"):
        run(solve, trace, "--cluster", tiers, "--ranks", "2", *flags, "--cap-on", "held-out")
