"""Runs of solvers on held-out tokens: what `moeplace compare` and its Ray form compute and print."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from moeplace.launch.options.problem import build_cluster, problem_options
from moeplace.launch.tables import format_table

DEFAULT_SOLVERS = "index-order,round-robin,lpt,eplb,auto"
COLUMNS = {
    "ranks_per_token": "ranks/token",
    "nodes_per_token": "nodes/token",
    "copies_per_token": "copies/token",
    "stay_rate": "stay",
    "imbalance_mean": "imbalance",
    "imbalance_worst": "worst",
    "predicted_seconds": "pred. s/step",
}


def solvers_and_caps(args: argparse.Namespace) -> list[tuple[str, float | None]]:
    """What is to be run on every trace: caps beyond the first one are for "auto" alone.

    Raises:
        InputError: there is no such solver, a cap is no number, or no mode is chosen.
    """
    from moeplace.placement.solvers import get_solver
    from moeplace.profiling.errors import InputError

    if args.mode == "auto":
        raise InputError("compare needs one mode: dispatch-combine, coherent or allgather")
    names = [name.strip() for name in args.solvers.split(",") if name.strip()]
    for name in names:  # before any of them runs
        get_solver(name)
    caps = _caps(args.sweep) if args.sweep else [args.max_imbalance]
    return [(name, cap) for name in names for cap in (caps if name == "auto" else caps[:1])]


def _caps(text: str) -> list[float]:
    from moeplace.profiling.errors import InputError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--sweep {text!r} must be numbers separated by commas") from error


def run_solver(
    args: argparse.Namespace,
    sides: Any,
    name: str,
    cap: float | None,
    *,
    seed: int,
    report: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """One solver on one trace: its row of the table.

    Args:
        args: as `add_cluster_arguments` and `add_problem_arguments` define them.
        sides: the trace, split.
        cap: on imbalance, None = none.
        report: told the share done.
    """
    from moeplace.placement.problem import Problem
    from moeplace.placement.solve import solve

    cluster = build_cluster(args, sides.train.num_experts)
    options = {**problem_options(args, sides.train, cluster), "max_imbalance": cap}
    problem = Problem.from_trace(sides.train, cluster, mode=args.mode, **options)
    result = solve(problem, solver=name, time_limit=args.time_limit, seed=seed, report=report)
    held_out = problem.evaluate(result.placement, sides.test)
    figures = {key: float(getattr(held_out, key)) for key in COLUMNS}
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


def print_rows(rows: Sequence[dict[str, Any]], path: str, split: str, mode: str) -> None:
    """The table of one trace."""
    header = ["solver", "cap", *COLUMNS.values(), "objective", "bound", "gap", "status", "seconds"]
    table = [
        [row["solver"], row["max_imbalance"], *(row[key] for key in COLUMNS), row["objective"], row["lower_bound"],
         row["gap"], row["status"], row["seconds"]]
        for row in rows
    ]  # fmt: skip
    print(f"{path}: {mode}, judged on {split} tokens; objective and bound on the fitted ones")
    print(format_table(header, table))
    for row in rows:
        for note in row["notes"]:
            print(f"  {row['solver']}: {note}")
    print()
