"""`moeplace serve`: requests from JSONL, completions to JSONL, one rank and several."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeplace.launch.cli import main
from moeplace.launch.commands import serve as command
from moeplace.launch.serving.front import _service_options
from moeplace.launch.serving.requests_file import read_requests
from moeplace.placement.placement_file import save_placement
from moeplace.profiling.errors import FormatError, InputError
from moeplace.runtime.engine import engine
from moeplace.runtime.engine.limits import EngineLimits
from tests.runtime.placements import random_placement
from tests.shared_data import ROOT, tiny_moe_path

REQUESTS = [
    {"id": "greedy", "prompt": "In the beginning", "max_new_tokens": 4},
    {"prompt": "import os", "temperature": 0.8, "seed": 3, "stop_ids": []},
    {"id": "ids", "token_ids": [5, 6, 7]},
]


def write_requests(folder: Path) -> Path:
    path = folder / "in.jsonl"
    path.write_text("\n".join(json.dumps(request) for request in REQUESTS) + "\n\n")
    return path


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


def test_requests_in_completions_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per request, in order, with text; the figures as JSON."""
    source, out, figures = write_requests(tmp_path), tmp_path / "out.jsonl", tmp_path / "f.json"
    options = ("--max-new-tokens", "6", "--dtype", "float32", "--json", str(figures))
    assert run_command(str(tiny_moe_path()), "--requests", str(source), "--out", str(out), *options) == 0
    completions = [json.loads(line) for line in out.read_text().splitlines()]
    assert [c["id"] for c in completions] == ["greedy", "2", "ids"]
    assert [len(c["token_ids"]) for c in completions] == [4, 6, 6]
    assert all(c["text"] and c["finish_reason"] == "length" for c in completions)
    report = json.loads(figures.read_text())
    assert (report["requests"], report["new_tokens"], report["ranks"]) == (3, 16, 1)
    assert "3 requests, 16 tokens" in capsys.readouterr().out


def torchrun(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """launch/serve.py on two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [str(ROOT / "launch" / "serve.py"), str(tiny_moe_path()), *arguments]
    return subprocess.run([*launcher, *script], capture_output=True, text=True, timeout=110, env=environment)


def test_two_ranks_under_torchrun_write_what_one_writes(tmp_path: Path) -> None:
    """The smoke test of the launch script: same file, exit code 0, rank 0 alone speaks."""
    source, placement = write_requests(tmp_path), tmp_path / "p.json"
    save_placement(placement, random_placement(6, 16, 2, seed=1, mode="coherent"))
    common = ("--requests", str(source), "--max-new-tokens", "6", "--dtype", "float32")
    done = torchrun(*common, "--out", str(tmp_path / "two.jsonl"), "--placement", str(placement))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 requests, 16 tokens") == 1
    run_command(str(tiny_moe_path()), *common, "--out", str(tmp_path / "one.jsonl"))
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


def test_flags_of_the_queue_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank, and what members of a service are told."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    made: list[EngineLimits] = []

    def note(**options: Any) -> None:
        made.append(options["limits"])

    monkeypatch.setattr(engine, "Engine", note)
    for words, alike in (((), 0), (("--alike", "5"), 5)):
        args = parser.parse_args((str(tiny_moe_path()), "--http", ":0", "--no-verify", *words))
        inputs = {"checkpoint": None, "placement": None, "recorded": None}
        command._make_engine(args, None, inputs)  # type: ignore[arg-type]
        assert made[-1].alike == alike
        assert _service_options(args).limits.alike == alike
    assert "alike" in _service_options(args).to_json()["limits"]


@pytest.mark.parametrize("words", [["--exact"], ["--alike", "2"]])
def test_a_folder_that_is_not_there_is_named(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not its tokenizer, which requests of text need first; nothing is written."""
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"prompt": "In"}\n')
    out = tmp_path / "out.jsonl"
    assert main(["serve", str(tmp_path / "nowhere"), "--requests", str(requests), "--out", str(out), *words]) == 1
    assert "no such checkpoint folder: " in capsys.readouterr().err
    assert not out.exists()


def test_bad_input_ends_every_rank(tmp_path: Path) -> None:
    """Rank 0 cannot read the requests: both ranks end with a sentence, torchrun with a code other than 0."""
    out = tmp_path / "out.jsonl"
    done = torchrun("--requests", str(tmp_path / "none.jsonl"), "--out", str(out))
    assert done.returncode != 0
    assert "no such file" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("line", "error", "sentence"),
    [
        ("{", FormatError, "line 1 is not a request"),
        ("[1]", FormatError, "a request must be an object"),
        ('{"prompt": "a", "tempature": 1}', InputError, "line 1: unknown key 'tempature'"),
        ('{"id": "a"}', InputError, "needs either prompt or token_ids"),
        ('{"token_ids": []}', InputError, "empty prompt"),
        ('{"token_ids": ["x"]}', FormatError, "line 1 is not a request"),
        ('{"token_ids": [1], "top_p": 2}', InputError, r"line 1: top_p \(2.0\)"),
        ("", FormatError, "has no requests"),
    ],
)
def test_bad_requests_are_refused(tmp_path: Path, line: str, error: type[Exception], sentence: str) -> None:
    """The sentence names the file, the line and the rule."""
    path = tmp_path / "in.jsonl"
    path.write_text(line)
    with pytest.raises(error, match=sentence):
        read_requests(path, list, max_new_tokens=1, seed=0)  # type: ignore[arg-type]
