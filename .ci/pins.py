"""Pins of releases: `oldest` of what pyproject.toml allows, or `lock`, what an environment has.

    python .ci/pins.py oldest              one line a dependency: the series of its lower bound
    ENVIRONMENT/bin/python .ci/pins.py lock   one line a package of that environment, for `pip install -c`

A locked release may have no wheel for a Python newer than the one it was tested on. Each is asked for (pip resolves
without installing); where there is none, an environment marker frees the package on those Pythons. Torch is not asked
for: CPU builds of it come from a folder that has them for one Python, and elsewhere its releases have all wheels.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path

NEWER_PYTHONS = ("3.12", "3.13", "3.14")
UNLOCKED = {"pip", "moeplace"}
_NO_WHEEL = re.compile(r"No matching distribution found for ([A-Za-z0-9._-]+)==")


def oldest() -> list[str]:
    """`name==X.*` for each `name>=X` of pyproject.toml."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    bounds = (re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?>=([0-9.]+)", one) for one in wanted)
    return sorted(f"{bound[1]}=={bound[2]}.*" for bound in bounds if bound)


def locked() -> dict[str, str]:
    """Normalised name -> version, without a local part such as +cpu."""
    found = {re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one.version.split("+")[0] for one in distributions()}
    return {name: version for name, version in sorted(found.items()) if name not in UNLOCKED}


def without_wheel(pins: dict[str, str], python: str) -> set[str]:
    """Names of the pinned releases that have no wheel for a Python."""
    missing: set[str] = set()
    while True:
        asked = [f"{name}=={version}" for name, version in pins.items() if name not in missing | {"torch"}]
        with tempfile.TemporaryDirectory() as folder:
            options = ["--dry-run", "--no-deps", "--only-binary=:all:", "--python-version", python, "--target", folder]
            command = [sys.executable, "-m", "pip", "install", "-q", *options, *asked]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode == 0:
            return missing
        found = _NO_WHEEL.search(run.stderr)
        if found is None:
            sys.exit(f"pins.py: pip failed for Python {python}: {run.stderr.strip().splitlines()[-1]}")
        missing.add(found[1])


def lock() -> list[str]:
    """Lines of the lock file."""
    pins = locked()
    ends = {name: python for python in reversed(NEWER_PYTHONS) for name in without_wheel(pins, python)}
    tested = ".".join(map(str, sys.version_info[:2]))
    head = [
        f"# Written by `make lock` on Python {tested}: the releases that the tests were run with. Not for editing.",
        "# torch comes as the CPU build where pip is told of a folder that has it.",
    ]
    marked = (f'{name}=={version}; python_version < "{ends[name]}"' for name, version in pins.items() if name in ends)
    plain = (f"{name}=={version}" for name, version in pins.items() if name not in ends)
    return [*head, *sorted([*marked, *plain])]


if __name__ == "__main__":
    print("\n".join({"oldest": oldest, "lock": lock}[sys.argv[1]]()))
