"""What a member costs that is forked, against one that is a program of its own: seconds, processor seconds, memory.

    python benchmarks/member_starts.py [MODEL] [--ranks 2] [--joins 3] [--repeats 3] [--json F]

Services of both kinds, in alternation: each starts, and then takes in one rank after the other. Printed are medians:
seconds until it serves, seconds of a join (from the order until the newcomer serves), processor seconds of all
processes below the coordinator from start to end, and the memory that a rank adds (PSS, MB: what is shared is counted
in parts).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from moeplace.profiling.errors import MoeplaceError
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.options import ServiceOptions
from moeplace.runtime.service.spawner import LocalSpawner

SHIPPED = Path(__file__).resolve().parent.parent / "launch" / "data" / "tiny-moe"
PATIENCE = 300.0
KINDS = {"programs": False, "forks": True}


def memory(pid: int) -> float:
    """Proportional set size of a process, MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def below() -> float:
    """Processor seconds of children that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def measure(model: str, *, forks: bool, ranks: int, joins: int) -> dict[str, float]:
    """One service from start to end."""
    before, begin, joined = below(), time.perf_counter(), []
    spawner = LocalSpawner(forks=forks)
    with Coordinator(model, ranks=ranks, spawner=spawner, options=ServiceOptions(device="cpu")) as service:
        service.wait_until_serving(timeout=PATIENCE)
        started = time.perf_counter() - begin
        for width in range(ranks + 1, ranks + joins + 1):
            ordered = time.perf_counter()
            service.scale(width)
            if not service.wait_for(lambda status, n=width: len(status.active) == n, timeout=PATIENCE):  # type: ignore[misc]
                raise SystemExit(f"rank {width} did not join: {service.events()}")
            joined.append(time.perf_counter() - ordered)
        held = [memory(service.member(member).pid) for member in service.status().active]
    return {
        "seconds_to_serve": started,
        "seconds_to_join": statistics.median(joined),
        "processor_seconds": below() - before,
        "rank_mb": statistics.median(held),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--joins", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json")
    args = parser.parse_args()
    if min(args.ranks, args.joins, args.repeats) < 1:
        parser.error("--ranks, --joins and --repeats must be at least 1")
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    try:
        for _ in range(args.repeats):
            for kind, forks in KINDS.items():
                found[kind].append(measure(args.model, forks=forks, ranks=args.ranks, joins=args.joins))
    except MoeplaceError as error:
        raise SystemExit(f"member_starts.py: {error}") from None
    names = list(found["forks"][0])
    print("".join(f"{name:>20}" for name in ("", *names)))
    for kind, rows in found.items():
        medians = (statistics.median(row[name] for row in rows) for name in names)
        print(f"{kind:>20}" + "".join(f"{value:20.2f}" for value in medians))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
