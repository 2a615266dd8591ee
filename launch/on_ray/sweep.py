"""A sweep on a Ray cluster: one task per instance (trace, solver, cap, seed), the rows gathered here."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moeplace.launch.on_ray.spread import end_tasks
from moeplace.launch.solving.runs import run_solver
from moeplace.profiling.errors import MoeplaceError

FAILED = "failed"


@dataclass(frozen=True)
class Instance:
    """One run.

    Attributes:
        trace: path, the name of its sides.
        solver: name.
        cap: on imbalance, None = none.
        seed: of the solver.
    """

    trace: str
    solver: str
    cap: float | None
    seed: int

    def row(self) -> dict[str, Any]:
        """The beginning of its row."""
        return {"trace": self.trace, "solver": self.solver, "max_imbalance": self.cap, "seed": self.seed}


def run_sweep(
    ray: Any,
    instances: Sequence[Instance],
    sides: dict[str, Any],
    args: argparse.Namespace,
    *,
    cpus: float,
    report: Callable[[float], None],
) -> list[dict[str, Any]]:
    """Run all instances, as many at once as the cluster has room for.

    Args:
        ray: the module, connected.
        sides: trace -> its sides; each is put into the object store once.
        args: the problem's options.
        cpus: reserved for an instance.
        report: told the share done.

    Returns:
        Rows in the order of the instances. One that has failed, by itself or with its worker, has the status "failed"
        and a `reason`; the others have the columns of `run_solver`.
    """
    stored = {trace: ray.put(value) for trace, value in sides.items()}
    task = ray.remote(num_cpus=cpus, max_retries=1)(solve_instance)
    options = argparse.Namespace(**{name: value for name, value in vars(args).items() if not callable(value)})
    refs = {task.remote(instance, stored[instance.trace], options): instance for instance in instances}
    rows: dict[Instance, dict[str, Any]] = {}
    try:
        while len(rows) < len(refs):
            waiting = [ref for ref, instance in refs.items() if instance not in rows]
            for ref in ray.wait(waiting)[0]:
                rows[refs[ref]] = _row_of(ray, ref, refs[ref])
            report(len(rows) / len(refs))
    finally:
        end_tasks(ray, [ref for ref, instance in refs.items() if instance not in rows], "instance")
    return [rows[instance] for instance in instances]


def solve_instance(instance: Instance, sides: Any, args: argparse.Namespace) -> dict[str, Any]:
    """On a worker: one row."""
    try:
        row = run_solver(args, sides, instance.solver, instance.cap, seed=instance.seed)
    except MoeplaceError as error:  # such as a cap that cannot hold: a result of the sweep, not its end
        return _failed(instance, str(error))
    return {**instance.row(), **row}


def _row_of(ray: Any, ref: Any, instance: Instance) -> dict[str, Any]:
    try:
        return dict(ray.get(ref))
    except ray.exceptions.RayError as error:
        return _failed(instance, f"its worker was lost: {str(error).strip().splitlines()[-1][:200]}")


def _failed(instance: Instance, reason: str) -> dict[str, Any]:
    return {**instance.row(), "status": FAILED, "reason": " ".join(reason.split())}
