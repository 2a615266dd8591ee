"""`moeplace compare`: solvers side by side on held-out tokens, with bounds and seconds."""

import argparse
from typing import Any

from moeplace.launch.options.problem import add_cluster_arguments, add_problem_arguments, split_sides
from moeplace.launch.progress import progress
from moeplace.launch.solving.runs import COLUMNS, DEFAULT_SOLVERS, print_rows, run_solver, solvers_and_caps

HELP = "solvers side by side: held-out quality, proven bound, seconds"
EXAMPLE = "moeplace compare t.trace --ranks 8 --solvers index-order,eplb,auto --time-limit 10"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("trace", metavar="T", nargs="+", help="routing traces")
    parser.add_argument("--solvers", default=DEFAULT_SOLVERS, metavar="A,B,...", help="default: %(default)s")
    parser.add_argument("--sweep", metavar="X,Y,...", help="caps on imbalance: trace the front of traffic and balance")
    parser.add_argument("--json", metavar="FILE", help="write the table for machines")
    parser.add_argument("--plot", metavar="SVG", help="draw traffic against balance")
    add_cluster_arguments(parser)
    add_problem_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Solve, judge, print."""
    from moeplace.profiling.files import require_folder_of, write_json
    from moeplace.profiling.traces.file import load_trace

    require_folder_of(args.json, args.plot)
    wanted = solvers_and_caps(args)
    rows: list[dict[str, Any]] = []
    for path in args.trace:
        sides = split_sides(load_trace(path), args.fit, mix_text=args.mix, seed=args.seed)
        for name, cap in wanted:
            with progress(name) as report:
                rows.append({"trace": path, **run_solver(args, sides, name, cap, seed=args.seed, report=report)})
        print_rows([row for row in rows if row["trace"] == path], path, sides.name, args.mode)
    if args.json:
        write_json(args.json, {"mode": args.mode, "objective": args.objective, "runs": rows})
    if args.plot:
        _plot(args, rows)
    return 0


def _plot(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from moeplace.launch.reports.scatter import scatter_svg
    from moeplace.profiling.files import atomic_write

    key = "ranks_per_token" if args.mode == "dispatch-combine" else "copies_per_token"
    points = [
        (row["imbalance_mean"], row[key], row["solver"] + (f" {row['max_imbalance']}" if args.sweep else ""))
        for row in rows
    ]
    text = scatter_svg(points, x_label="imbalance, held-out", y_label=COLUMNS[key] + ", held-out")
    with atomic_write(args.plot) as file:
        file.write(text.encode())
    print(f"wrote {args.plot}")
