"""`moeplace quickstart`: the whole loop on the checkpoint that ships with the package."""

import argparse
from pathlib import Path

HELP = "profile, place and serve a small model on local ranks, and write a report"
EXAMPLE = "moeplace quickstart --out quickstart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the shipped one)")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="texts (default: shipped)")
    parser.add_argument("--out", type=Path, default=Path("quickstart"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument(
        "--time-limit", type=float, default=10.0, metavar="S", help="seconds of search per mode (default: %(default)s)"
    )
    parser.add_argument("--sequences-per-text", type=int, metavar="N", help="profile only N sequences of each text")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="served at once (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="per request (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="repetitions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run it."""
    from moeplace.launch.quickstart.run import QuickstartOptions, run_quickstart

    run_quickstart(
        QuickstartOptions(
            model=args.model,
            texts=tuple(args.text),
            out=args.out,
            ranks=args.ranks,
            time_limit=args.time_limit,
            seed=args.seed,
            requests=args.requests,
            new_tokens=args.new_tokens,
            rounds=args.rounds,
            sequences_per_text=args.sequences_per_text,
        )
    )
    return 0
