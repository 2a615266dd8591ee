"""`moeplace ray`: sweeps and services on a Ray cluster, other commands as its jobs or with their parts as its tasks."""

import argparse
from typing import Any

from moeplace.launch.commands import ray_parts
from moeplace.launch.options.problem import add_cluster_arguments, add_problem_arguments, split_sides
from moeplace.launch.options.replanning import add_replan_arguments, check_replan_arguments
from moeplace.launch.progress import progress
from moeplace.launch.serving.front import serve_http, start_coordinator
from moeplace.launch.serving.front_arguments import (
    add_engine_arguments,
    add_front_arguments,
    check_trace_arguments,
)
from moeplace.launch.solving.runs import DEFAULT_SOLVERS, print_rows, solvers_and_caps

HELP = "on a Ray cluster: submit commands as jobs; import, count, compare and solve in parallel; serve"
EXAMPLE = "moeplace ray compare t.trace --ranks 8 --address local --num-cpus 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="ray_command", metavar="COMMAND", required=True)
    for name, text, add, run_command in (
        ("submit", "run a command of moeplace as a job of a cluster", _add_submit, _submit),
        ("compare", "moeplace compare, one task per instance", _add_compare, _compare),
        (
            "solve",
            "moeplace solve, one task per MoE layer: the same placement, sooner",
            ray_parts.add_solve,
            ray_parts.run_solve,
        ),
        (
            "import",
            "moeplace import, one task per recording: one trace of all of them",
            ray_parts.add_import,
            ray_parts.run_import,
        ),
        ("stats", "moeplace stats of many recordings, one task for each", ray_parts.add_stats, ray_parts.run_stats),
        ("serve", "answer OpenAI-compatible HTTP requests, one actor per rank", _add_serve, _serve),
    ):
        sub = subparsers.add_parser(name, help=text, description=text)
        add(sub)
        sub.set_defaults(run_ray=run_command)


def run(args: argparse.Namespace) -> int:
    return int(args.run_ray(args))


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", metavar="URL", help="http://HOST:8265 (default: $RAY_ADDRESS, or this machine's)")
    parser.add_argument("--working-dir", metavar="DIR", help="folder to upload, in which the command starts")
    parser.add_argument("--python", default="python", metavar="P", help="interpreter on the cluster (python)")
    parser.add_argument("--cpus", type=float, metavar="N", help="reserve them; the command then runs on any node")
    parser.add_argument("--gpus", type=float, metavar="N", help="reserve them, likewise")
    parser.add_argument("--no-ship", action="store_true", help="the cluster has this package installed")
    parser.add_argument("--no-wait", action="store_true", help="print the job's name and leave")
    parser.add_argument("words", metavar="-- COMMAND", nargs=argparse.REMAINDER, help="a command and its arguments")


def _submit(args: argparse.Namespace) -> int:
    from moeplace.launch.cli import COMMANDS
    from moeplace.launch.on_ray.submit import submit_job
    from moeplace.profiling.errors import InputError

    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words or words[0] not in COMMANDS:
        named = f"{words[0]!r} is none" if words else "none is given"
        raise InputError(f"after -- comes a command of moeplace ({', '.join(COMMANDS)}), but {named}")
    return submit_job(
        words,
        address=args.address,
        python=args.python,
        working_dir=args.working_dir,
        cpus=args.cpus,
        gpus=args.gpus,
        ship=not args.no_ship,
        wait=not args.no_wait,
    )


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trace", metavar="T", nargs="+", help="routing traces")
    parser.add_argument("--solvers", default=DEFAULT_SOLVERS, metavar="A,B,...", help="default: %(default)s")
    parser.add_argument("--sweep", metavar="X,Y,...", help="caps on imbalance: trace the front of traffic and balance")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="run with N seeds, from --seed up (1)")
    parser.add_argument("--json", metavar="FILE", help="write the table for machines")
    ray_parts.add_address(parser)
    parser.add_argument(
        "--cpus-per-instance", type=float, default=1.0, metavar="N", help="CPUs to reserve for each (1)"
    )
    add_cluster_arguments(parser)
    add_problem_arguments(parser)


def _compare(args: argparse.Namespace) -> int:
    from moeplace.launch.on_ray.cluster import connected
    from moeplace.launch.on_ray.sweep import FAILED, Instance, run_sweep
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.files import require_folder_of, write_json
    from moeplace.profiling.traces.file import load_trace

    require_folder_of(args.json)
    if args.seeds < 1 or args.cpus_per_instance <= 0:
        raise InputError(f"--seeds ({args.seeds}) must be at least 1, --cpus-per-instance positive")
    wanted = solvers_and_caps(args)
    sides = {path: split_sides(load_trace(path), args.fit, mix_text=args.mix, seed=args.seed) for path in args.trace}
    seeds = range(args.seed, args.seed + args.seeds)
    instances = [Instance(path, name, cap, seed) for path in sides for name, cap in wanted for seed in seeds]
    with connected(args.address, num_cpus=args.num_cpus, ship=not args.no_ship) as ray, progress("sweep") as report:
        rows = run_sweep(ray, instances, sides, args, cpus=args.cpus_per_instance, report=report)
    for path in sides:
        done = [_labelled(row, args.seeds) for row in rows if row["trace"] == path and row["status"] != FAILED]
        print_rows(done, path, sides[path].name, args.mode)
    failed = [row for row in rows if row["status"] == FAILED]
    for row in failed:
        print(f"failed: {_name(row)}: {row['reason']}")
    if args.json:
        write_json(args.json, {"mode": args.mode, "objective": args.objective, "runs": rows})
    return 1 if len(failed) == len(rows) else 0


def _labelled(row: dict[str, Any], seeds: int) -> dict[str, Any]:
    """With the seed beside the solver's name, where there are several."""
    return row if seeds == 1 else {**row, "solver": f"{row['solver']} seed {row['seed']}"}


def _name(row: dict[str, Any]) -> str:
    cap = "" if row["max_imbalance"] is None else f", cap {row['max_imbalance']}"
    return f"{row['solver']} on {row['trace']}{cap}, seed {row['seed']}"


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, readable on every node")
    parser.add_argument("--http", required=True, metavar="HOST:PORT", help="where to answer, on the driver's node")
    parser.add_argument("--ranks", type=int, required=True, metavar="R", help="ranks to begin with")
    parser.add_argument("--cpus-per-rank", type=float, default=1.0, metavar="N", help="CPUs to reserve for each (1)")
    parser.add_argument("--gpus-per-rank", type=float, default=0.0, metavar="N", help="GPUs to reserve for each (0)")
    ray_parts.add_address(parser)
    add_engine_arguments(parser.add_argument_group("ranks"))
    add_front_arguments(parser.add_argument_group("clients"))
    add_replan_arguments(parser)


def _serve(args: argparse.Namespace) -> int:
    from moeplace.launch.on_ray.cluster import connected, import_ray
    from moeplace.profiling.recording.checkpoint_files import check_checkpoint

    check_replan_arguments(args)
    check_trace_arguments(args)
    check_checkpoint(args.model)
    import_ray()
    with connected(args.address, num_cpus=args.num_cpus, ship=not args.no_ship) as ray:
        from moeplace.launch.on_ray.spawner import RaySpawner

        spawner = RaySpawner(cpus=args.cpus_per_rank, gpus=args.gpus_per_rank)
        host = ray.util.get_node_ip_address()
        return serve_http(args, lambda: start_coordinator(args, spawner, host=host))
