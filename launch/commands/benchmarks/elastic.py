"""`moeplace bench elastic`: ranks join, leave and die, experts move, and requests are served meanwhile."""

import argparse
from pathlib import Path
from typing import Any

from moeplace.placement.modes import MODES

HELP = "change the ranks and the placement of a running service and compare all tokens"
COLUMNS = ("requests", "lost", "changed", "median_step_seconds", "worst_step_ratio", "worst_step_ratio_quiet",
           "p99_step_ratio", "p99_step_ratio_quiet", "throughput_ratio",
           "seconds_from_kill_to_token", "bytes_moved", "bytes_lower_bound")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the shipped one)")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="processes on this machine (4)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="decode steps (200)")
    parser.add_argument("--replacements", type=int, default=5, metavar="N", help="at random moments (5)")
    parser.add_argument("--joins", type=int, default=0, metavar="N", help="ranks that join (0)")
    parser.add_argument("--leaves", type=int, default=0, metavar="N", help="ranks that leave, any of them (0)")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="ranks killed, and replaced by new ones (0)")
    parser.add_argument("--kill-alls", type=int, default=0, metavar="N", help="times that all ranks are killed (0)")
    parser.add_argument("--share", type=float, default=0.25, metavar="X", help="of all slots, changed each time (0.25)")
    parser.add_argument("--batch", type=int, default=32, metavar="B", help="sequences in flight (32)")
    parser.add_argument("--mode", choices=MODES, default="dispatch-combine")
    parser.add_argument(
        "--bytes-per-step", type=int, default=1 << 16, metavar="N", help="that a rank sends between steps (65536)"
    )
    parser.add_argument(
        "--fast-slots",
        type=int,
        metavar="N",
        help="experts per layer that fast memory holds; the rest is fetched (all)",
    )
    parser.add_argument("--staging-rows", type=int, default=1, metavar="N", help="experts a rank can stage (1)")
    parser.add_argument(
        "--probe-tokens", type=int, default=0, metavar="N", help="whose logits are compared at every switch (0)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of requests, placements and moments")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds for everything (600)")
    parser.add_argument("--json", metavar="F", help="write the figures to F")


def run(args: argparse.Namespace) -> int:
    from moeplace.launch.benches.elastic import elastic_bench, require_undisturbed
    from moeplace.profiling.files import write_json

    report = elastic_bench(_job(args), timeout=args.timeout)
    if args.json:
        write_json(args.json, report)
    print(format_report(report))
    require_undisturbed(report)
    return 0


def _job(args: argparse.Namespace) -> Any:
    from moeplace.launch.benches.elastic_load import ElasticJob
    from moeplace.launch.quickstart.run import shipped

    return ElasticJob(
        model=str(args.model or shipped("tiny-moe")),
        ranks=args.ranks,
        steps=args.steps,
        replacements=args.replacements,
        joins=args.joins,
        leaves=args.leaves,
        kills=args.kills,
        kill_alls=args.kill_alls,
        share=args.share,
        batch=args.batch,
        bytes_per_step=args.bytes_per_step,
        staging_rows=args.staging_rows,
        fast_slots=args.fast_slots,
        probe_tokens=args.probe_tokens,
        mode=args.mode,
        seed=args.seed,
    )


def format_report(report: dict[str, Any]) -> str:
    """The figures as a table, one per line."""
    from moeplace.launch.tables import format_table

    events = ", ".join(f"{count} {name}" for name, count in report["events"].items())
    table = format_table(("figure", "value"), [(name.replace("_", " "), report[name]) for name in COLUMNS])
    return f"{table}\n{events}; {report['steps_moving']} steps during re-placements, {report['steps_quiet']} others"
