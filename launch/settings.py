"""Settings: flags of a command from a TOML file and from the environment.

    max-sequences = 128                 MOEPLACE_SERVE_MAX_SEQUENCES=128         --max-sequences 128

The command line comes before the file, the file before the environment. They become words before those of the command
line, so that argparse checks all alike.
"""

import argparse
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import require_file

PREFIX = "MOEPLACE_SERVE_"
_CONFIG = "--config"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_NO_SETTINGS = ("help", "config", "verbose", "traceback")


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that names the file."""
    parser.add_argument(
        _CONFIG,
        metavar="F",
        help="TOML file of flags without their dashes; MOEPLACE_SERVE_... in the environment comes after it",
    )


def settings_as_words(
    parser: argparse.ArgumentParser, words: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """Words for what the file and the environment say, to stand before `words`.

    Args:
        parser: of the command.
        words: the command line behind the command's name.

    Raises:
        InputError: the file has a key that is no flag, or a value that a flag cannot have.
        FormatError: it is no TOML file.
    """
    actions = dict(_settable(parser))
    given = _read_file(words, environment, known=actions)
    found: list[str] = []
    for name, action in actions.items():
        variable = PREFIX + name.upper().replace("-", "_")
        if _is_excluded(parser, action, words):
            continue
        if name in given:
            found += _words_of(action, name, given[name], source=f"{name} in the configuration")
        elif variable in environment:
            found += _words_of(action, name, environment[variable], source=variable)
    return found


def _settable(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Name -> flag."""
    for action in parser._actions:  # argparse has no other way to ask
        names = [option[2:] for option in action.option_strings if option.startswith("--")]
        if names and names[0] not in _NO_SETTINGS:
            yield names[0], action


def _read_file(
    words: Sequence[str], environment: Mapping[str, str], *, known: Mapping[str, argparse.Action]
) -> dict[str, Any]:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(_CONFIG, default=environment.get(f"{PREFIX}CONFIG"))
    path = finder.parse_known_args(list(words))[0].config
    if path is None:
        return {}
    try:
        document = tomllib.loads(require_file(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not a TOML file: {error}") from error
    settings = {key.replace("_", "-"): value for key, value in document.items()}
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{path} has the key {key!r}, which is no flag of this command{hint}")
    return settings


def _is_excluded(parser: argparse.ArgumentParser, action: argparse.Action, words: Sequence[str]) -> bool:
    """Whether the command line has a flag that cannot stand beside this one."""
    said = {word.split("=")[0] for word in words}
    groups = (group._group_actions for group in parser._mutually_exclusive_groups)
    rivals = (other for group in groups if action in group for other in group if other is not action)
    return any(said & set(other.option_strings) for other in rivals)


def _words_of(action: argparse.Action, name: str, value: Any, *, source: str) -> list[str]:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        wanted = _truth(value, source)
        if wanted:
            return [f"--{name}"]
        return [f"--no-{name}"] if isinstance(action, argparse.BooleanOptionalAction) else []
    values = value if isinstance(value, list) else [value]
    if (len(values) != 1 and action.nargs is None) or any(isinstance(one, bool | dict | list) for one in values):
        raise InputError(f"{source} ({value!r}) must be a value such as --{name} takes")
    return [f"--{name}={values[0]}"] if action.nargs is None else [f"--{name}", *map(str, values)]


def _truth(value: Any, source: str) -> bool:
    word = str(value).lower()
    if isinstance(value, bool | str) and word in (*_TRUE, *_FALSE):
        return word in _TRUE
    raise InputError(f"{source} ({value!r}) must be true or false")
