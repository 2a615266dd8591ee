"""Every figure of README and `docs/comparison.md`, measured again and written again, by one command on a quiet machine.

    python benchmarks/renew_results.py --trace routing.npz            # all parts, about half an hour on 2 cores
    python benchmarks/renew_results.py --trace routing.npz solver elastic --seeds 0 1 2
    python benchmarks/renew_results.py --draft                        # seconds instead of minutes; writes no page

    solver      placements of DeepSeek-V2-Lite's recorded routing, each instance with every seed
    replay      recorded routing between two emulated hosts (root, `ip` and `tc`)
    elastic     a service whose ranks join, leave and are killed
    quickstart  the output of `moeplace quickstart`

What is measured goes to `benchmarks/results/figures.json`, part by part; the tables of README, of `docs/comparison.md`
and of a dated page in `benchmarks/results` are written from that file (`--render` does only this). A figure is the
median over seeds with the least and the greatest beside it; its flags, its replica rule and its goal stand in its row.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import result_pages

ROOT = Path(__file__).resolve().parent.parent
CLI = [sys.executable, "-m", "moeplace.launch.cli"]
QUIET_LOAD = 0.7
"""Load average above which the machine is not taken for quiet."""


@dataclass(frozen=True)
class Instance:
    """A placement problem on the recorded trace.

    Attributes:
        name: of its row.
        flags: of `moeplace solve`, beside seed and limit.
        top_k: experts of a token to keep, None = all.
        figures: names in the evidence that the row shows.
        goal: what was aimed at, for each figure that has an aim.
    """

    name: str
    flags: str
    figures: tuple[str, ...]
    goal: tuple[float, ...]
    top_k: int | None = None


RANKS, NODES = ("ranks_per_token", "imbalance_mean"), ("nodes_per_token", "ranks_per_token", "imbalance_mean")
INSTANCES = (
    Instance("8 ranks", "--ranks 8 --max-imbalance 1.01", RANKS, (3.50, 1.060)),
    Instance("4 ranks", "--ranks 4 --max-imbalance 1.01", RANKS, (2.56, 1.035)),
    Instance("2 nodes x 4 ranks", "--ranks 8 --ranks-per-node 4 --max-imbalance 1.01", NODES, (1.72, 3.60, 1.065)),
    Instance("72 slots on 8 ranks", "--ranks 8 --slots-per-rank 9 --max-imbalance 1.05", RANKS, (3.15, 1.05)),
    Instance(
        "primary expert, coherent, 8 ranks",
        "--ranks 8 --mode coherent --max-imbalance 1.02",
        ("stay_rate", "imbalance_mean"),
        (0.51, 1.18),
        top_k=1,
    ),
    Instance(
        "primary expert, coherent, 4 ranks",
        "--ranks 4 --mode coherent --max-imbalance 1.01",
        ("stay_rate", "imbalance_mean"),
        (0.63, 1.08),
        top_k=1,
    ),
    Instance(
        "top-6, coherent, 8 ranks",
        "--ranks 8 --mode coherent --max-imbalance 1.02",
        ("copies_per_token", "imbalance_mean"),
        (5.0,),
    ),
)
ELASTIC = "--ranks 4 --steps 1000 --replacements 20 --joins 4 --leaves 4 --kills 4"
REPLAYS = {
    1: ("coherent", "index-order:dispatch-combine,{placement}:coherent", 15, 1.85),
    6: ("dispatch-combine", "index-order:dispatch-combine/plain,index-order:dispatch-combine/node-aware,"
        "{placement}:dispatch-combine/node-aware", 9, 1.65),
}  # fmt: skip
"""Top-k -> mode to solve for (by the default objective), runs, timed steps, goal of the last run's speedup."""


@dataclass(frozen=True)
class Job:
    """What to measure with.

    Attributes:
        folder: for traces, placements and reports.
        seeds: one run each.
        seconds: limit of a search.
        draft: as little work as shows that everything runs.
    """

    folder: Path
    seeds: tuple[int, ...]
    seconds: float
    draft: bool

    def trace(self, top_k: int | None) -> Path:
        """The imported trace with K experts a token."""
        path = self.folder / f"top-{top_k or 'all'}.trace"
        if not path.exists():
            keep = [] if top_k is None else ["--top-k", str(top_k)]
            source = str(self.folder / "routing.npz")
            moeplace("import", source, "--from", "npz", "--num-experts", "64", *keep, "--out", str(path))
        return path


def moeplace(*words: str) -> str:
    """Standard output of a command of ours; ends with its sentence where it fails."""
    return run([*CLI, *words])


def run(command: Sequence[str]) -> str:
    print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(f"renew_results.py: {shlex.join(command)} failed with {done.returncode}: {done.stderr.strip()[-600:]}")
    return done.stdout


def measure_solver(job: Job) -> dict[str, Any]:
    """Every instance with every seed; baselines once, for they have no seed."""
    rows = []
    for instance in INSTANCES[:1] if job.draft else INSTANCES:
        trace = str(job.trace(instance.top_k))
        flags = f"{instance.flags} --objective traffic --time-limit {job.seconds:g}"
        results = [solve(job, trace, f"{flags} --seed {seed}") for seed in job.seeds]
        baselines = {"index order": results[0]["evidence"]["index_order"]}
        if "coherent" not in flags:
            baselines["EPLB"] = solve(job, trace, f"{flags} --solver eplb")["evidence"]
        rows.append(
            {
                "name": instance.name, "flags": flags, "figures": instance.figures, "goal": instance.goal,
                "solved": [result["evidence"] for result in results], "baselines": baselines,
                "solver": [result["solver"] for result in results],
            }
        )  # fmt: skip
    return {"rows": rows, "loads": measure_loads(job)}


def solve(job: Job, trace: str, flags: str) -> dict[str, Any]:
    """The JSON of `moeplace solve`."""
    path = job.folder / "solve.json"
    moeplace("solve", trace, *shlex.split(flags), "--json", str(path))
    return json.loads(path.read_text())


def measure_loads(job: Job) -> list[dict[str, Any]]:
    """Packing of Zipf loads, and its repair after a drift: imbalance and seconds."""
    import solver_figures

    rows = solver_figures.on_loads()
    return [{"name": str(row[0]).strip(), "imbalance": row[5], "seconds": row[-1]} for row in rows]


def measure_elastic(job: Job) -> dict[str, Any]:
    """`bench elastic` in the mode of engines with every seed, and once in the coherent one."""
    flags = "--ranks 2 --steps 60 --replacements 1 --joins 1 --leaves 1 --kills 1" if job.draft else ELASTIC
    asked = [(mode, seed) for mode in ("dispatch-combine", "coherent") for seed in job.seeds]
    found = []
    for mode, seed in asked[:1] if job.draft else asked:
        path = job.folder / "elastic.json"
        moeplace("bench", "elastic", *shlex.split(flags), "--mode", mode, "--seed", str(seed), "--json", str(path))
        found.append({"mode": mode, "seed": seed, **json.loads(path.read_text())})
    return {"flags": flags, "runs": found, "goal": {"worst_step_ratio": 1.5}}


def measure_replay(job: Job) -> dict[str, Any] | None:
    """Top-1 and top-6 between two emulated hosts, every seed; None where hosts cannot be emulated."""
    if os.geteuid() != 0:
        print("renew_results.py: replay is left out, emulated hosts need root", file=sys.stderr)
        return None
    emulated = [sys.executable, "benchmarks/emulated_cluster.py", "--hosts", "2", "--ranks-per-host", "2", "--rate"]
    found = []
    for top_k, (mode, runs, steps, goal) in REPLAYS.items():
        trace, placement = str(job.trace(None if top_k == 6 else top_k)), str(job.folder / f"replay-{top_k}.json")
        flags = f"--ranks 4 --ranks-per-node 2 --mode {mode} --time-limit {job.seconds:g}"
        moeplace("solve", trace, *shlex.split(flags), "--out", placement)
        for seed in job.seeds:
            path = job.folder / "replay.json"
            words = ["bench", "replay", trace, "--runs", runs.format(placement=placement), "--seed", str(seed)]
            words += ["--steps", str(3 if job.draft else steps), "--json", str(path)]
            run([*emulated, "200mbit", "--", "-m", "moeplace.launch.cli", *words])
            found.append({"top_k": top_k, "seed": seed, "solve": flags, "goal": goal, **json.loads(path.read_text())})
    return {"runs": found, "link": "200 Mbit/s each way", "hosts": 2}


def measure_quickstart(job: Job) -> dict[str, Any]:
    """What `moeplace quickstart` prints, without the line that says where it wrote."""
    small = ["--ranks", "2", "--time-limit", "1", "--requests", "8", "--sequences-per-text", "16"] if job.draft else []
    command = [*CLI, "quickstart", "--out", str(job.folder / "quickstart"), *small]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    steps = [line for line in done.stderr.splitlines() if line.startswith("[")]
    text = "\n".join([*steps, "", done.stdout.strip("\n")]).replace(str(job.folder) + "/", "")
    return {"output": text}


PARTS: dict[str, Callable[[Job], dict[str, Any] | None]] = {
    "solver": measure_solver, "replay": measure_replay, "elastic": measure_elastic, "quickstart": measure_quickstart,
}  # fmt: skip
NEEDS_TRACE = ("solver", "replay")


def conditions(job: Job) -> dict[str, Any]:
    """Of the machine and of what ran on it."""
    import numba
    import numpy
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "cores": os.cpu_count(), "python": platform.python_version(),
        "numpy": numpy.__version__, "numba": numba.__version__, "torch": torch.__version__,
        "commit": commit.stdout.strip(), "seeds": list(job.seeds), "time_limit": job.seconds,
        "load_before": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    parser.add_argument("--trace", type=Path, help="routing.npz of DeepSeek-V2-Lite; solver and replay need it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--time-limit", type=float, default=30.0, metavar="S", help="of each search (30)")
    parser.add_argument("--figures", type=Path, default=ROOT / "benchmarks/results/figures.json", metavar="F")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the pages from F")
    parser.add_argument("--draft", action="store_true", help="one seed, seconds of search; print, write no page")
    parser.add_argument("--anyway", action="store_true", help="measure on a machine that is not quiet")
    args = parser.parse_args()
    unknown = sorted(set(args.parts) - set(PARTS))
    if unknown:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    args.parts = args.parts or [part for part in PARTS if args.trace or part not in NEEDS_TRACE]
    if not args.trace and set(args.parts) & set(NEEDS_TRACE) and not args.render:
        parser.error(f"--trace is needed for {', '.join(sorted(set(args.parts) & set(NEEDS_TRACE)))}")
    load = os.getloadavg()[0]
    if load > QUIET_LOAD and not (args.anyway or args.draft or args.render):
        parser.error(f"the machine is not quiet: load average {load:.1f} > {QUIET_LOAD:g}; wait, or say --anyway")
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of the parts, with the conditions of each; other parts stay as they were."""
    figures = json.loads(args.figures.read_text()) if args.figures.exists() and not args.draft else {}
    with tempfile.TemporaryDirectory(prefix="moeplace-results-") as folder:
        seeds = tuple(args.seeds[:1] if args.draft else args.seeds)
        job = Job(Path(folder), seeds, 1.0 if args.draft else args.time_limit, args.draft)
        if args.trace:
            (job.folder / "routing.npz").symlink_to(args.trace.resolve())
        run([sys.executable, "-m", "moeplace.placement.warm_up"])
        for part in args.parts:
            known, started = conditions(job), time.monotonic()
            found = PARTS[part](job)
            if found is not None:
                known["minutes"] = round((time.monotonic() - started) / 60, 1)
                figures[part] = {"conditions": known, **found}
            if not args.draft:
                args.figures.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def main() -> None:
    """Measure, then write."""
    args = parse_arguments()
    figures = json.loads(args.figures.read_text()) if args.render else measure(args)
    if args.draft:
        print("\n\n".join(result_pages.tables(figures)))
        return
    for path in result_pages.write_pages(ROOT, figures):
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
