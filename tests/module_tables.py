"""The module tables of docs/architecture.md: what every room is, and the first sentence of every module's docstring.

python -m tests.module_tables writes them anew, and the list of packages in pyproject.toml.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests import package_list

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("profiling", "placement", "runtime", "launch")
_TABLE = re.compile(r"### (?P<folder>[a-z_/]+)\n\n(?:[^|#\n].*\n\n)?\| module \| is \|\n\|---\|---\|\n(?:\|.*\n)*")


def packages() -> list[str]:
    """The folders with modules, parents before children, in the order of the layers."""
    found: list[str] = []
    for folder in FOLDERS:
        inner = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        found += sorted(inner)
    return [folder for folder in found if any(_modules(folder))]


def table(folder: str) -> str:
    """The table of a folder, heading included."""
    rows = "".join(f"| `{path.name}` | {first_sentence(path)} |\n" for path in _modules(folder))
    package = ROOT / folder / "__init__.py"
    room = first_sentence(package) if package.is_file() else ""
    return f"### {folder}\n\n{room}{bool(room) * chr(10) * 2}| module | is |\n|---|---|\n{rows}"


def first_sentence(path: Path) -> str:
    """What a module is, as its docstring says it first."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    sentence = re.match(r".*?\.(?=\s+[A-Z`(]|$)", text)
    return (sentence.group() if sentence else text).replace("|", "\\|")


def written(page: str) -> dict[str, str]:
    """The tables of the page, by folder."""
    return {match["folder"]: match.group() for match in _TABLE.finditer(page)}


def renew(page: str) -> str:
    """The page with the tables of all folders."""
    matches = list(_TABLE.finditer(page))
    tables = "\n".join(table(folder) for folder in packages())
    return page[: matches[0].start()] + tables + page[matches[-1].end() :]


def _modules(folder: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / folder).glob("*.py")) if path.name != "__init__.py")


if __name__ == "__main__":
    PAGE.write_text(renew(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PROJECT = ROOT / "pyproject.toml"
    PROJECT.write_text(package_list.renew(PROJECT.read_text(encoding="utf-8")), encoding="utf-8")
