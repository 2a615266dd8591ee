"""An engine whose decode steps run in fixed shapes serves what the plain model says, and counts as the exact one."""

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.exchange import capacity
from moeplace.runtime.models.checkpoint import Checkpoint
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import make_oracle
from tests.runtime.placements import placement_for

Served = tuple[list[np.ndarray], list[tuple[int, ...]], np.ndarray, dict[str, Any]]


class Case(NamedTuple):
    """How an engine serves.

    Attributes:
        rooms: a factor of the rooms of messages; less than 1 = some steps do not fit, 0 = whatever travels does not.
    """

    family: str
    size: int
    mode: str = "dispatch-combine"
    node_aware: bool = False
    rule: str = "moeplace"
    rooms: float = 1


def serve_both(context: RankContext, path: Path, oracle: Any, seed: int, case: Case) -> list[Served]:
    """Logits, completions, loads and counters of this rank: exact, then in fixed shapes."""
    whole = capacity.room_for
    with mock.patch.object(capacity, "room_for", lambda mean: (whole(mean) * case.rooms).astype(np.int64)):
        return serve_with_rooms(context, path, oracle, seed, case)


def serve_with_rooms(context: RankContext, path: Path, oracle: Any, seed: int, case: Case) -> list[Served]:
    checkpoint = Checkpoint(path)
    placement = placement_for(checkpoint, context.size, seed=seed, nodes=min(2, context.size))
    group = context.group(placement.node_of_rank, short_messages=False)
    found: list[Served] = []
    for fixed_shapes in (False, True):
        limits = EngineLimits(max_sequences=6, max_length=20, max_prefill_tokens=12, fixed_shapes=fixed_shapes)
        engine = Engine(
            checkpoint,
            placement,
            mode=case.mode,
            group=group,
            dtype=torch.float64,
            limits=limits,
            node_aware=case.node_aware,
            replica_rule=case.rule,
        )
        group.counters.reset()
        logits = [block.numpy() for block in engine.score(oracle.sequences, prompt_lengths=oracle.prompt_lengths)]
        completions = [completion.token_ids for completion in engine.generate(oracle.requests)]
        found.append((logits, completions, engine.window.load.copy(), engine.counters()))
    return found


@pytest.mark.parametrize(
    "case",
    [
        Case("mixtral", 1),
        Case("mixtral", 3, node_aware=True, rule="balanced"),
        Case("deepseek_v2", 3),
        Case("olmoe", 3, "coherent"),
        Case("gpt_oss", 2, "coherent", rule="balanced"),
        Case("deepseek_v2", 3, "coherent"),
        Case("qwen2_moe", 3, "coherent", rooms=0.4),
        Case("olmoe", 3, "coherent", rooms=0),
    ],
    ids=str,
)
def test_both_forms_serve_alike(pool: RankPool, tmp_path: Path, case: Case, dated_seed: int) -> None:
    """Logits and tokens are the plain model's; loads and assignments are those of the exact form, also by rule, and
    where steps that had no room ran again."""
    oracle = make_oracle(case.family, tmp_path)
    results = pool.run(serve_both, tmp_path, oracle, dated_seed % 1000, case, size=case.size)
    tolerance = 2e-5 if case.family == "deepseek_v2" else 1e-7
    for exact, fixed in results:
        for ours, plain in zip(fixed[0], oracle.logits, strict=True):
            np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance)
        assert fixed[1] == exact[1] == oracle.completions
        np.testing.assert_array_equal(fixed[2], exact[2])
        if case.size > 1:
            assert "exceeded" not in exact[3]["collectives_outside_layers"]
            assert fixed[3]["collectives_outside_layers"]["exceeded"] > 0
        if case.rooms == 0:
            assert fixed[3]["steps"] > exact[3]["steps"]
        if case.rooms == 1:
            assert fixed[3]["tokens_computed"] == exact[3]["tokens_computed"]
