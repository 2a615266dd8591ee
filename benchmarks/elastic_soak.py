"""Long run of the elastic benchmark: seed after seed, all modes in turn, until a token differs or the time is over.

    python benchmarks/elastic_soak.py --hours 2 --out soak.jsonl
    python benchmarks/elastic_soak.py --coordinators 20 --ranks 2 --out soak.jsonl    all ranks, then the coordinator

One line of JSON per run: seed, mode and the figures of `moeplace bench elastic`. Exit 1 with the seed and the mode that
repeat the failure.
"""

import argparse
import json
import sys
import time
from itertools import count
from pathlib import Path

from moeplace.launch.benches.elastic import elastic_bench, require_undisturbed
from moeplace.launch.benches.elastic_load import ElasticJob
from moeplace.launch.benches.elastic_restarts import restart_bench
from moeplace.launch.quickstart.run import shipped
from moeplace.placement.modes import MODES
from moeplace.profiling.errors import MoeplaceError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1.0, metavar="H", help="begin no run after so long (1)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="seed of the first run (0)")
    parser.add_argument("--ranks", type=int, default=4, metavar="N", help="processes at the start (4)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="decode steps of a run, at least (300)")
    parser.add_argument("--changes", type=int, default=4, metavar="N", help="of each kind in a run (4)")
    parser.add_argument("--out", type=Path, required=True, metavar="F", help="JSON lines, appended to")
    parser.add_argument("--kill-alls", type=int, default=1, metavar="N", help="times that all ranks are killed (1)")
    parser.add_argument(
        "--coordinators", type=int, default=0, metavar="N", help="instead: kill all ranks and the coordinator N times"
    )
    args = parser.parse_args()
    if args.coordinators:
        return soak_coordinators(args)
    deadline = time.monotonic() + 3600 * args.hours
    for seed in count(args.first_seed):
        mode = MODES[seed % len(MODES)]
        changes = {
            **dict.fromkeys(("replacements", "joins", "leaves", "kills"), args.changes),
            "kill_alls": args.kill_alls,
        }
        job = ElasticJob(str(shipped("tiny-moe")), ranks=args.ranks, steps=args.steps, mode=mode, seed=seed, **changes)
        try:
            report = elastic_bench(job, timeout=1800.0)
            with args.out.open("a") as file:
                file.write(json.dumps({"seed": seed, "mode": mode, **report}) + "\n")
            require_undisturbed(report)
        except MoeplaceError as error:
            print(f"seed {seed}, mode {mode}: {error}", file=sys.stderr)
            return 1
        print(f"seed {seed}, mode {mode}: {report['requests']} requests, none lost, none changed")
        if time.monotonic() > deadline:
            return 0
    return 0


def soak_coordinators(args: argparse.Namespace) -> int:
    """Kill all ranks and the coordinator, as often as was said, and compare all tokens."""
    mode = MODES[args.first_seed % len(MODES)]
    job = ElasticJob(str(shipped("tiny-moe")), ranks=args.ranks, batch=16, mode=mode, seed=args.first_seed)
    try:
        report = restart_bench(job, rounds=args.coordinators, requests=16 * (args.coordinators + 1), timeout=600.0)
        with args.out.open("a") as file:
            file.write(json.dumps({"seed": args.first_seed, "mode": mode, **report}) + "\n")
        require_undisturbed(report)
    except MoeplaceError as error:
        print(f"seed {args.first_seed}, mode {mode}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
