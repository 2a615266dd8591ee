"""An engine whose decode steps run in fixed shapes serves what the plain model says, and counts as the exact one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.models.checkpoint import Checkpoint
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import make_oracle
from tests.runtime.placements import placement_for

Served = tuple[list[np.ndarray], list[tuple[int, ...]], np.ndarray, dict[str, Any]]


def serve_both(context: RankContext, path: Path, oracle: Any, seed: int, node_aware: bool, rule: str) -> list[Served]:
    """Logits, completions, loads and counters of this rank: exact, then in fixed shapes."""
    checkpoint = Checkpoint(path)
    placement = placement_for(checkpoint, context.size, seed=seed, nodes=min(2, context.size))
    group = context.group(placement.node_of_rank, short_messages=False)
    found: list[Served] = []
    for fixed_shapes in (False, True):
        limits = EngineLimits(max_sequences=6, max_length=20, max_prefill_tokens=12, fixed_shapes=fixed_shapes)
        engine = Engine(
            checkpoint,
            placement,
            mode="dispatch-combine",
            group=group,
            dtype=torch.float64,
            limits=limits,
            node_aware=node_aware,
            replica_rule=rule,
        )
        group.counters.reset()
        logits = [block.numpy() for block in engine.score(oracle.sequences, prompt_lengths=oracle.prompt_lengths)]
        completions = [completion.token_ids for completion in engine.generate(oracle.requests)]
        found.append((logits, completions, engine.window.load.copy(), engine.counters()))
    return found


@pytest.mark.parametrize(
    ("family", "size", "node_aware", "rule"),
    [
        ("mixtral", 1, False, "moeplace"),
        ("mixtral", 3, True, "balanced"),
        ("deepseek_v2", 3, False, "moeplace"),
    ],
)
def test_both_forms_serve_alike(
    pool: RankPool, tmp_path: Path, family: str, size: int, node_aware: bool, rule: str, dated_seed: int
) -> None:
    """Logits and tokens are the plain model's; loads and assignments are those of the exact form, also by rule."""
    oracle = make_oracle(family, tmp_path)
    results = pool.run(serve_both, tmp_path, oracle, dated_seed % 1000, node_aware, rule, size=size)
    tolerance = 2e-5 if family == "deepseek_v2" else 1e-7
    for exact, fixed in results:
        for ours, plain in zip(fixed[0], oracle.logits, strict=True):
            np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance)
        assert fixed[1] == exact[1] == oracle.completions
        np.testing.assert_array_equal(fixed[2], exact[2])
        assert fixed[3]["tokens_computed"] == exact[3]["tokens_computed"]
        if size > 1:
            assert "exceeded" not in exact[3]["collectives_outside_layers"]
            assert fixed[3]["collectives_outside_layers"]["exceeded"] > 0
