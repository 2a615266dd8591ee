"""The compiled kernels of moeplace, and which of them Python code calls."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def kernel_modules() -> list[str]:
    """Dotted names of the modules with compiled functions."""
    paths = [path for floor in ("profiling", "placement") for path in sorted((ROOT / floor).rglob("*.py"))]
    return [
        "moeplace." + ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths if "@njit" in p.read_text()
    ]


def kernels() -> dict[str, Any]:
    """`module.function` -> compiled function."""
    from numba.core.registry import CPUDispatcher

    found = {}
    for module in kernel_modules():
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, CPUDispatcher) and value.py_func.__module__ == module:
                found[f"{module}.{name}"] = value
    return found


def called_from_python() -> set[str]:
    """`module.function` of the kernels that some function of moeplace uses which is not a kernel itself."""
    names = set(kernels())
    used = set()
    for path in (
        path for floor in ("profiling", "placement", "runtime", "launch") for path in (ROOT / floor).rglob("*.py")
    ):
        module = "moeplace." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        here = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        used |= {here.get(name, f"{module}.{name}") for name in _names_outside_kernels(tree)} & names
    return used


def _sources(*floors: str) -> list[Path]:
    return sorted(path for floor in floors for path in (ROOT / floor).rglob("*.py"))


def _names_outside_kernels(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and any("njit" in ast.unparse(one) for one in node.decorator_list):
            continue
        if isinstance(node, ast.Name):
            yield node.id
        yield from _names_outside_kernels(node)
