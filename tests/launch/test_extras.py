"""What `pip install moeplace` gives without extras, and the sentence for each package that is missing."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from moeplace.profiling.extras import EXTRA_OF, MissingPackageError, missing_package
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.trace import RoutingTrace
from tests.shared_data import ROOT, text_paths, tiny_moe_path

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODEL = str(tiny_moe_path())


def names(requirements: list[str]) -> set[str]:
    """Package names of requirements, without moeplace itself."""
    return {re.split(r"[\[<>=!~; ]", one)[0].replace("-", "_") for one in requirements} - {"moeplace"}


def test_the_sentences_say_what_pyproject_says() -> None:
    """Each package belongs to the extra that brings it, every package of an extra is known, and none is in the core."""
    extras = PROJECT["optional-dependencies"]
    brought = {package: extra for extra in ("runtime", "exact", "serve", "ray") for package in names(extras[extra])}
    assert brought == EXTRA_OF
    assert not names(PROJECT["dependencies"]) & set(EXTRA_OF)
    error = missing_package("moeplace profile", ModuleNotFoundError(name="torch.nn"))
    assert isinstance(error, MissingPackageError)
    assert str(error) == "moeplace profile needs torch, which is not installed: pip install 'moeplace[runtime]'"
    assert missing_package("moeplace profile", ModuleNotFoundError(name="torchvision")) is None
    assert missing_package("moeplace profile", ModuleNotFoundError()) is None


def planner(folder: Path) -> list[list[str]]:
    """Every command of the planner once, on a small trace, and what it writes read by the next."""
    trace = RoutingTrace(
        np.random.default_rng(0).integers(0, 8, (320, 3, 1)).astype(np.int16),
        np.full(3, 8),
        sequence_ids=np.repeat(np.arange(16), 20),
    )
    save_trace(folder / "t.trace", trace)
    np.savez(folder / "t.npz", experts=trace.topk_ids)
    path, old, new = (str(folder / name) for name in ("t.trace", "old.json", "new.json"))
    ranks = ["--ranks", "4"]
    return [
        ["import", "--from", "npz", str(folder / "t.npz"), "--num-experts", "8", "--out", str(folder / "copy.trace")],
        ["stats", path],
        ["solve", path, *ranks, "--time-limit", "0.5", "--out", new],
        ["solve", path, *ranks, "--solver", "index-order", "--out", old],
        [
            "solve",
            path,
            *ranks,
            "--mode",
            "coherent",
            "--objective",
            "traffic",
            "--solver",
            "viterbi",
            "--out",
            str(folder / "v.json"),
        ],
        ["solve", path, *ranks, "--solver", "eplb", "--out", str(folder / "e.json")],
        ["evaluate", path, new],
        ["compare", path, *ranks, "--time-limit", "0.5"],
        ["report", path, "--placement", new, "--out", str(folder / "r.html")],
        ["plan", old, new, "--out", str(folder / "plan.json")],
        ["export", new, "--to", "sglang", "--out", str(folder / "sglang.json")],
        ["import-placement", "--from", "sglang", str(folder / "sglang.json"), "--out", str(folder / "back.json")],
    ]


def commands_that_need(package: str, folder: Path) -> list[tuple[str, list[str]]]:
    """(what the sentence names, words) for each use of a package."""
    trace, out = str(folder / "t.trace"), str(folder / "written.trace")
    serve = ["serve", MODEL, "--http", "127.0.0.1:0", "--ranks", "1"]
    text = str(text_paths()[0])
    if package in ("starlette", "uvicorn", "prometheus_client"):
        return [("moeplace serve --http", serve)]
    if package == "ray":
        submit = ["ray", "submit", "--", "solve", trace]
        return [
            ("moeplace ray", submit),
            ("moeplace ray", ["ray", "compare", trace, "--ranks", "4"]),
            ("moeplace ray", ["ray", "stats", trace]),
            ("moeplace ray", ["ray", "import", trace, "--from", "npz", "--out", "t"]),
        ]
    solve = ["solve", trace, "--ranks", "4", "--out", out, "--solver"]
    if package == "ortools":
        return [(f"solver {name}", [*solve, name]) for name in ("cp-sat", "exflow-ilp", "moetuner-ilp")]
    if package == "pulp":
        return [(f"solver {name}", [*solve, name]) for name in ("exflow-ilp", "moetuner-ilp")]
    uses = [
        ("moeplace profile", ["profile", MODEL, "--text", text, "--out", out]),
        ("moeplace serve", serve),
        ("moeplace quickstart", ["quickstart", "--out", str(folder / "quickstart")]),
    ]
    if package == "torch":
        uses += [(f"moeplace {name}", [*name.split(), *more]) for name, more in RUNS.items()]
    return uses


RUNS = {"calibrate": ["--out", "none.json"], "bench": ["elastic", "--steps", "2"]}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[list[str], int, str]]]:
    """Hidden package, or "all" -> (words, exit code, standard error) of its commands."""
    folder = tmp_path_factory.mktemp("extras")
    asked = {"all": planner(folder)} | {
        package: [words for _, words in commands_that_need(package, folder)] for package in EXTRA_OF
    }
    order = sorted(asked, key=lambda name: name not in ("all", "torch"))  # those without torch are answered first
    jobs = [{"hidden": list(EXTRA_OF) if name == "all" else [name], "commands": asked[name]} for name in order]
    command = [sys.executable, "-m", "tests.launch.hidden_packages", json.dumps(jobs)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stderr
    return {
        name: [(words, *result) for words, result in zip(asked[name], results, strict=True)]
        for name, results in zip(order, json.loads(run.stdout), strict=True)
    }


def test_the_planner_needs_no_extra(answers: dict[str, list[tuple[list[str], int, str]]]) -> None:
    """From an imported trace to an engine's file with every package of the extras hidden."""
    assert [(words, error) for words, code, error in answers["all"] if code] == []


@pytest.mark.parametrize("package", EXTRA_OF)
def test_a_missing_package_is_one_sentence(
    package: str, answers: dict[str, list[tuple[list[str], int, str]]], tmp_path: Path
) -> None:
    """What needs it, what is missing, and what to install."""
    named = [what for what, _ in commands_that_need(package, tmp_path)]
    for what, (words, code, error) in zip(named, answers[package], strict=True):
        sentence = f"{what} needs {package}, which is not installed: pip install 'moeplace[{EXTRA_OF[package]}]'\n"
        assert (words, code, error) == (words, 1, f"moeplace: {sentence}")
