"""`moeplace ray solve`, `ray import` and `ray stats`: commands whose parts are tasks of a Ray cluster."""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from moeplace.launch.commands import import_trace, solve, stats

if TYPE_CHECKING:
    from moeplace.launch.on_ray.spread import RaySpread


def add_address(parser: argparse.ArgumentParser) -> None:
    """Which cluster."""
    group = parser.add_argument_group("Ray")
    group.add_argument(
        "--address", metavar="A", help='of the head; "local" = this process alone (default: $RAY_ADDRESS, or running)'
    )
    group.add_argument("--num-cpus", type=int, metavar="N", help="with --address local: CPUs (default: the machine's)")
    group.add_argument("--no-ship", action="store_true", help="the cluster has this package installed")


def add_solve(parser: argparse.ArgumentParser) -> None:
    solve.add_arguments(parser)
    _add_task_arguments(parser, "layer")


def add_import(parser: argparse.ArgumentParser) -> None:
    import_trace.add_arguments(parser)
    _add_task_arguments(parser, "recording")


def add_stats(parser: argparse.ArgumentParser) -> None:
    stats.add_score_arguments(parser)
    _add_task_arguments(parser, "recording")


def run_solve(args: argparse.Namespace) -> int:
    """`moeplace solve`, its layers on the cluster."""
    from moeplace.profiling.files import require_folder_of

    require_folder_of(args.out, args.json)
    with _spread(args) as args.spread:
        outcome = solve.run(args)
    if not args.spread.tasks:
        print("  note: this was solved here: layers depend on each other, or the solver takes them together")
    return outcome


def run_import(args: argparse.Namespace) -> int:
    """`moeplace import`, its recordings on the cluster."""
    from moeplace.profiling.files import require_folder_of

    require_folder_of(args.out)
    with _spread(args) as spread:
        args.elsewhere = spread.each
        return import_trace.run(args)


def run_stats(args: argparse.Namespace) -> int:
    """`moeplace stats`, its recordings on the cluster."""
    from pathlib import Path

    from moeplace.profiling.files import require_folder_of
    from moeplace.profiling.scores.recordings import count_file

    require_folder_of(args.json)
    recordings = [(number, path, str(Path(path).absolute())) for number, path in enumerate(args.traces)]
    with _spread(args) as spread:
        stats.report_recordings(args, (counts for _, counts in spread.each(count_file, args.seed, recordings)))
    return 0


def _add_task_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    add_address(parser)
    parser.set_defaults(task=what)
    parser.add_argument(
        f"--cpus-per-{what}", dest="cpus_per_task", type=float, default=1.0, metavar="N",
        help="CPUs to reserve for each (1)",
    )  # fmt: skip


@contextmanager
def _spread(args: argparse.Namespace) -> "Iterator[RaySpread]":
    """Where parts run; connected when there is something to spread."""
    from moeplace.launch.on_ray.cluster import connected, import_ray
    from moeplace.launch.on_ray.spread import RaySpread
    from moeplace.profiling.errors import InputError

    if args.cpus_per_task <= 0:
        raise InputError(f"--cpus-per-{args.task} ({args.cpus_per_task:g}) must be positive")
    import_ray()
    with ExitStack() as stack:
        cluster = connected(args.address, num_cpus=args.num_cpus, ship=not args.no_ship)
        yield RaySpread(lambda: stack.enter_context(cluster), cpus=args.cpus_per_task, what=args.task)
