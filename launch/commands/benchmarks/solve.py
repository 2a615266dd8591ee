"""`moeplace bench solve`: solvers on the library of instances, against best known values and proven bounds."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from moeplace.launch.benches.solve import Outcome

HELP = "run solvers on the library of instances: gaps to the best known value and to the proven bound"
PEERS = "auto,index-order,lpt,eplb,exflow-ilp,moetuner-ilp"
SUITES = ("small", "large")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", choices=SUITES, default="small", help="which instances (small)")
    parser.add_argument("--only", metavar="A,B,...", help="instances by name, instead of all")
    parser.add_argument("--solvers", default=PEERS, metavar="A,B,...", help=f"solvers and peers ({PEERS})")
    parser.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="seconds of every run (10)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of auto, the median counts: seeds 0, "
                        "7, 13, then 14, 15, ... (3)")  # fmt: skip
    parser.add_argument("--record", action="store_true", help="write better values and bounds into the library's table")
    parser.add_argument("--check", action="store_true", help="run nothing: check every entry of the table")
    parser.add_argument("--library", metavar="DIR", help="folder of the library (benchmarks/instances of the source)")
    parser.add_argument("--traces", metavar="DIR", help="folder of recorded traces (default: MOEPLACE_TRACES)")
    parser.add_argument("--json", metavar="F", help="write all runs to F")


def run(args: argparse.Namespace) -> int:
    """Run or check, print, write."""
    from moeplace.launch.benches.library.instance import find_library, load_suite
    from moeplace.launch.benches.library.table import Table
    from moeplace.profiling.errors import InputError
    from moeplace.profiling.files import require_folder_of

    require_folder_of(args.json)
    if args.seeds < 1 or not args.time_limit > 0:
        raise InputError(f"seeds ({args.seeds}) and time limit ({args.time_limit} s) must be positive")
    library = find_library(args.library)
    instances = load_suite(library, args.suite)
    if args.only:
        wanted = args.only.split(",")
        unknown = set(wanted) - {instance.name for instance in instances}
        if unknown:
            raise InputError(f"instance {sorted(unknown)[0]!r} is not in the suite {args.suite}")
        instances = [instance for instance in instances if instance.name in wanted]
    table = Table.load(library)
    return _check(instances, table, _traces(args)) if args.check else _bench(args, instances, table)


def _traces(args: argparse.Namespace) -> "Path | None":
    """The folder of recorded traces, None where none is named.

    Raises:
        InputError: there is no such folder.
    """
    import os
    from pathlib import Path

    from moeplace.profiling.errors import InputError

    folder = args.traces or os.environ.get("MOEPLACE_TRACES")
    if folder and not Path(folder).is_dir():
        raise InputError(f"no such folder of traces: {folder}")
    return Path(folder) if folder else None


def _bench(args: argparse.Namespace, instances: "Sequence[Any]", table: Any) -> int:
    from moeplace.launch.benches.solve import bench_suite, report_of
    from moeplace.launch.progress import progress
    from moeplace.placement.solvers import get_solver
    from moeplace.profiling.files import write_json

    solvers = args.solvers.split(",")
    for solver in solvers:
        get_solver(solver)
    seeds = [0, 7, 13, *range(14, 14 + args.seeds)][: args.seeds]
    with progress("instances") as report:
        outcomes, skipped = bench_suite(instances, table, solvers=solvers, time_limit=args.time_limit, seeds=seeds,
                                        traces=_traces(args), record=args.record, report=report)  # fmt: skip
    conditions = {"suite": args.suite, "time_limit": args.time_limit, "seeds": seeds}
    document = report_of(outcomes, skipped, solvers, conditions)
    if args.json:
        write_json(args.json, document)
    print(_table(outcomes, solvers, document["summary"]))
    for sentence in [*skipped, *(s for o in outcomes for s in o.news), *_faults(outcomes)]:
        print(f"  {sentence}")
    ours = [r.judged for o in outcomes for r in o.runs if r.solver == "auto"]
    return 0 if all(judged is not None and not judged.broken for judged in ours) else 1


def _table(outcomes: "Sequence[Outcome]", solvers: "Sequence[str]", summary: dict[str, Any]) -> str:
    from moeplace.launch.benches.solve import gap
    from moeplace.launch.tables import format_table

    lead = solvers[0]
    header = ["instance", "of", "best known", "bound", lead, "over bound", *(f"{s} +%" for s in solvers)]
    rows: list[list[Any]] = []
    for o in outcomes:
        value = o.value(lead)
        over = "-" if value is None else f"{100 * gap(value, o.bound):.2f} %"
        rows.append([o.instance.name, o.objective, _digits(o.best_known), _digits(o.bound),
                     "-" if value is None else _digits(value), over, *(_cell(o, s) for s in solvers)])  # fmt: skip
    means = [summary[s]["gap_to_best_known"] for s in solvers]
    over = summary[lead]["gap_to_bound"]
    rows.append(["geometric mean", "", "", "", "", "-" if over is None else f"{100 * over:.2f} %",
                 *("-" if mean is None else f"{100 * mean:.2f}" for mean in means)])  # fmt: skip
    return format_table(header, rows)


def _digits(value: float) -> str:
    return f"{value:.6g}"


def _cell(outcome: "Outcome", solver: str) -> str:
    """Gap to the best known value in per cent; `!` = it breaks a rule, `-` = it cannot solve this."""
    from moeplace.launch.benches.solve import gap

    value = outcome.value(solver)
    if value is not None:
        return f"{100 * gap(value, outcome.best_known):.2f}"
    broken = [run.judged.value for run in outcome.runs if run.solver == solver and run.judged]
    return f"{100 * gap(min(broken), outcome.best_known):.2f}!" if broken else "-"


def _faults(outcomes: "Sequence[Outcome]") -> list[str]:
    """What our own solver broke or could not do."""
    runs = [(o.instance.name, r) for o in outcomes for r in o.runs if r.solver == "auto"]
    said = [f"{name}, seed {r.seed}: {r.problem or (r.judged and '; '.join(r.judged.broken))}" for name, r in runs
            if r.problem or (r.judged and r.judged.broken)]  # fmt: skip
    return [f"fault of auto: {sentence}" for sentence in said]


def _check(instances: "Sequence[Any]", table: Any, traces: "Path | None") -> int:
    from moeplace.launch.benches.library.checker import check_entry
    from moeplace.launch.benches.library.recipes import AbsentTraceError

    wrong, confirmed = 0, 0
    for instance in instances:
        entry = table.entries.get(instance.name)
        if entry is None:
            print(f"{instance.name}: nothing is known")
            continue
        try:
            faults = check_entry(instance, entry, table, traces)
        except AbsentTraceError as error:
            print(f"{instance.name}: not checked, {error}")
            continue
        for fault in faults:
            print(f"{instance.name}: {fault}")
        wrong, confirmed = wrong + bool(faults), confirmed + (not faults)
    print(f"{confirmed} of {len(instances)} confirmed, {wrong} wrong")
    return 1 if wrong else 0
