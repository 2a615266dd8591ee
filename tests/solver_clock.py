"""The clock that solvers see in tests may run at another pace than time."""

import threading
import time
from types import SimpleNamespace

import pytest

from moeplace.placement import budget, solve
from moeplace.placement.bounds import dual, layers
from moeplace.placement.tiers import joint


@pytest.fixture(autouse=True)
def clock_of_solvers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--clock 20` shows every test what a machine sees that is busy with other things: limits end 20 times as early.

    A search plans its work from its limit, and the clock cuts in only where a machine is too slow for it. A test that
    asks for the end of that work is marked `clock(0.1)`: time passes slowly for it, whatever else the machine does.
    """
    own = request.node.get_closest_marker("clock")
    pace = float(request.config.getoption("--clock")) * (own.args[0] if own else 1.0)
    if pace == 1.0:
        return
    origin = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: origin + pace * (time.monotonic() - origin))
    for module in (budget, solve, dual, layers, joint):
        monkeypatch.setattr(module, "time", clock)
    timers = SimpleNamespace(Timer=lambda seconds, *rest, **named: threading.Timer(seconds / pace, *rest, **named))
    monkeypatch.setattr(budget, "threading", timers)
