"""`serve --precision` by HTTP: ranks that keep experts in the bits of a plan answer as an engine with the same numbers,
also while experts move, after a rank was killed and with the one that follows it; the health check says what is not
exact."""

from pathlib import Path

import httpx
import torch

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.experts.rounding import PRECISIONS
from moeplace.runtime.models.precisions.rounded_checkpoint import RoundedCheckpoint
from tests.launch.http_front.changes import administered_server, check_streams, random_goal, texts_of
from tests.launch.http_front.http_process import WAIT
from tests.launch.precision_plans import random_plan
from tests.shared_data import tiny_moe_path

TOKENS = 50


def test_members_come_go_and_exchange_experts_in_few_bits(tmp_path: Path, dated_seed: int) -> None:
    """Two ranks with little fast memory; the text is that of one that has the rounded numbers in plain matrices."""
    plan = random_plan(tmp_path / "plan.json", dated_seed)
    engine = Engine(RoundedCheckpoint(tiny_moe_path(), PRECISIONS, plan.choice_LE), dtype=torch.float32)
    expected, goal = texts_of(engine, TOKENS), random_goal(engine, dated_seed)
    words = ("--precision", str(tmp_path / "plan.json"), "--fast-slots", "4")
    with administered_server(tmp_path, *words) as server:
        assert httpx.get(f"{server.url}/healthz", timeout=WAIT).json()["precision"] == {
            "experts": plan.counts(), "predicted_error": plan.error,
        }  # fmt: skip
        check_streams(server, expected, TOKENS, goal, tmp_path)
