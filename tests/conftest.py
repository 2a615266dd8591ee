"""Settings of the whole suite: hypothesis, threads, and the seed that changes with the date.

A randomised test takes fixed seeds that never change, and beside them `dated_seed`: other instances every day, the same
ones all day. `pytest --seed N` (or MOEPLACE_SEED=N) repeats a day's run; a failing test shows its N.
"""

import datetime
import os
import zlib
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its threads spin against each other on a busy machine
os.environ.setdefault("MOEPLACE_NO_WARM_UP", "1")  # `make test` has compiled the kernels; a test's clock runs
settings.register_profile("moeplace", deadline=None)  # the first call of a kernel compiles it
settings.load_profile("moeplace")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--seed N`, `--clock N`."""
    today = int(datetime.datetime.now(datetime.UTC).strftime("%Y%m%d"))
    default = int(os.environ.get("MOEPLACE_SEED") or today)
    parser.addoption("--seed", type=int, default=default, help="seed of randomised tests (default: the date)")
    parser.addoption("--clock", type=float, default=1.0, help="how many times as fast the clock of solvers runs")


def pytest_configure(config: pytest.Config) -> None:
    """Let `tests.seeds` and the workers, also after midnight, have the seed of this run."""
    os.environ["MOEPLACE_SEED"] = str(config.getoption("--seed"))


_WITH_PROCESSES = ("benches", "docs", "http_front", "on_ray", "quickstart", "serving", "watching")
"""Rooms of `tests/launch` (and `tests/docs`) whose tests start processes or servers."""


def group_of(nodeid: str) -> str:
    """What stays on one worker with the test of that id: the pool of ranks, other processes, or nothing else."""
    rooms = nodeid.split("::")[0].split("/")
    if rooms[:2] == ["tests", "runtime"]:
        return "ranks"
    return "processes" if set(rooms) & set(_WITH_PROCESSES) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where two workers share the suite: one has the pool of ranks, one starts the other processes, both the rest.

    What shares a fixture of the session stays on one worker, and no more than two sets of processes compete for cores
    and for ports. Not by xdist's marks for groups: since pytest 9.2 its names of tests no longer show them.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByRoom(config, log)


def pytest_report_header(config: pytest.Config) -> str:
    """The seed of the run."""
    return f"seed of randomised tests: {config.getoption('--seed')} (--seed or MOEPLACE_SEED repeats it)"


@pytest.fixture
def dated_seed(request: pytest.FixtureRequest) -> int:
    """A seed that differs from test to test and from day to day."""
    run = int(request.config.getoption("--seed"))
    print(f"repeat with: --seed {run}")  # pytest shows it if the test fails
    return zlib.crc32(f"{run} {request.node.nodeid}".encode())
