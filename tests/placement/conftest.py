"""Kernels are loaded before the clock of any test here runs: a search of half a second could be over by then."""

import numba
import pytest

from moeplace.placement.warm_up import warm_up
from tests.solver_clock import clock_of_solvers

__all__ = ["clock_of_solvers"]


@pytest.fixture(scope="session", autouse=True)
def kernels_are_loaded() -> None:
    """Each worker loads them once (4 s); without compilation there is nothing to load."""
    if not numba.config.DISABLE_JIT:
        warm_up()
