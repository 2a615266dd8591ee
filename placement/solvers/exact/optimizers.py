"""The one place that imports OR-tools and PuLP.

OR-tools comes first: `import pulp` loads highspy where that is installed, and OR-tools and highspy cannot share a
process (whichever comes second fails with an undefined symbol). After OR-tools, PuLP gives up on highspy quietly and
works with the CBC it bundles.
"""

import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from moeplace.profiling.errors import InputError

try:
    from ortools.sat.python import cp_model
except ModuleNotFoundError:
    raise  # it is not installed: whoever asked for a solver says how to get it
except ImportError as error:
    raise ImportError(
        f"OR-tools could not be loaded ({error}); if highspy was imported before, import moeplace first"
    ) from error
import pulp
from pulp.apis.coin_api import pulp_cbc_path

__all__ = ["cp_model", "pulp", "solve_program"]

GRACE_SECONDS = 0.5
"""How long a mixed-integer solver may overrun its limit before it is ended."""


def solve_program(
    program: "pulp.LpProblem", *, time_limit: float, gap: float = 0.0, solver: str = "cbc", warm: bool = False
) -> str:
    """Solve a PuLP program in place, within the limit even where its solver would overrun.

    Args:
        program: variables with `setInitialValue` are a warm start when `warm`.
        time_limit: seconds; writing the program is part of it.
        gap: relative gap at which the solver may stop.
        solver: "cbc", which PuLP bundles, or the name of any solver that PuLP knows, such as "GUROBI_CMD".
        warm: hand the initial values to the solver.

    Returns:
        "optimal" (within `gap`), "feasible" (an incumbent) or "none".

    Raises:
        InputError: PuLP does not know the solver, or it is not installed.
    """
    if solver == "cbc":
        return _solve_cbc(program, time_limit, gap, warm)
    if solver not in pulp.listSolvers():
        raise InputError(f"solver {solver!r} must be cbc or one of {', '.join(pulp.listSolvers())}")
    engine = pulp.getSolver(solver, msg=False, timeLimit=time_limit, gapRel=gap)
    if not engine.available():
        raise InputError(f"solver {solver!r} is known to PuLP, but it is not installed")
    program.solve(engine)
    return _outcome(program)


def _solve_cbc(program: "pulp.LpProblem", time_limit: float, gap: float, warm: bool) -> str:
    started = time.monotonic()
    engine = pulp.COIN_CMD(path=pulp_cbc_path, msg=False)
    with TemporaryDirectory(prefix="moeplace-cbc-") as folder:
        model, start, answer = (Path(folder) / name for name in ("model.mps", "start.mst", "answer.sol"))
        names = program.writeMPS(str(model), rename=1)
        by_name, constraints = names[1], names[2]
        command = [engine.path, str(model)]
        if program.sense == pulp.LpMaximize:
            command += ["-max"]
        if warm:
            engine.writesol(str(start), program, program.variables(), by_name, constraints)
            command += ["-mips", str(start)]
        left = time_limit - (time.monotonic() - started)
        if left <= 0:
            return "none"
        command += ["-sec", f"{left:.2f}", "-ratio", str(gap), "-timeMode", "elapsed"]
        command += ["-solve", "-printingOptions", "all", "-solution", str(answer)]
        try:
            subprocess.run(command, capture_output=True, timeout=left + GRACE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return "none"
        if not answer.exists():
            return "none"
        status, values, _, _, _, solution_status = engine.readsol_MPS(
            str(answer), program, program.variables(), by_name, constraints
        )
    program.assignVarsVals(values)
    program.assignStatus(status, solution_status)
    return _outcome(program)


def _outcome(program: "pulp.LpProblem") -> str:
    if program.sol_status == pulp.LpSolutionOptimal:
        return "optimal"
    return "feasible" if program.sol_status == pulp.LpSolutionIntegerFeasible else "none"
