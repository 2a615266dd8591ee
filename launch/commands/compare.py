"""`moeplace compare`: solvers side by side on held-out tokens, with bounds and seconds."""

import argparse
from typing import Any

from moeplace.launch.problems import (
    add_cluster_arguments,
    add_problem_arguments,
    build_cluster,
    problem_options,
    split_sides,
)
from moeplace.launch.progress import progress
from moeplace.launch.tables import format_table

HELP = "solvers side by side: held-out quality, proven bound, seconds"
_DEFAULT = "index-order,round-robin,lpt,eplb,auto"
_COLUMNS = {
    "ranks_per_token": "ranks/token",
    "nodes_per_token": "nodes/token",
    "copies_per_token": "copies/token",
    "stay_rate": "stay",
    "imbalance_mean": "imbalance",
    "imbalance_worst": "worst",
    "predicted_seconds": "pred. s/step",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("trace", metavar="T", nargs="+", help="routing traces")
    parser.add_argument("--solvers", default=_DEFAULT, metavar="A,B,...", help="default: %(default)s")
    parser.add_argument("--sweep", metavar="X,Y,...", help="caps on imbalance: trace the front of traffic and balance")
    parser.add_argument("--json", metavar="FILE", help="write the table for machines")
    parser.add_argument("--plot", metavar="SVG", help="draw traffic against balance")
    add_cluster_arguments(parser)
    add_problem_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Solve, judge, print."""
    from moeplace.placement.solvers import get_solver
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.files import require_folder_of, write_json
    from moeplace.profiling.trace_file import load_trace

    require_folder_of(args.json, args.plot)
    if args.mode == "auto":
        raise InputError("compare needs one mode: dispatch-combine, coherent or allgather")
    solvers = [name.strip() for name in args.solvers.split(",") if name.strip()]
    for name in solvers:  # before any of them runs
        get_solver(name)
    caps = _caps(args.sweep) if args.sweep else [args.max_imbalance]
    rows: list[dict[str, Any]] = []
    for path in args.trace:
        sides = split_sides(load_trace(path), args.fit, mix_text=args.mix, seed=args.seed)
        for name in solvers:
            for cap in caps if name == "auto" else caps[:1]:
                rows.append({"trace": path, **_one(args, sides, name, cap)})
        _print([row for row in rows if row["trace"] == path], path, sides.name, args.mode)
    if args.json:
        write_json(args.json, {"mode": args.mode, "objective": args.objective, "runs": rows})
    if args.plot:
        _plot(args, rows)
    return 0


def _caps(text: str) -> list[float]:
    from moeplace.profiling.errors import InputError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--sweep {text!r} must be numbers separated by commas") from error


def _one(args: argparse.Namespace, sides: Any, name: str, cap: float | None) -> dict[str, Any]:
    from moeplace.placement.problem import Problem
    from moeplace.placement.solve import solve

    cluster = build_cluster(args, sides.train.num_experts)
    options = {**problem_options(args, sides.train, cluster), "max_imbalance": cap}
    problem = Problem.from_trace(sides.train, cluster, mode=args.mode, **options)
    with progress(name) as report:
        result = solve(problem, solver=name, time_limit=args.time_limit, seed=args.seed, report=report)
    held_out = problem.evaluate(result.placement, sides.test)
    figures = {key: float(getattr(held_out, key)) for key in _COLUMNS}
    return {
        "solver": name,
        "max_imbalance": cap,
        "split": sides.name,
        **figures,
        "objective": result.objective,
        "lower_bound": result.lower_bound,
        "gap": result.gap,
        "status": result.status,
        "seconds": result.seconds,
        "notes": list(result.notes),
    }


def _print(rows: list[dict[str, Any]], path: str, split: str, mode: str) -> None:
    header = ["solver", "cap", *_COLUMNS.values(), "objective", "bound", "gap", "status", "seconds"]
    table = [
        [row["solver"], row["max_imbalance"], *(row[key] for key in _COLUMNS), row["objective"], row["lower_bound"],
         row["gap"], row["status"], row["seconds"]]
        for row in rows
    ]  # fmt: skip
    print(f"{path}: {mode}, judged on {split} tokens; objective and bound on the fitted ones")
    print(format_table(header, table))
    for row in rows:
        for note in row["notes"]:
            print(f"  {row['solver']}: {note}")
    print()


def _plot(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from moeplace.launch.scatter import scatter_svg
    from moeplace.profiling.files import atomic_write

    key = "ranks_per_token" if args.mode == "dispatch-combine" else "copies_per_token"
    points = [
        (row["imbalance_mean"], row[key], row["solver"] + (f" {row['max_imbalance']}" if args.sweep else ""))
        for row in rows
    ]
    text = scatter_svg(points, x_label="imbalance, held-out", y_label=_COLUMNS[key] + ", held-out")
    with atomic_write(args.plot) as file:
        file.write(text.encode())
    print(f"wrote {args.plot}")
