"""The quickstart with reduced settings: the real thing on two ranks, and what it says when a rank fails."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from moeplace.launch.cli import FAILED, main
from moeplace.launch.quickstart import run
from moeplace.launch.quickstart.job import failure_path
from moeplace.launch.quickstart.local_ranks import run_local_ranks
from moeplace.launch.quickstart.results import Results
from moeplace.launch.quickstart.run import QuickstartOptions, run_quickstart, shipped_texts
from moeplace.launch.reports.comparison import Run
from moeplace.placement.placement_file import load_placement
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.profiling.traces.file import load_trace

REDUCED = {
    "ranks": 2,
    "time_limit": 1.0,
    "requests": 8,
    "prompt_tokens": 8,
    "new_tokens": 6,
    "checked": 2,
    "rounds": 1,
    "sequences_per_text": 16,
}


@pytest.mark.timeout(150)
def test_quickstart_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Profile, solve, serve on two ranks: logits equal, collectives counted, copies as predicted, files written."""
    out = tmp_path / "quickstart"
    seen: list[Results] = []
    monkeypatch.setattr(run, "Results", lambda *args: seen.append(Results(*args)) or seen[0])
    document = run_quickstart(QuickstartOptions(out=out, **REDUCED))  # type: ignore[arg-type]
    assert json.loads((out / "report.json").read_text()) == document
    assert document["checks"]["equal"]
    runs = {(one["placement"], one["mode"]): Run.from_json(one) for one in document["runs"]}
    assert list(runs) == [(p, m) for m in ("dispatch-combine", "coherent") for p in ("index order", "solved")]
    for (_, mode), column in runs.items():
        figures = column.figures
        assert figures["collectives_per_layer"] == {"dispatch-combine": 2, "coherent": 1}[mode]
        assert figures["copies_per_token"] == pytest.approx(figures["predicted_copies_per_token"], rel=0.25)
        assert figures["bytes_per_token"] > 0
        assert figures["tokens_per_second"] > 0
    assert runs["index order", "dispatch-combine"].figures["speedup"] == 1
    trace = load_trace(out / "routing.trace")
    assert trace.num_tokens == 3 * 16 * (8 + 6 - 1)
    assert trace.workload_names == tuple(path.stem for path in shipped_texts())
    for mode in ("dispatch-combine", "coherent"):
        assert load_placement(out / f"placement-{mode}.json").num_ranks == 2
    printed = capsys.readouterr()
    assert "collectives per MoE layer" in printed.out
    assert "Logits equal the plain model's in all 4 runs" in printed.out
    assert document["verdict"] in printed.out
    assert "[5/5]" in printed.err
    assert "<html" in (out / "report.html").read_text()
    check_that_predictions_are_of_other_work(seen[0])


def check_that_predictions_are_of_other_work(results: Results) -> None:
    """Runs that took any other time have the same predictions; other calibration gives other ones."""
    served = {tuple(prompt) for prompt in results.job.prompts}
    assert not served & {tuple(prompt) for prompt in results.job.calibration_prompts}
    assert results.job.calibration not in results.job.runs
    names = ("predicted_seconds_per_step", "predicted_tokens_per_second")
    known = [[column.figures[name] for name in names] for column in results.runs]
    slower = deepcopy(results.ranks)
    for rank in slower:
        for timed in rank["runs"]:
            timed["step_seconds"] = [10 * seconds + 1 for seconds in timed["step_seconds"]]
    again = replace(results, ranks=slower).runs
    assert [[column.figures[name] for name in names] for column in again] == known
    for rank in slower:
        rank["calibration_step_seconds"] = [seconds + 1 for seconds in rank["calibration_step_seconds"]]
    moved = replace(results, ranks=slower).runs
    assert all(column.figures[names[0]] == pytest.approx(one[0] + 1) for column, one in zip(moved, known, strict=True))


def start_workers(folder: Path, *, timeout: float) -> None:
    """Two ranks of the quickstart in a folder without a job."""
    run_local_ranks(
        "moeplace.launch.quickstart.worker",
        [str(folder)],
        ranks=2,
        log=folder / "ranks.log",
        failure_of_rank=lambda rank: failure_path(folder, rank),
        timeout=timeout,
    )


def test_failing_rank_is_one_sentence(tmp_path: Path) -> None:
    """Ranks without a job say which file they miss; the first of them is named."""
    with pytest.raises(MoeplaceError, match=r"rank \d of 2 failed: cannot read .*job\.json: No such file") as caught:
        start_workers(tmp_path, timeout=60)
    assert "\n" not in str(caught.value)
    assert "ranks.log" in str(caught.value)


def test_ranks_that_hang_are_ended(tmp_path: Path) -> None:
    """After the timeout all ranks are ended, and the sentence says so."""
    with pytest.raises(MoeplaceError, match=r"the 2 ranks did not finish within 0\.2 s"):
        start_workers(tmp_path, timeout=0.2)


@pytest.mark.parametrize(("name", "value"), [("ranks", 1), ("requests", 0), ("new_tokens", 3), ("rounds", 0)])
def test_options_are_checked(name: str, value: int) -> None:
    """A value that makes no sense is refused at once."""
    with pytest.raises(InputError, match=name.replace("_", " ")):
        QuickstartOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["--ranks", "17", "--sequences-per-text", "4", "--requests", "2"],
            "ranks (17) must not exceed the experts of a layer (16)",
        ),
        (["--new-tokens", "600"], "exceed the 512 positions"),
        (["--requests", "100", "--sequences-per-text", "4"], "100 requests need as many"),
    ],
)
def test_impossible_wishes_fail_before_any_rank_starts(
    flags: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence with the value and the rule."""
    assert main(["quickstart", "--out", str(tmp_path / "q"), "--time-limit", "1", *flags]) == FAILED
    assert sentence in capsys.readouterr().err.splitlines()[-1]
