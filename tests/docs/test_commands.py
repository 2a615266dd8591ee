"""What README and docs tell people to type: it is accepted, and it runs."""

from pathlib import Path

import pytest

from moeplace.launch.cli import DONE, build_parser, main
from tests.docs.commands import PAGES, Shown, shown_commands
from tests.docs.scenes import ELSEWHERE, SCENES, TIME_LIMIT

COMMANDS = [shown for page in PAGES for shown in shown_commands(page)]


def is_run_elsewhere(shown: Shown) -> bool:
    return any(shown.words[: len(start.split())] == tuple(start.split()) for start in ELSEWHERE)


def own_words(shown: Shown) -> tuple[str, ...]:
    """The words after `moeplace`, however it is started; none for other programs."""
    words = shown.words
    if words[0] == "moeplace":
        return words[1:]
    if "moeplace.launch.cli" in words:
        return words[words.index("moeplace.launch.cli") + 1 :]
    if "launch/serve.py" in words:
        return ("serve", *words[words.index("launch/serve.py") + 1 :])
    return ()


def test_the_pages_have_commands() -> None:
    """The extraction sees what a reader sees: a page that loses its commands would pass in silence."""
    pages = {shown.page for shown in COMMANDS}
    assert {"README.md", "guide-sglang-deepseek-v3.md", "serving.md", "clusters.md", "concepts.md"} <= pages
    assert ("moeplace", "stats", "t.trace", "--ranks", "8") in {shown.words for shown in COMMANDS}


@pytest.mark.parametrize("shown", [s for s in COMMANDS if own_words(s)], ids=lambda s: f"{s.page}:{s.line}")
def test_a_shown_command_is_accepted(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    """Its flags exist and fit together as far as the parser knows."""
    if "synopsis" in shown.reason:
        pytest.skip("a synopsis, with its brackets")
    words = list(own_words(shown))
    try:
        build_parser(words).parse_args(words)
    except SystemExit:
        pytest.fail(f"{shown.page}:{shown.line}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_or_says_why_not(page: Path) -> None:
    """A page with commands has a scene, or a reason above each block of them."""
    silent = [s for s in shown_commands(page) if not s.reason and not is_run_elsewhere(s) and page.name not in SCENES]
    assert not silent


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", sorted(SCENES))
def test_a_page_runs_from_its_first_to_its_last_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in one folder, each with exit code 0."""
    names = SCENES[name](tmp_path)
    monkeypatch.chdir(tmp_path)
    page = next(page for page in PAGES if page.name == name)
    run = [shown for shown in shown_commands(page) if not shown.reason and not is_run_elsewhere(shown)]
    assert run
    for shown in run:
        words = [names.get(word, word) for word in own_words(shown)]
        assert words, f"{name}:{shown.line} is no command of ours; say above it why it is not run"
        if words[0] in ("solve", "compare") or (words[0] == "stats" and "--ranks" in words):
            words += ["--time-limit", str(TIME_LIMIT)]
        assert main(words) == DONE, f"{name}:{shown.line}: {capsys.readouterr().err}"
