"""The benchmark of solvers: a suite of the library, each solver at the same time limit, judged by the checker.

The gap to the best known value is value / best - 1, that to the bound value / bound - 1, where the bound is the larger
of the table's and the one proven in this run. Over instances both are shifted geometric means, of ratios
(v + s) / (w + s) with s = SHIFT, because an optimum may be 0. A peer that breaks a cap or another rule is shown and not
counted.
"""

import datetime
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.launch.benches.library.checker import Checker, Judgement
from moeplace.launch.benches.library.instance import Instance
from moeplace.launch.benches.library.recipes import AbsentTraceError
from moeplace.launch.benches.library.table import Entry, Table, as_caps, is_less
from moeplace.placement.bounds.problem import held_imbalance
from moeplace.placement.problem import Problem
from moeplace.placement.result import SolveResult
from moeplace.placement.solve import solve
from moeplace.profiling.errors import MoeplaceError

SHIFT = 1e-3
OURS = "auto"


@dataclass(frozen=True)
class Run:
    """One solver once on one instance; `problem` is a sentence where it could not."""

    solver: str
    seed: int
    seconds: float
    judged: Judgement | None
    result: SolveResult | None
    bound: float
    problem: str = ""


@dataclass(frozen=True)
class Outcome:
    """All runs on one instance, and what is known of it (after this run, if it is recorded)."""

    instance: Instance
    runs: tuple[Run, ...]
    objective: str
    best_known: float
    bound: float
    news: tuple[str, ...] = ()

    def value(self, solver: str) -> float | None:
        """Median value of a solver's legal runs, None = it has none."""
        values = [
            run.judged.value for run in self.runs if run.solver == solver and run.judged and not run.judged.broken
        ]
        return float(np.median(values)) if values else None


def bench_instance(
    instance: Instance, table: Table, *, solvers: Sequence[str], time_limit: float, seeds: Sequence[int],
    traces: Path | None, record: bool,
) -> Outcome:  # fmt: skip
    """Run solvers on an instance: `auto` with every seed, peers, which follow a rule, once.

    Raises:
        AbsentTraceError: it needs a recorded trace that is not here.
    """
    problem, entry = instance.problem(traces), table.entries.get(instance.name)
    caps_L = held_imbalance(problem) if entry is None or entry.caps is None else np.array(entry.caps)
    objective = _objective(problem)
    checker = Checker(problem, objective, caps_L)
    if entry is not None and entry.tokens_digest != checker.statement.tokens_digest:
        entry = None  # other tokens on this machine: nothing is known of them
        record = False
    runs = []
    for solver in solvers:
        for seed in seeds if solver == OURS else seeds[:1]:
            runs.append(_run(problem, checker, solver, time_limit, seed))
    news = _news(instance.name, table, entry, runs, checker, time_limit) if record else ()
    entry = table.entries.get(instance.name) if record else entry
    legal = [run.judged.value for run in runs if run.judged and not run.judged.broken]
    best = min([*legal, entry.value if entry else math.inf])
    bound = max([run.bound for run in runs] + [entry.bound if entry else 0.0])
    return Outcome(instance, tuple(runs), objective, entry.value if entry else best, bound, tuple(news))


def _objective(problem: Problem) -> str:
    if problem.trace is None or (problem.mode == "allgather" and problem.objective == "traffic"):
        return "imbalance"
    return problem.objective


def _run(problem: Problem, checker: Checker, solver: str, time_limit: float, seed: int) -> Run:
    try:
        result = solve(problem, solver=solver, time_limit=time_limit, seed=seed)
    except MoeplaceError as error:
        return Run(solver, seed, 0.0, None, None, 0.0, str(error))
    placement = result.placement
    judged = checker.judge(placement.slot_to_expert.astype(np.int64), placement.slots_of_rank)
    # A placement that breaks the cap is bounded without it: that bound holds for the problem with it all the more.
    return Run(solver, seed, result.seconds, judged, result, result.lower_bound if not judged.broken else 0.0)


def _news(
    name: str, table: Table, entry: Entry | None, runs: Sequence[Run], checker: Checker, time_limit: float
) -> list[str]:
    """Write what is better than the table, and say so."""
    news = []
    statement = checker.statement
    for run in runs:
        if run.result is None or run.judged is None or run.judged.broken:
            continue
        by = _origin(run, time_limit)
        if entry is None:
            entry = Entry(statement.objective, run.judged.value, by, run.bound, by, statement.tokens_digest,
                          as_caps(statement.caps_L))  # fmt: skip
            news.append(f"{name}: first value {entry.value:.6g}, bound {entry.bound:.6g}")
            table.keep(name, run.result.placement, entry)
            table.keep_bound(name, run.result.certificate, entry)
            continue
        if is_less(run.judged.value, entry.value):
            news.append(f"{name}: {run.judged.value:.6g} beats {entry.value:.6g}")
            entry = entry.better(run.judged.value, by)
            table.keep(name, run.result.placement, entry)
        if is_less(entry.bound, run.bound):
            news.append(f"{name}: bound {run.bound:.6g}, it was {entry.bound:.6g}")
            entry = entry.tighter(run.bound, by)
            table.keep_bound(name, run.result.certificate, entry)
    return news


def _origin(run: Run, time_limit: float) -> str:
    today = datetime.date.today().isoformat()
    return f"moeplace {version('moeplace')}, {run.solver}, seed {run.seed}, {time_limit:g} s, {today}"


def bench_suite(
    instances: Sequence[Instance], table: Table, *, report: Callable[[float], None] = lambda share: None, **options: Any
) -> tuple[list[Outcome], list[str]]:
    """(outcomes, sentences on instances left out)."""
    outcomes, skipped = [], []
    for number, instance in enumerate(instances):
        try:
            outcomes.append(bench_instance(instance, table, **options))
        except AbsentTraceError as error:
            skipped.append(f"{instance.name}: {error}")
        report((number + 1) / len(instances))
    return outcomes, skipped


def gap(value: float, reference: float) -> float:
    """value / reference - 1, 0 where both are 0 within rounding."""
    if abs(value - reference) <= 1e-9 * max(abs(value), 1.0):
        return 0.0
    return value / reference - 1 if reference > 0 else math.inf


def shifted_mean(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Shifted geometric mean of ratios, minus 1; None without pairs."""
    if not pairs:
        return None
    logs = [math.log((value + SHIFT) / (reference + SHIFT)) for value, reference in pairs]
    return math.exp(sum(logs) / len(logs)) - 1


def summary(outcomes: Sequence[Outcome], solvers: Sequence[str]) -> dict[str, dict[str, float | int | None]]:
    """By solver: mean gaps to best known and to the bound over the instances that it solves, and their number."""
    found: dict[str, dict[str, float | int | None]] = {}
    for solver in solvers:
        solved = [(value, o.best_known, o.bound) for o in outcomes if (value := o.value(solver)) is not None]
        found[solver] = {
            "instances": len(solved),
            "gap_to_best_known": shifted_mean([(value, best) for value, best, _ in solved]),
            "gap_to_bound": shifted_mean([(value, bound) for value, _, bound in solved]),
        }
    return found


def report_of(
    outcomes: Sequence[Outcome], skipped: Sequence[str], solvers: Sequence[str], conditions: dict[str, Any]
) -> dict[str, Any]:
    """Everything, as plain data."""
    rows = []
    for o in outcomes:
        runs = [
            {
                "solver": run.solver, "seed": run.seed, "seconds": run.seconds,
                "value": None if run.judged is None or math.isinf(run.judged.value) else run.judged.value,
                "broken": [] if run.judged is None else list(run.judged.broken), "error": run.problem,
                "bound": run.bound, "status": None if run.result is None else run.result.status,
            }
            for run in o.runs
        ]  # fmt: skip
        rows.append({"instance": o.instance.name, "objective": o.objective, "best_known": o.best_known,
                     "bound": o.bound, "runs": runs})  # fmt: skip
    where = {"version": version("moeplace"), "cores": os.cpu_count(), "numpy": np.__version__}
    return {"conditions": {**conditions, **where}, "instances": rows, "summary": summary(outcomes, solvers),
            "skipped": list(skipped)}  # fmt: skip
