"""Solvers by name. Each is a function `(problem, budget) -> Draft`, imported when it is first asked for."""

import importlib
from typing import Protocol

from moeplace.placement.budget import Budget
from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.profiling.errors import InputError
from moeplace.profiling.extras import missing_package

SOLVERS = {  # name -> module:function below this package
    "auto": "auto:solve_portfolio",
    "index-order": "index_order:solve_index_order",
    "round-robin": "index_order:solve_round_robin",
    "lpt": "lpt:solve_lpt",
    "eplb": "eplb:solve_eplb",
    "flashlb": "flashlb:solve_flashlb",
    "stair": "stair:solve_stair",
    "viterbi": "exact.viterbi:solve_viterbi",
    "exflow-ilp": "exact.exflow:solve_exflow",
    "moetuner-ilp": "exact.moetuner:solve_moetuner",
    "cp-sat": "exact.cpsat:solve_cpsat",
}


class Solver(Protocol):
    """Finds a placement. Must return a valid one whenever the budget ends; claims no objective value."""

    def __call__(self, problem: Problem, budget: Budget) -> Draft: ...


def get_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        InputError: there is none.
        MissingPackageError: it needs a package that is not installed.
    """
    if name not in SOLVERS:
        raise InputError(f"solver {name!r} must be one of {', '.join(SOLVERS)}")
    module, function = SOLVERS[name].split(":")
    try:
        solver: Solver = getattr(importlib.import_module(f"moeplace.placement.solvers.{module}"), function)
    except ModuleNotFoundError as error:
        raise missing_package(f"solver {name}", error) or error from error
    return solver
