"""What tests of searches share: a clock that stands still."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

import moeplace.placement.budget as budget_module
import moeplace.placement.solve as solve_module
from moeplace.placement.bounds.problem import Proven
from moeplace.placement.budget import Budget


@pytest.fixture
def still_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time passes: all planned work is done, whatever else the machine does."""
    clock = SimpleNamespace(monotonic=lambda: 0.0)
    for module in (budget_module, solve_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(solve_module, "prove", lambda *_, **__: Proven({}, []))  # their work is not what is tested
    monkeypatch.setattr(Budget, "alarm", lambda self, seconds: nullcontext(np.zeros(1, np.uint8)))
