"""`moeplace bench`: benchmarks of the runtime and of solvers, one module each."""

import argparse
import importlib

HELP = "benchmarks: replay, elastic, offload and precision of the runtime, solve of the solvers"
EXAMPLE = "moeplace bench elastic --ranks 4 --steps 200 --json elastic.json"
BENCHMARKS = ("replay", "elastic", "offload", "precision", "solve")  # modules in moeplace.launch.commands.benchmarks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name in BENCHMARKS:
        module = importlib.import_module(f"moeplace.launch.commands.benchmarks.{name}")
        sub = subparsers.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(sub)
        sub.set_defaults(run_benchmark=module.run)


def run(args: argparse.Namespace) -> int:
    return int(args.run_benchmark(args))
