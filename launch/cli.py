"""The command `moeplace`: one module of `moeplace.launch.commands` per subcommand.

Only the parser is built here. A command module has `HELP`, `EXAMPLE`, `add_arguments(parser)` and
`run(args) -> exit code`, and imports what is heavy (torch, Ray, transformers, ortools, numba) inside `run`, so that
`--help` answers at once. One that has `HAS_SETTINGS` takes its flags from a file and from the environment too.
"""

import argparse
import contextlib
import faulthandler
import importlib
import logging
import os
import select
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS = {  # name -> module in moeplace.launch.commands, in the order of --help
    "quickstart": "quickstart",
    "profile": "profile",
    "import": "import_trace",
    "stats": "stats",
    "solve": "solve",
    "evaluate": "evaluate",
    "verify": "verify",
    "compare": "compare",
    "report": "report",
    "plan": "plan",
    "export": "export",
    "import-placement": "import_placement",
    "watch": "watch",
    "serve": "serve",
    "ray": "ray_jobs",
    "calibrate": "calibrate",
    "bench": "bench",
}
DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 = done, 1 = failed or infeasible, 2 = usage, 130 = interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with_settings = _add_settings(arguments)
        args = build_parser(with_settings).parse_args(with_settings)
    except SystemExit as stop:  # argparse has printed already
        return int(stop.code or 0)
    except ValueError as error:  # of `_add_settings`: a file that is none, or a value that no flag can have
        print(f"moeplace: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    _watch_for_crashes()
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    warnings.showwarning = _show_warning
    from moeplace.profiling.errors import MoeplaceError
    from moeplace.profiling.extras import missing_package

    try:
        return int(args.run(args))
    except SystemExit as stop:  # options that do not go together: argparse has printed already
        return int(stop.code or 0)
    except MoeplaceError as error:
        return _fail(args, str(error))
    except ModuleNotFoundError as error:
        missing = missing_package(f"moeplace {args.command}", error)
        return _fail(args, str(missing) if missing else _defect(error))
    except KeyboardInterrupt:
        print("moeplace: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError as error:
        if not _reader_gone():
            return _fail(args, _defect(error))
        sys.stderr.close()  # nothing to say to it
        return FAILED
    except MemoryError:
        return _fail(args, "out of memory")
    except OSError as error:
        return _fail(args, f"{error.filename or 'system'}: {error.strerror or error}")
    except Exception as error:  # a defect of ours: still one sentence, the rest on request
        return _fail(args, _defect(error))


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the subcommands that `arguments` names, or all of them."""
    parser = argparse.ArgumentParser(
        prog="moeplace",
        description="Placement compiler for serving Mixture-of-Experts models.",
    )
    parser.add_argument("--version", action="version", version=f"moeplace {version('moeplace')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    named = [name for name in COMMANDS if name in arguments]
    for name in named or COMMANDS:  # only what is asked for is imported; plain --help shows them all
        module = importlib.import_module(f"moeplace.launch.commands.{COMMANDS[name]}")
        epilog = f"example: {module.EXAMPLE}"
        sub = subparsers.add_parser(name, help=module.HELP, description=module.HELP, epilog=epilog)
        module.add_arguments(sub)
        sub.add_argument("--verbose", action="store_true", help="say more on standard error")
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        sub.set_defaults(run=module.run, argv=tuple(arguments))
    return parser


def _add_settings(arguments: list[str]) -> list[str]:
    """The command line, with what a file and the environment say in front of its flags, where the command has that."""
    if not arguments or arguments[0] not in COMMANDS:
        return arguments
    module = importlib.import_module(f"moeplace.launch.commands.{COMMANDS[arguments[0]]}")
    if not getattr(module, "HAS_SETTINGS", False):
        return arguments
    from moeplace.launch.settings import settings_as_words

    parser = argparse.ArgumentParser(add_help=False)
    module.add_arguments(parser)
    return [arguments[0], *settings_as_words(parser, arguments[1:], os.environ), *arguments[1:]]


def _watch_for_crashes() -> None:
    """A crash below Python (kernels, solvers, drivers) writes where each thread was instead of ending in silence."""
    if not faulthandler.is_enabled():
        with contextlib.suppress(AttributeError, OSError, ValueError):  # standard error may be closed, or no file
            faulthandler.enable(sys.stderr)


def _reader_gone() -> bool:
    """Whether the reader of our output went away; else it was another pipe that broke."""
    poll = select.poll()
    try:
        for stream in (sys.stdout, sys.stderr):
            poll.register(stream.fileno(), 0)
    except (AttributeError, OSError, ValueError):  # closed, or no file
        return False
    return bool(poll.poll(0))


def _fail(args: argparse.Namespace, sentence: str) -> int:
    if args.traceback:
        traceback.print_exc()
    print(f"moeplace: {' '.join(sentence.split())}", file=sys.stderr)
    return FAILED


def _defect(error: Exception) -> str:
    return f"internal error: {type(error).__name__}: {error} (--traceback shows where)"


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if category.__name__ == "MoeplaceWarning":
        print(f"moeplace: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
