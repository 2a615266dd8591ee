"""The command line: quick help, exit codes, one sentence for every mistake."""

import argparse
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeplace.launch.cli import COMMANDS, DONE, FAILED, USAGE, build_parser, main

HEAVY = ("torch", "ray", "transformers", "ortools", "pulp", "numba", "scipy", "networkx", "starlette", "uvicorn")
MOST_MODULES = 400
OPTIONAL = {
    "quickstart": ["--model"],
    "watch": ["--prompts"],
    "serve": ["--model", "--placement", "--requests", "--out"],
}
"""Options that the parser does not require: an input file with a default, one form of a command out of two."""

_HELP_SCRIPT = """
import contextlib, io, json, sys
from moeplace.launch.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps([codes, sorted(sys.modules)]))
"""


def parsers() -> Iterator[tuple[str, list[str], argparse.ArgumentParser]]:
    """(name, words, parser) of every command, and of every command inside a command."""
    for command, module in COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(f"moeplace.launch.commands.{module}").add_arguments(parser)
        nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not nested:
            yield command, [command], parser
        for action in nested:
            for name, inner in action.choices.items():
                yield f"{command} {name}", [command, name], inner


def required_arguments(parser: argparse.ArgumentParser, name: str, file: Path) -> list[str] | None:
    """The least a command accepts, with `file` for every input; None if it reads no file."""
    words, reads = [], False
    for action in parser._actions:
        if not action.required and not set(action.option_strings) & set(OPTIONAL.get(name, [])):
            continue
        output = "--out" in action.option_strings or "--json" in action.option_strings
        value = str(file.parent / "out") if output else _value(action, file)
        reads = reads or value == str(file)
        words += [*action.option_strings[-1:], value]
    return words if reads else None


def _value(action: argparse.Action, file: Path) -> str:
    if action.choices:
        return str(next(iter(action.choices)))
    return "2" if action.type in (int, float) else str(file)


@pytest.fixture(autouse=True)
def _keep_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` decides how warnings look; that must not outlive a test."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def test_help_imports_nothing_heavy() -> None:
    """`--help`, of the whole and of every command, answers before anything large is imported."""
    arguments = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    command = [sys.executable, "-c", _HELP_SCRIPT, json.dumps(arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    codes, modules = json.loads(run.stdout)
    assert codes == [DONE] * len(arguments)
    assert sorted(set(HEAVY) & set(modules)) == []
    assert len(modules) < MOST_MODULES


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_accepted(command: str) -> None:
    """What --help shows can be typed: the flags exist, and it is this command."""
    example = importlib.import_module(f"moeplace.launch.commands.{COMMANDS[command]}").EXAMPLE
    words = shlex.split(example)
    words = words[words.index("moeplace" if words[0] == "moeplace" else "moeplace.launch.cli") + 1 :]
    assert words[0] == command
    build_parser(words).parse_args(words)


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["stats"], ["stats", "t", "--unknown"]])
def test_usage_errors_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A missing or unknown command, argument or option."""
    assert main(arguments) == USAGE
    assert "usage: moeplace" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_line(command: str) -> None:
    """One line without a full stop, as `--help` lists it."""
    module = importlib.import_module(f"moeplace.launch.commands.{COMMANDS[command]}")
    assert module.HELP
    assert "\n" not in module.HELP
    assert not module.HELP.endswith(".")


@pytest.mark.parametrize("content", [None, b"", b"not what it should be \xff\x00"], ids=["absent", "empty", "foreign"])
@pytest.mark.parametrize(("name", "words", "parser"), [pytest.param(*p, id=p[0]) for p in parsers()])
def test_bad_input_is_one_sentence(
    name: str,
    words: list[str],
    parser: argparse.ArgumentParser,
    content: bytes | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A missing or foreign input file: exit 1, one line that names the file, no traceback, nothing written."""
    if name in ("ray import", "ray stats"):
        pytest.skip("reads its files on a cluster; tests/launch/on_ray has them")
    file = tmp_path / "input.file"
    if content is not None:
        file.write_bytes(content)
    arguments = required_arguments(parser, name, file)
    if arguments is None:
        pytest.skip("reads no file")
    assert main([*words, *arguments]) == FAILED
    error = capsys.readouterr().err.strip()
    assert error.startswith("moeplace: ")
    assert "\n" not in error
    assert "input.file" in error
    assert "internal error" not in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ([] if content is None else ["input.file"])


_CRASH = """
import sys
from moeplace.launch import cli
from moeplace.launch.commands import stats
def crash(args):
    import faulthandler
    faulthandler._sigsegv()
stats.run = crash
sys.exit(cli.main(["stats", "t.npz"]))
"""


def test_a_crash_below_python_says_where() -> None:
    """A command that dies of a signal, in a kernel or a driver, leaves the place on standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONFAULTHANDLER"}
    command = [sys.executable, "-c", _CRASH]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert run.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in run.stderr
    assert "in crash" in run.stderr


_BROKEN = """
import os, sys
from moeplace.launch import cli
from moeplace.launch.commands import stats
def broken(args):
    reader, writer = os.pipe()
    os.close(reader)
    os.write(writer, b"x")
def talk(args):
    while True:
        print("x" * 1000, flush=True)
stats.run = {name}
sys.exit(cli.main(["stats", "t.npz"]))
"""


def test_a_broken_pipe_is_silent_only_if_it_was_our_output() -> None:
    """A pipe to a helper that died is a failure to be told; a reader that left (`| head`) wants to hear no more."""
    command = [sys.executable, "-c", _BROKEN.format(name="broken")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert run.returncode == FAILED
    assert run.stderr == "moeplace: internal error: BrokenPipeError: [Errno 32] Broken pipe (--traceback shows where)\n"
    command = [sys.executable, "-c", _BROKEN.format(name="talk")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert "moeplace" not in process.stderr.read()
        assert process.wait(timeout=100) != DONE
