"""The four folders are one installable package: every sub-package listed, nothing shadowed, data files shipped."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import package_list

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("profiling", "placement", "runtime", "launch")


def settings() -> dict[str, dict[str, object]]:
    """The table `tool.setuptools` and `project` of pyproject.toml."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {"project": document["project"], "setuptools": document["tool"]["setuptools"]}


def test_every_folder_is_a_listed_package() -> None:
    """A sub-package that is not listed imports fine here and is missing from the wheel."""
    assert settings()["setuptools"]["packages"] == package_list.packages()


def test_folders_map_to_moeplace() -> None:
    """`moeplace.x` is the folder `x`, for the four; short names lie in one folder; nothing else."""
    mapping = settings()["setuptools"]["package-dir"]
    short = {f"moeplace.{name}": f"{package_list.SHORT_NAMES}/{name}" for name in package_list.short_names()}
    assert mapping == {f"moeplace.{folder}": folder for folder in FOLDERS} | short


@pytest.mark.parametrize("name", package_list.short_names())
def test_a_short_name_only_hands_on(name: str) -> None:
    """It may be imported under two names, so it defines nothing: there is no second copy of anything."""
    folder = ROOT / package_list.SHORT_NAMES / name
    assert [path.name for path in folder.rglob("*.py")] == ["__init__.py"]
    body = ast.parse((folder / "__init__.py").read_text()).body
    assert {type(node) for node in body} <= {ast.Expr, ast.ImportFrom, ast.Assign}
    assert [node.targets[0].id for node in body if isinstance(node, ast.Assign)] == ["__all__"]  # type: ignore[attr-defined]
    assert name not in FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_types_are_shipped(folder: str) -> None:
    """Type checkers look for the marker."""
    assert (ROOT / folder / "py.typed").is_file()


def test_standard_profiling_is_not_shadowed() -> None:
    """From Python 3.15 `profiling` is in the standard library and cProfile imports it: ours must not be a package."""
    assert not (ROOT / "profiling" / "__init__.py").exists()
    run = subprocess.run(
        [sys.executable, "-c", "import cProfile"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr


def test_no_module_of_launch_hides_a_dependency() -> None:
    """`python launch/x.py` puts `launch/` first on the path, and so does a script in any of its rooms."""
    names = [re.split(r"[<>=\[; ]", str(name))[0] for name in settings()["project"]["dependencies"]]  # type: ignore[attr-defined]
    taken = {name.lower().replace("-", "_") for name in names} | {"ray", "json"} | set(sys.stdlib_module_names)
    scripts = [path for path in (ROOT / "launch").rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
    folders = {ROOT / "launch"} | {path.parent for path in scripts}
    assert not taken & {path.stem for folder in folders for path in folder.iterdir()}


def pins(name: str) -> dict[str, str]:
    """Normalised name -> version of a file of constraints."""
    lines = (line.split(";")[0].strip() for line in (ROOT / name).read_text().splitlines())
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pairs}


def requirements() -> list[Requirement]:
    """Of the package and all its extras."""
    project = settings()["project"]
    extras = project["optional-dependencies"].values()  # type: ignore[attr-defined]
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]  # type: ignore[misc]
    return [one for one in map(Requirement, lines) if one.name != "moeplace"]


@pytest.mark.parametrize("required", requirements(), ids=str)
def test_the_lock_holds_what_is_allowed(required: Requirement) -> None:
    """Every dependency of use, development and tests is locked, inside its range."""
    assert required.specifier.contains(pins("lock.txt")[canonicalize_name(required.name)])


def test_torch_is_pinned_in_one_release() -> None:
    """The lock names the build that the constraint does."""
    assert pins("constraints.txt") == {"torch": pins("lock.txt")["torch"]}


def test_the_oldest_releases_are_asked_for() -> None:
    """What `make test-oldest` installs lies in the series of each lower bound."""
    command = [sys.executable, ".ci/pins.py", "oldest"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    series = {canonicalize_name(name): bound for name, bound in (line.split("==") for line in printed)}
    for required in requirements():
        for bound in (one.version for one in required.specifier if one.operator == ">="):
            assert series[canonicalize_name(required.name)] == f"{bound}.*"


def test_version_is_installed() -> None:
    """`moeplace` is a namespace package: its version comes from the metadata."""
    assert version("moeplace") == settings()["project"]["version"]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_wheel_has_modules_and_data(tmp_path: Path) -> None:
    """Every module and data file of the repository is in the wheel."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:  # a copy: building leaves build/ behind
        target = tmp_path / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, target)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=tmp_path / "source", check=True, timeout=500)
    inside = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    wanted = [name for name in tracked if name.startswith(FOLDERS) and not name.endswith(".md")]
    installed = {name: name.removeprefix(f"{package_list.SHORT_NAMES}/") for name in wanted if (ROOT / name).is_file()}
    assert not {f"moeplace/{name}" for name in installed.values()} - inside
