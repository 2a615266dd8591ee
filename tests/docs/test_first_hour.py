"""`examples/first_hour.sh`: what a new user types in the first hour, line by line, and what each line promises.

Each command runs in this process, with shorter limits and fewer tokens than the script asks for, and no other change;
the quickstart has a test of its own. The soak test runs the script itself.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.cli import COMMANDS, DONE, main
from moeplace.placement.engines import read_engine_placement
from moeplace.placement.placement_file import load_placement, load_placement_file
from moeplace.profiling.traces.file import load_trace
from tests.docs.commands import ROOT, shown_commands
from tests.docs.scenes import ELSEWHERE

SCRIPT = ROOT / "examples" / "first_hour.sh"
TIME_LIMIT = {"t.trace": "0.4", "v3.trace": "1.5"}
TOKENS = "768"
"""Of the profile of each text, and of the large trace."""
FIGURES = ("ranks_per_token", "nodes_per_token", "copies_per_token", "imbalance_mean", "predicted_seconds")


def lines_of_the_script() -> list[list[str]]:
    """Words of each command of the script: lines of our commands, or of the shell between them."""
    text = SCRIPT.read_text(encoding="utf-8").replace("\\\n", " ")
    body = text[text.index("# 1.") :]
    return [shlex.split(line, comments=True) for line in body.splitlines() if line and not line.startswith("#")]


def with_small_sizes(words: list[str]) -> list[str]:
    """The same command with a short limit and few tokens."""
    words = list(words)
    for flag, value in (("--time-limit", TIME_LIMIT.get(words[1])), ("--max-tokens", TOKENS)):
        if flag in words and value:
            words[words.index(flag) + 1] = value
    return [*words, "--time-limit", TIME_LIMIT["t.trace"]] if words[0] == "stats" and "--ranks" in words else words


def after(words: list[str], flag: str) -> Path:
    return Path(words[words.index(flag) + 1])


def check_trace(words: list[str], said: str) -> None:
    """The trace has the tokens that were announced."""
    path = after(words, "--out")
    trace = load_trace(path)
    assert f"{path}: {trace.num_tokens} tokens" in said
    if "--layer-ids" in words:
        assert (trace.num_layers, trace.num_experts, trace.top_k, trace.num_hidden_layers) == (58, 256, 8, 61)


def check_solved(words: list[str], said: str) -> None:
    """The file has a bound below its objective, and its evidence is what `evaluate` finds."""
    path = after(words, "--out")
    file = load_placement_file(path)
    assert file.solver["lower_bound"] <= file.solver["objective"] * (1 + 1e-9)
    assert f"wrote {path}" in said
    figures = path.with_suffix(".figures")
    batch = ["--batch", str(after(words, "--batch"))] if "--batch" in words else []
    assert main(["evaluate", words[1], str(path), "--json", str(figures), *batch]) == DONE
    found = json.loads(figures.read_text())
    for name in FIGURES:
        assert found[name] == pytest.approx(file.evidence[name], rel=1e-6, abs=1e-9), name  # files keep nanoseconds


def check_report(words: list[str], said: str) -> None:
    """One page with pictures, of a size that a browser likes, without a figure that is none."""
    page = after(words, "--out").read_text(encoding="utf-8")
    assert "<svg" in page
    assert len(page) < 3e6
    assert not re.search(r">\s*(nan|inf|None)\b", page)


def check_export(words: list[str], said: str) -> None:
    """What the engine's file says is the placement; the flags that the engine needs are printed."""
    written = read_engine_placement(after(words, "--out"), words[words.index("--to") + 1])
    solved = load_placement(words[1])
    np.testing.assert_array_equal(written.copies_LER, solved.copies_LER)
    assert re.search(r"start \S+ with: \S+", said)


def check_way_back(words: list[str], said: str) -> None:
    np.testing.assert_array_equal(
        load_placement(after(words, "--out")).slot_to_expert, load_placement("v3-placement.json").slot_to_expert
    )


def check_completions(words: list[str], said: str) -> None:
    completions = [json.loads(line) for line in after(words, "--out").read_text().splitlines()]
    assert len(completions) == 1
    assert completions[0]["text"]


def check_plan(words: list[str], said: str) -> None:
    """As many moves as were allowed, at most."""
    moves = load_placement_file("v3-next.json").solver["moved"]["moves_per_layer_most"]
    assert 0 <= moves <= 16
    plan = json.loads(after(words, "--out").read_text())
    assert plan["bytes"] >= plan["least_bytes"]


def check_figures(words: list[str], said: str) -> None:
    """A table and no figure that is none."""
    assert "---" in said
    assert "nan" not in said.split()


def check_verified(words: list[str], said: str) -> None:
    """Nothing of what the file claims is refuted."""
    assert "every claim that can be checked holds" in said
    assert "REFUTED" not in said


PROMISES: dict[str, Callable[[list[str], str], None]] = {
    "profile": check_trace, "import": check_trace, "stats": check_figures, "solve": check_solved,
    "evaluate": check_figures, "verify": check_verified,
    "compare": check_figures, "report": check_report, "serve": check_completions,
    "export": check_export, "import-placement": check_way_back, "plan": check_plan,
}  # fmt: skip


def run_example(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [*words, TOKENS])
    runpy.run_path(words[0], run_name="__main__")


@pytest.mark.timeout(240)
def test_the_first_hour_has_no_dead_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command exits with 0, in order, in one folder, and keeps its promise."""
    monkeypatch.chdir(tmp_path)
    names = {"$MODEL": str(ROOT / "launch/data/tiny-moe"), "$TEXT": str(ROOT / "launch/data/text"), "$REPO": str(ROOT)}
    kept = set()
    for line in lines_of_the_script():
        words = [re.sub(r"\$\w+", lambda found: names[found[0]], word) for word in line]
        if words[0] == "echo":
            Path(words[-1]).write_text(words[1] + "\n")
        elif words[0] == "python":
            run_example(words[1:], monkeypatch)
        elif words[1] != "quickstart":
            words = with_small_sizes(words[1:])
            assert main(words) == DONE, f"{shlex.join(words)}: {capsys.readouterr().err}"
            PROMISES[words[0]](words, capsys.readouterr().out)
            kept.add(words[0])
    assert kept == set(PROMISES)


def test_the_script_has_what_the_readme_shows() -> None:
    """Each command of README's "Your own model" that runs on one machine; the flags of the quickstart are its own."""
    shown = [shown for shown in shown_commands(ROOT / "README.md") if shown.words[0] == "moeplace" and not shown.reason]
    wanted = {each.words[1] for each in shown if " ".join(each.words[:2]) not in ELSEWHERE} & set(COMMANDS)
    assert wanted <= {words[1] for words in lines_of_the_script()}


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_script_itself(tmp_path: Path) -> None:
    """Run by a shell, with the command that this environment has."""
    for name, started in (("moeplace", "-m moeplace.launch.cli"), ("python", "")):
        command = tmp_path / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {started} "$@"\n')
        command.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", SCRIPT, str(tmp_path / "hour")], env=os.environ | {"PATH": path}, capture_output=True, text=True,
        timeout=800, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "hour" / "plan.json").is_file()
