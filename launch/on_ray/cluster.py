"""The connection to a Ray cluster, and this package as its workers get it."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import metadata, version
from pathlib import Path
from typing import Any

from moeplace.profiling.errors import MoeplaceError
from moeplace.profiling.extras import missing_package

LOCAL = "local"
_PACKAGES = ("profiling", "placement", "runtime", "launch")
_HOME = Path(__file__).resolve().parent.parent.parent
"""Of the four folders, in a checkout as in an installation."""
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the processes of a job, which have the job's environment and may not ask for another."""


def import_ray() -> Any:
    """The module `ray`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise missing_package("moeplace ray", error) or error from error
    return ray


@contextmanager
def connected(address: str | None, *, num_cpus: int | None = None, ship: bool = True) -> Iterator[Any]:
    """The module `ray`, connected to a cluster for the time of the context.

    Args:
        address: of the cluster's head; "local" = a cluster of this process alone; None = the one that $RAY_ADDRESS or
            this machine has.
        num_cpus: of a local cluster; None = those of the machine.
        ship: give the workers this package; a cluster that has it installed does not need that.

    Raises:
        MissingPackageError: Ray is not installed.
        MoeplaceError: there is no such cluster.
    """
    ray = import_ray()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        ray.init(address=LOCAL, num_cpus=num_cpus, include_dashboard=False, **quiet)
    else:
        with packaged(ship and _JOB not in os.environ) as environment:
            try:
                ray.init(address=address or "auto", runtime_env=environment, **quiet)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                raise MoeplaceError(_no_cluster(address, error)) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def packaged(ship: bool = True) -> Iterator[dict[str, Any]]:
    """A runtime environment with this package, as it is here; it needs its libraries installed on the cluster.

    The four folders of a checkout are not importable as `moeplace`: they are put together first, with the metadata
    that says the version. The folder lives as long as the context, and Ray uploads it when it gets the environment.
    """
    if not ship:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="moeplace-ray-") as name:
        root = Path(name) / "moeplace"
        for package in _PACKAGES:
            shutil.copytree(
                _HOME / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
            )
        info = Path(name) / f"moeplace-{version('moeplace')}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(str(metadata("moeplace")), encoding="utf-8")
        yield {"py_modules": [str(root), str(info)]}


def _no_cluster(address: str | None, error: Exception) -> str:
    reason = (" ".join(str(error).split()) or type(error).__name__).split(". ")[0][:200]
    where = "here" if address is None else f"at {address}"
    return f"no Ray cluster {where} (start one with `ray start --head`, or give --address): {reason}"
