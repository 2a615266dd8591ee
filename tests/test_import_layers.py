"""Imports go one way: profiling <- placement <- runtime <- launch; torch and Ray stay where they belong."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("profiling", "placement", "runtime", "launch")
TORCH_ALLOWED = ("runtime/", "launch/", "profiling/recorder.py")
RAY_ALLOWED = ("launch/",)


def modules(*folders: str) -> list[str]:
    """Paths of all Python files in some folders, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: str) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, at its top or inside functions, with their lines."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(), filename=path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively; the full name says where from"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", modules(*LAYERS))
def test_imports_go_one_way(path: str) -> None:
    """A module imports its own layer and those below."""
    above = LAYERS[LAYERS.index(path.split("/")[0]) + 1 :]
    wrong = [f"{path}:{line} imports {name}" for name, line in imports(path) if name.startswith(_names(above))]
    assert not wrong


@pytest.mark.parametrize(("package", "allowed"), [("torch", TORCH_ALLOWED), ("ray", RAY_ALLOWED)])
def test_heavy_packages_stay_where_they_belong(package: str, allowed: tuple[str, ...]) -> None:
    """torch is for the runtime, the launchers and the recorder; Ray for the launchers."""
    wrong = [
        f"{path}:{line}"
        for path in modules(*LAYERS)
        if not path.startswith(allowed)
        for name, line in imports(path)
        if name.split(".")[0] == package
    ]
    assert not wrong


@pytest.mark.parametrize("path", modules(*LAYERS, "tests", "benchmarks", "examples"))
def test_no_bare_import(path: str) -> None:
    """`import placement` would be a second copy of every module."""
    wrong = [f"{path}:{line} imports {name}" for name, line in imports(path) if name.split(".")[0] in LAYERS]
    assert not wrong


def test_optimisers_are_imported_in_one_order() -> None:
    """ortools must come before PuLP (which imports highspy where it finds it), so a single module imports both."""
    users = {
        path for path in modules(*LAYERS) for name, _ in imports(path) if name.split(".")[0] in ("pulp", "highspy")
    }
    assert len(users) <= 1, users


def _names(layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"moeplace.{layer}" for layer in layers)
