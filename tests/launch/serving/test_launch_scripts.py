"""The launch scripts: valid shell, flags that exist, a usage text, and the local one from end to end."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.run import get_args_parser

from moeplace.launch.cli import build_parser
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.trace import RoutingTrace
from tests.shared_data import ROOT, tiny_moe_path

SCRIPTS = sorted(path.name for pattern in ("*.sh", "*.sbatch") for path in (ROOT / "launch" / "scripts").glob(pattern))
TORCHRUN_ONLY = "-m torch.distributed.run"
COMMAND = "-m moeplace.launch.cli"


def lines(script: str) -> Iterator[str]:
    """Commands without comments, continued lines joined."""
    text = (ROOT / "launch" / "scripts" / script).read_text().replace("\\\n", " ")
    return (line for line in text.splitlines() if not line.lstrip().startswith("#"))


def flags(words: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", words))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_shell(script: str) -> None:
    """And the shell's own linter has nothing to say, where it is installed."""
    path = ROOT / "launch" / "scripts" / script
    assert path.read_text().startswith("#!/usr/bin/env bash\n# ")
    assert subprocess.run(["bash", "-n", path], timeout=20).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", path], timeout=60).returncode == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_exist(script: str) -> None:
    """What a script passes to `moeplace` and to torchrun is in their --help."""
    found = 0
    for line in lines(script):
        launcher, _, command = line.partition(COMMAND)
        for part in command.split(" -- ") if command else ():  # a command may submit another one
            words = part.split()
            assert flags(part) <= known_flags(build_parser(words[:1]), words), line
            found += 1
        if TORCHRUN_ONLY in launcher:
            known = set(get_args_parser()._option_string_actions)
            assert flags(launcher.partition(TORCHRUN_ONLY)[2]) <= known, line
    assert found


def known_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """Options of the innermost command that `words` begin with."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if nested:
        return known_flags(nested[0].choices[words[0]], words[1:])
    return set(parser._option_string_actions)


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_arguments_show_the_usage(script: str) -> None:
    """Exit code 2, and the comment on top of the script."""
    run = subprocess.run(["bash", ROOT / "launch" / "scripts" / script], capture_output=True, text=True, timeout=20)
    assert run.returncode == 2
    assert f"launch/scripts/{script}" in run.stderr
    assert not re.search("^#", run.stderr, re.MULTILINE)
    assert "set -euo" not in run.stderr


def test_local_script(tmp_path: Path) -> None:
    """From a trace to completions on two ranks."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 16, (400, 6, 1)).astype(np.int16)
    save_trace(tmp_path / "t.trace", RoutingTrace(ids, np.full(6, 16), sequence_ids=np.repeat(np.arange(20), 20)))
    (tmp_path / "in.jsonl").write_text('{"prompt": "In the beginning", "max_new_tokens": 4}\n')
    words = [tiny_moe_path(), tmp_path / "t.trace", tmp_path / "in.jsonl", tmp_path / "out"]
    environment = {**os.environ, "PYTHON": sys.executable, "RANKS": "2", "TIME_LIMIT": "1"}
    run = subprocess.run(
        ["bash", ROOT / "launch" / "scripts" / "local.sh", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "out" / "placement.json").read_text())["num_ranks"] == 2
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["ranks"] == 2
    assert len((tmp_path / "out" / "completions.jsonl").read_text().splitlines()) == 1
