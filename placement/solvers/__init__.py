"""Solvers by name. Each is a function `(problem, budget) -> Draft`, imported when it is first asked for."""

import importlib
from typing import Protocol

from moeplace.placement.problem import Problem
from moeplace.placement.result import Draft
from moeplace.placement.stop import Budget
from moeplace.profiling.errors import InputError

SOLVERS = {  # name -> module:function below this package
    "auto": "portfolio:solve_portfolio",
    "index-order": "index_order:solve_index_order",
    "round-robin": "index_order:solve_round_robin",
    "lpt": "packing:solve_lpt",
    "eplb": "eplb:solve_eplb",
    "viterbi": "dynamic:solve_viterbi",
    "exflow-ilp": "exflow:solve_exflow",
    "moetuner-ilp": "moetuner:solve_moetuner",
    "cp-sat": "cpsat:solve_cpsat",
}


class Solver(Protocol):
    """Finds a placement. Must return a valid one whenever the budget ends; claims no objective value."""

    def __call__(self, problem: Problem, budget: Budget) -> Draft: ...


def get_solver(name: str) -> Solver:
    """The solver of that name.

    Raises:
        InputError: there is none.
    """
    if name not in SOLVERS:
        raise InputError(f"solver {name!r} must be one of {', '.join(SOLVERS)}")
    module, function = SOLVERS[name].split(":")
    solver: Solver = getattr(importlib.import_module(f"moeplace.placement.solvers.{module}"), function)
    return solver
