"""Imports go one way: between the four floors, and between the rooms of each (`rooms.toml`); torch and Ray stay put."""

import ast
import functools
import tomllib
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("profiling", "placement", "runtime", "launch")
TORCH_ALLOWED = ("runtime/", "launch/", "profiling/recording/")
RAY_ALLOWED = ("launch/",)
MOST_MODULES = 20


def modules(*folders: str) -> list[str]:
    """Paths of all Python files in some folders, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def imports(path: str) -> list[tuple[str, int]]:
    """Dotted names that a file imports, at its top or inside functions, with their lines."""
    return list(_imports(path))


def _imports(path: str) -> Iterator[tuple[str, int]]:
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


@functools.cache
def room_of(module: str) -> str:
    """The room of a dotted name: the innermost folder it lies in, or the module beside the folders of a floor."""
    parts = module.removeprefix("moeplace.").split(".")
    while len(parts) > 2 and not ROOT.joinpath(*parts).is_dir():
        parts.pop()
    return ".".join(parts)


@functools.cache
def rooms() -> dict[str, set[str]]:
    """Room -> rooms that it may import, from the table."""
    table = tomllib.loads((ROOT / "tests" / "rooms.toml").read_text())
    known = [room for floor in table.values() for room in floor]
    allowed: dict[str, set[str]] = {}
    for floor in table.values():
        for room, names in floor.items():
            whole = tuple(name.removesuffix("*") for name in names.split() if name.endswith(".*"))
            allowed[room] = {one for one in known if one in names.split() or one.startswith(whole)} - {room}
    return allowed


@functools.cache
def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, imported room) -> the imports, `file:line name`."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in modules(*LAYERS):
        here = room_of(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        for name, line in imports(path):
            if name.startswith("moeplace.") and room_of(name) != here:
                found.setdefault((here, room_of(name)), []).append(f"{path}:{line} {name}")
    return found


def test_the_table_knows_every_room() -> None:
    """Each folder with modules, and each module beside the folders of its floor, has its line, and no other has."""
    names = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in modules(*LAYERS)}
    assert {room_of(name) for name in names} - set(LAYERS) == set(rooms())


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_room_imports_what_its_line_says(room: str) -> None:
    """Any other arrow fails, inside functions too."""
    wrong = [
        use for (here, there), uses in arrows().items() if here == room and there not in rooms()[room] for use in uses
    ]
    assert not wrong


def test_rooms_have_no_circle() -> None:
    """Neither as the table allows nor as the code is."""
    for graph in (nx.DiGraph(list(arrows())), nx.DiGraph([(a, b) for a, allowed in rooms().items() for b in allowed])):
        circles = [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]
        assert not circles


def test_no_folder_is_a_hall() -> None:
    """At most twenty modules lie beside each other."""
    folders = [path.rsplit("/", 1)[0] for path in modules(*LAYERS) if not path.endswith("__init__.py")]
    assert not {folder: folders.count(folder) for folder in folders if folders.count(folder) > MOST_MODULES}


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
