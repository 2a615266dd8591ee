"""`moeplace bench precision`: experts in fewer bits, planned under a budget of bytes."""

import argparse
from pathlib import Path
from typing import Any

from moeplace.launch.commands.benchmarks.prompts import add_prompt_arguments, prompts_of
from moeplace.launch.progress import progress

HELP = "experts in fewer bits: precisions planned under budgets of bytes, predicted error beside measured logits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_prompt_arguments(parser)
    parser.add_argument(
        "--budgets", default="75,60,50,40,30", metavar="P,Q,...", help="bytes in percent of the exact experts' "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--placement", metavar="P", help="placement file: every rank has its own budget (one rank)")
    parser.add_argument("--sequences", type=int, default=8, metavar="N", help="to calibrate by, and to judge by (8)")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="tokens of a sequence (64)")
    parser.add_argument("--out", metavar="F", help="write the plan of the first budget to F")
    parser.add_argument("--json", metavar="F", help="write conditions and figures to F")


def run(args: argparse.Namespace) -> int:
    from moeplace.launch.benches.precision import PrecisionOptions, precision_bench
    from moeplace.launch.options.policy import budgets_of
    from moeplace.placement.placement_file import load_placement
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.files import require_folder_of, write_json

    require_folder_of(args.json, args.out)
    for name, least in (("sequences", 1), ("length", 8)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} ({getattr(args, name)}) must be at least {least}")
    model, found = prompts_of(args, length=args.length, count=2 * args.sequences)
    options = PrecisionOptions(
        model, found[: args.sequences], found[args.sequences :], budgets_of(args.budgets),
        load_placement(args.placement) if args.placement else None, Path(args.out) if args.out else None,
    )  # fmt: skip
    with progress("computing in fewer bits") as report:
        document = precision_bench(options, report=report)
    if args.json:
        write_json(args.json, document)
    print(format_report(document))
    return 0


def format_report(document: dict[str, Any]) -> str:
    """The figures as a table."""
    from moeplace.launch.tables import format_table

    names = document["conditions"]["precisions"]
    header = ("budget", "choice", "MB", *names, "predicted error", "proven >=", "logits off by", "same token")
    rows = [
        (
            f"{run['budget']:.0%}", run["choice"], run["bytes"] / 1e6, *(run["experts"][name] for name in names),
            f"{run['predicted_error']:.3e}", f"{run['lower_bound']:.3e}", f"{run['logit_error']:.2%}",
            f"{run['same_token']:.1%}",
        )
        for run in document["runs"]
    ]  # fmt: skip
    order = document["rank_correlation"]
    words = "" if order is None else f"\npredicted and measured errors order them with rank correlation {order:.2f}"
    return format_table(header, rows) + words
