"""The list of packages in pyproject.toml: every folder with modules, and the short names.

`python -m tests.module_tables` writes it anew.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("profiling", "placement", "runtime", "launch")
SHORT_NAMES = "placement/names"
"""Where packages lie that are installed as `moeplace.NAME` and only hand on what others have."""
_LIST = re.compile(r"(?<=\npackages = \[  # python -m tests\.module_tables renews this list\n).*?(?=\n\])", re.DOTALL)


def packages() -> list[str]:
    """Dotted names, floor by floor."""
    found: list[str] = []
    for folder in FOLDERS:
        inner = {path.parent.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
        found += sorted(".".join(("moeplace", *path.parts)) for path in inner if not _is_short(path))
    return found + [f"moeplace.{name}" for name in short_names()]


def short_names() -> list[str]:
    """The packages in the folder of short names."""
    return sorted(path.parent.name for path in (ROOT / SHORT_NAMES).glob("*/__init__.py"))


def renew(project: str) -> str:
    """The text of pyproject.toml with the list of all packages."""
    return _LIST.sub("\n".join(f'    "{name}",' for name in packages()), project, count=1)


def _is_short(folder: Path) -> bool:
    return folder.as_posix().startswith(SHORT_NAMES)
