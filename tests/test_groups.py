"""Which tests share a worker, whatever the releases of pytest and its plug-ins: ports and pools depend on it."""

import subprocess
import sys

import pytest

from tests.conftest import group_of
from tests.shared_data import ROOT


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/runtime/comm/test_group.py::test_a", "ranks"),
        ("tests/launch/on_ray/test_ray.py::test_a[x/y]", "processes"),
        ("tests/docs/test_links.py::test_a", "processes"),
        ("tests/launch/test_runtime.py::test_a", "tests/launch/test_runtime.py::test_a"),
    ],
)
def test_groups_follow_rooms(nodeid: str, group: str) -> None:
    """By the path alone."""
    assert group_of(nodeid) == group


def test_a_group_stays_on_one_worker() -> None:
    """As xdist of today runs it."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadscope", "-v", "-p", "no:cacheprovider"]
    chosen = ["tests/docs/test_links.py", "tests/launch/on_ray/test_ray.py", "-k", "link or agent or package"]
    run = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stdout
    workers = [line.split("]")[0] for line in run.stdout.splitlines() if line.startswith("[gw")]
    assert len(workers) > 4
    assert len(set(workers)) == 1
