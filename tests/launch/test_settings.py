"""Flags from a file and from the environment: as if they stood on the command line, which comes first."""

import argparse
from pathlib import Path

import pytest

from moeplace.launch.cli import main
from moeplace.launch.commands import serve
from moeplace.launch.settings import settings_as_words
from moeplace.profiling.errors import FormatError, InputError


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser


def parse(parser: argparse.ArgumentParser, *words: str, **environment: str) -> argparse.Namespace:
    """As `moeplace serve` does."""
    return parser.parse_args([*settings_as_words(parser, words, environment), *words])


def sample(action: argparse.Action) -> tuple[object, object]:
    """A value of a flag as a file has it, and as the flag gives it."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return True, True
    if action.choices:
        chosen = list(action.choices)[-1]
        return chosen, chosen
    if action.type in (int, float):
        return 7, action.type(7)  # type: ignore[operator]
    return "some -- thing", "some -- thing"


def test_every_flag_can_be_set(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    """By file and by environment alike; the names are those of the flags, with either dash."""
    path = tmp_path / "serve.toml"
    rivals = {"requests", "http"}
    actions = [action for action in parser._actions if action.option_strings and action.dest not in ("help", "config")]
    assert len(actions) > 40
    for action in actions:
        name = next(option for option in action.option_strings if option.startswith("--"))[2:]
        value, expected = sample(action)
        text = {True: "true"}.get(value, repr(value).replace("'", '"')) if value is True else repr(value)  # type: ignore[call-overload]
        path.write_text(f"{name.replace('-', '_')} = {text}\n")
        base = () if name in rivals else ("--http", ":0")
        assert getattr(parse(parser, "M", *base, "--config", str(path)), action.dest) == expected, name
        path.write_text(f"{name} = {text}\n")
        assert getattr(parse(parser, "M", *base, "--config", str(path)), action.dest) == expected, name
        variable = f"MOEPLACE_SERVE_{name.upper().replace('-', '_')}"
        assert getattr(parse(parser, "M", *base, **{variable: str(value)}), action.dest) == expected, name


def test_the_command_line_comes_first_then_the_file(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    """Also where a flag excludes one of the file."""
    path = tmp_path / "serve.toml"
    path.write_text('ranks = 3\nhttp = "127.0.0.1:1"\nverify = false\nadmin = false\n')
    environment = {"MOEPLACE_SERVE_RANKS": "2", "MOEPLACE_SERVE_MAX_RANKS": "9", "MOEPLACE_SERVE_CONFIG": str(path)}
    args = parse(parser, "M", **environment)
    assert (args.ranks, args.http, args.max_ranks, args.verify, args.admin) == (3, "127.0.0.1:1", 9, False, False)
    assert parse(parser, "M", "--ranks", "5", **environment).ranks == 5
    args = parse(parser, "M", "--requests", "in", **environment)
    assert (args.requests, args.http) == ("in", None)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("rank = 3", "'rank', which is no flag of this command; did you mean 'ranks'"),
        ("ranks = [1, 2]", "must be a value such as --ranks takes"),
        ("[serve]\nranks = 2", "'serve', which is no flag"),
        ("ranks = true", "must be a value such as --ranks takes"),
        ("admin = 3", "must be true or false"),
        ("ranks = ", "is not a TOML file"),
        ("\xff", "is not a TOML file"),
    ],
)
def test_bad_files_are_one_sentence(
    parser: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, sentence: str
) -> None:
    """Exit code 1; a value that the flag itself refuses is a usage error."""
    path = tmp_path / "serve.toml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises((InputError, FormatError)):
        parse(parser, "M", "--http", ":0", "--config", str(path))
    assert main(["serve", "M", "--http", ":0", "--config", str(path)]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "\n" not in error.strip()
    path.write_text('ranks = "many"\n')
    assert main(["serve", "M", "--http", ":0", "--config", str(path)]) == 2
    assert main(["serve", "M", "--http", ":0", "--config", str(tmp_path / "none")]) == 1
    assert main(["serve", "--http", ":0"]) == 2
