"""`serve --precision`: exact unless somebody says otherwise, and then it says what is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moeplace.launch.cli import main
from moeplace.launch.serving.requests_file import Tokenizer
from moeplace.placement.tiers.precision import PrecisionPlan
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.experts.rounding import PRECISIONS
from moeplace.runtime.models.precisions.rounded_checkpoint import RoundedCheckpoint
from tests.launch.precision_plans import random_plan
from tests.shared_data import tiny_moe_path

PROMPTS = ("In the beginning", "import os")
TOKENS = 24


def logprobs_of(plan: PrecisionPlan) -> list[float]:
    """What experts that are rounded by a plan, and kept plain, say to the prompts: logarithms of drawn tokens."""
    tokenizer = Tokenizer(tiny_moe_path())
    engine = Engine(RoundedCheckpoint(tiny_moe_path(), PRECISIONS, plan.choice_LE), dtype=torch.float32)
    requests = [Request(p, tuple(tokenizer.encode(p)), TOKENS, stop_ids=(), logprobs=0) for p in PROMPTS]
    return [found.value for one in engine.generate(requests) for found in one.logprobs if found is not None]


def serve(folder: Path, *flags: str) -> tuple[int, list[float], dict[str, Any]]:
    """Exit code, logarithms of drawn tokens, and figures of a file of requests."""
    source, out, figures = folder / "in.jsonl", folder / "out.jsonl", folder / "f.json"
    lines = [{"prompt": p, "max_new_tokens": TOKENS, "stop_ids": [], "temperature": 0, "logprobs": 0} for p in PROMPTS]
    source.write_text("\n".join(map(json.dumps, lines)))
    words = ["--requests", str(source), "--out", str(out), "--json", str(figures), "--dtype", "float32", *flags]
    if code := main(["serve", str(tiny_moe_path()), *words]):
        return code, [], {}
    found = [value for line in out.read_text().splitlines() for value, _ in json.loads(line)["logprobs"]]
    return 0, found, json.loads(figures.read_text())


def test_a_plan_is_served_and_said(tmp_path: Path, dated_seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Probabilities are those of the rounded numbers, with little fast memory too; one line at the start, and the
    figures, say how many experts are in how many bits. Without the flag nothing is inexact, and the figures say so."""
    plan = random_plan(tmp_path / "plan.json", dated_seed)
    expected, counts = logprobs_of(plan), plan.counts()
    assert len(expected) == len(PROMPTS) * TOKENS
    flags = ("--precision", str(tmp_path / "plan.json"))
    for more in (("--fast-slots", "3", "--host-slots", "9"), ("--verify",)):
        code, found, figures = serve(tmp_path, *flags, *more)
        assert (code, found) == (0, pytest.approx(expected, abs=1e-4))
        assert figures["precision"] == {"experts": counts, "predicted_error": plan.error}
        said = capsys.readouterr().out.splitlines()[0]
        fewer = 96 - counts["exact"]
        assert said.startswith(f"inexact by {flags[1]}: {fewer} of 96 experts in fewer bits (")
        assert all(f"{counts[name]} in {name}" in said for name in PRECISIONS[1:])
        assert f"predicted error {plan.error:.1e}" in said
    results = {}
    for name, words in (("default", ()), ("stated", ("--exact",))):
        code, results[name], figures = serve(tmp_path, *words)
        assert (code, figures["precision"]) == (0, "exact")
        assert "inexact" not in capsys.readouterr().out
    assert results["default"] == results["stated"] != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("content", "sentence"), [
    (None, "plan.json: No such file"),
    ("{}", "is not a file of precisions"),
    ("plan of 5 layers", "the plan of precisions is for (5, 16) layers and experts"),
])  # fmt: skip
@pytest.mark.parametrize("front", ["--requests", "--http"])
def test_bad_plans_are_one_sentence(
    front: str, content: str | None, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any rank starts, and before anything is said to be served."""
    path = tmp_path / "plan.json"
    if content == "plan of 5 layers":
        random_plan(path, 0, layers=5)
    elif content is not None:
        path.write_text(content)
    if front == "--http":
        flags = ["--http", "127.0.0.1:0", "--ranks", "2", "--precision", str(path)]
        code = main(["serve", str(tiny_moe_path()), *flags])
    else:
        code, *_ = serve(tmp_path, "--precision", str(path))
    captured = capsys.readouterr()
    assert code == 1
    assert sentence in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert "inexact" not in captured.out


def test_exact_and_a_plan_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both flags together are a question of usage."""
    assert serve(tmp_path, "--exact", "--precision", "plan.json")[0] == 2
    assert "not allowed with argument" in capsys.readouterr().err
