"""The invariant: for any valid placement, mode and number of ranks, the logits are those of the plain model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.placement import MODES
from moeplace.runtime.batch import Request
from moeplace.runtime.checkpoint import Checkpoint
from moeplace.runtime.engine import Engine, EngineLimits
from moeplace.runtime.group import RankGroup
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import FAMILIES, Oracle, make_oracle
from tests.runtime.placements import random_placement

TOLERANCE, DEEPSEEK_TOLERANCE = 1e-7, 2e-5
"""Absolute, for logits around 1 in float64; DeepSeek's own modules compute routers and rotations in float32."""
VARIANTS = [(mode, False) for mode in MODES] + [("dispatch-combine", True)]


def serve(
    context: RankContext, path: Path, sequences: Any, prompt_lengths: Any, requests: list[Request], seed: int
) -> list[tuple[list[np.ndarray], list[tuple[int, ...]], dict[str, Any]]]:
    """Logits, completions and counters of every mode on this rank, under a random placement with replicas."""
    checkpoint = Checkpoint(path)
    results = []
    group = RankGroup(context.store, rank=context.rank, size=context.size, timeout=context.timeout)
    placement = random_placement(
        checkpoint.num_layers,
        int(checkpoint.experts_per_layer[0]),
        context.size,
        seed=seed,
        extra_slots=seed % 3,
        nodes=min(2, context.size),
        layer_ids=checkpoint.layer_ids,
        num_hidden_layers=checkpoint.num_hidden_layers,
    )
    group = group.with_nodes(placement.node_of_rank)
    limits = EngineLimits(max_sequences=4 * context.size, max_length=20, max_prefill_tokens=12)
    for mode, node_aware in VARIANTS:
        engine = Engine(
            checkpoint, placement, mode=mode, group=group, dtype=torch.float64, limits=limits, node_aware=node_aware
        )
        logits = [block.numpy() for block in engine.score(sequences, prompt_lengths=prompt_lengths)]
        completions = engine.generate(requests if context.rank == 0 else None)
        results.append((logits, [c.token_ids for c in completions], engine.counters()))
        engine.group.counters.reset()
    return results


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return make_oracle(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_logits_and_tokens_are_those_of_the_plain_model(pool: RankPool, oracle: Oracle, size: int) -> None:
    """Every family, mode and number of ranks: teacher-forced logits across the prefill/decode border, and tokens."""
    arguments = (oracle.path, oracle.sequences, oracle.prompt_lengths, oracle.requests, size)
    for rank, results in enumerate(pool.run(serve, *arguments, size=size)):
        tolerance = DEEPSEEK_TOLERANCE if "deepseek" in oracle.path.name else TOLERANCE
        for (mode, node_aware), (logits, completions, _) in zip(VARIANTS, results, strict=True):
            label = f"rank {rank}, {mode}{', node-aware' if node_aware else ''}"
            for ours, plain in zip(logits, oracle.logits, strict=True):
                np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance, err_msg=label)
            assert completions == oracle.completions, label
