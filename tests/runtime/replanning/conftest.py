"""Reviews solve within fractions of a second: `--clock` shows them a busy machine."""

from tests.solver_clock import clock_of_solvers

__all__ = ["clock_of_solvers"]
