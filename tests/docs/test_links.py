"""Links of README and docs lead somewhere: to a file that exists and, after a #, to a heading or an anchor of it."""

import re
from pathlib import Path, PurePosixPath

import pytest

from tests.docs.commands import PAGES, ROOT

LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "launch/data/README.md", *sorted(ROOT.glob("benchmarks/results/*.md"))]
_LINK = re.compile(r"\[(?P<words>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_PATH = re.compile(r"`((?:placement|profiling|runtime|launch|tests|docs|benchmarks|examples)/[\w./-]+)`")
_PLACEHOLDER = "NAME"


def anchors(page: Path) -> set[str]:
    """What a # may name on a page: its headings as GitHub makes anchors of them, and ids of its own."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'id="([^"]+)"', text))


def broken(page: Path) -> list[str]:
    """What a reader of the page would stumble over, each with its line."""
    text, found = page.read_text(encoding="utf-8"), []
    for link in _LINK.finditer(text):
        file, _, anchor = link["target"].partition("#")
        if file.startswith(("http:", "https:")):
            continue
        target, line = (page.parent / file if file else page), text.count("\n", 0, link.start()) + 1
        words = PurePosixPath(link["words"].strip("`"))
        if not target.exists():
            found.append(f"line {line}: {link['target']} does not exist")
        elif anchor and anchor not in anchors(target):
            found.append(f"line {line}: {file or page.name} has no #{anchor}")
        elif link["words"].endswith(".py`") and not target.resolve().as_posix().endswith(f"/{words}"):
            found.append(f"line {line}: `{words}` leads to {link['target']}")
    for path in _PATH.findall(text):
        if _PLACEHOLDER not in path and not (ROOT / path).exists():
            found.append(f"{path} does not exist")
    return found


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_exist(page: Path) -> None:
    assert not broken(page)


def test_what_leads_nowhere_is_seen(tmp_path: Path) -> None:
    """A missing file, a missing heading, a name that belongs to another file."""
    (tmp_path / "other.md").write_text("# A heading: here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](none.md) [b](other.md#a-heading-here) [c](other.md#there) [`x.py`](other.md) `runtime/none.py` "
        "[d](https://example.org)\n"
    )
    assert [each.split(": ")[-1].split(" ")[0] for each in broken(page)] == [
        "none.md",
        "other.md",
        "`x.py`",
        "runtime/none.py",
    ]
