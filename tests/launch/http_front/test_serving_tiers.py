"""`serve --fast-slots` by HTTP: ranks whose fast memory holds three experts a layer answer as the plain engine does,
also while a placement changes, after a rank was killed and with the one that follows it."""

from pathlib import Path

import pytest
import torch

from moeplace.launch.cli import main
from moeplace.runtime.engine.engine import Engine
from tests.launch.http_front.changes import administered_server, check_streams, random_goal, texts_of
from tests.shared_data import tiny_moe_path

TOKENS = 60


def test_placements_change_and_ranks_die_with_little_fast_memory(tmp_path: Path, dated_seed: int) -> None:
    """Streams go through all of it with the text of an engine that has everything in fast memory."""
    engine = Engine(tiny_moe_path(), dtype=torch.float32)
    expected, goal = texts_of(engine, TOKENS), random_goal(engine, dated_seed)
    with administered_server(tmp_path, "--fast-slots", "3", "--host-slots", "9") as server:
        check_streams(server, expected, TOKENS, goal, tmp_path)


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--fast-slots", "0"], "fast_slots (0) must be at least 1"),
    (["--fast-slots", "2", "--host-slots", "-1"], "host_slots (-1) must be at least 0"),
    (["--host-slots", "2"], "--host-slots (2) needs --fast-slots"),
])  # fmt: skip
def test_bad_budgets_are_one_sentence(flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any rank starts."""
    assert main(["serve", str(tiny_moe_path()), "--http", "127.0.0.1:0", *flags]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert "\n" not in error.strip()
