"""The commands that README and docs show, taken out of the pages.

A block of commands that is not run stands below a line `<!-- not run: reason -->`, which renders as nothing.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?ms)^(?:<!-- not run: (?P<reason>[^\n]*?) -->\n+)?```(?:\w*)\n(?P<body>.*?)^```")
_PROGRAMS = ("moeplace", "torchrun", "python", "make", "sbatch", "curl", "ray", "pip", "bash")


@dataclass(frozen=True)
class Shown:
    """A command on a page.

    Attributes:
        page: file name.
        line: its number on the page.
        words: the command, without assignments before it.
        reason: why it is not run; "" = it is.
    """

    page: str
    line: int
    words: tuple[str, ...]
    reason: str


def shown_commands(page: Path) -> list[Shown]:
    """Every command of the page's code blocks, in order; lines that end in a backslash go on."""
    text, found = page.read_text(encoding="utf-8"), []
    for block in _BLOCK.finditer(text):
        first = text.count("\n", 0, block.start("body")) + 1
        lines = block["body"].splitlines()
        number = 0
        while number < len(lines):
            start, whole = number, lines[number]
            while whole.endswith("\\"):
                number += 1
                whole = whole[:-1] + lines[number]
            number += 1
            words = _words(whole)
            if words:
                found.append(Shown(page.name, first + start, words, block["reason"] or ""))
    return found


def _words(line: str) -> tuple[str, ...]:
    """The words of a shell line that is one of our commands, else none."""
    if not re.match(r"(?:[A-Z_]+=\S+ )*(?:launch/\S+|" + "|".join(_PROGRAMS) + r")\b", line):
        return ()
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return tuple(words)
