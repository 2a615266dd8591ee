"""`moeplace import`: other programs' traces and loads."""

import argparse

HELP = "read other programs' routing traces and expert loads"
SOURCES = ("npz", "sglang", "vllm", "trtllm", "exflow", "load")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help="what to read")
    parser.add_argument("--from", dest="source_format", required=True, choices=SOURCES, help="format of FILE")
    parser.add_argument("--out", required=True, metavar="T", help="trace file (or load file) to write")


def run(args: argparse.Namespace) -> int:
    from moeplace.profiling.import_npz import import_npz

    import_npz(args.source, args.out)
    return 0
