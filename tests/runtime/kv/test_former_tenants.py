"""Masked means unread: what a former tenant left in a row of the K/V cache does not reach the next one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import VOCABULARY, save_checkpoint
from tests.runtime.placements import random_placement

LIMITS = EngineLimits(max_sequences=4, max_length=24, max_prefill_tokens=5)


def random_requests(rng: np.random.Generator, name: str, count: int) -> list[Request]:
    """Of very different lengths, so that batches are uneven and rows change hands at different times."""
    prompts = [tuple(rng.integers(0, VOCABULARY, rng.integers(1, 12))) for _ in range(count)]
    return [Request(f"{name}{n}", prompt, int(rng.integers(1, 9)), stop_ids=()) for n, prompt in enumerate(prompts)]


def spoil(engine: Engine) -> None:
    """Make what tenants left unusable."""
    for slabs, value in ((engine.executor.cache.keys, torch.inf), (engine.executor.cache.values, torch.nan)):
        for slab in slabs:
            slab[slab != 0] = value


def serve_after(context: RankContext, path: Path, mode: str, seed: int) -> tuple[Any, Any]:
    """Completions of a new engine, and of one whose rows were spoiled after former tenants."""
    rng, group, answers = np.random.default_rng(seed), context.group(), []
    former, later = random_requests(rng, "former", 6), random_requests(rng, "later", 6)
    for spoiled in (False, True):
        placement = random_placement(3, 6, context.size, seed=seed)
        engine = Engine(path, placement, mode=mode, group=group, dtype=torch.float64, limits=LIMITS)
        if spoiled:
            engine.generate(former)
            spoil(engine)
        answers.append([completion.token_ids for completion in engine.generate(later)])
    return answers[0], answers[1]


@pytest.mark.parametrize(
    ("size", "mode", "family"),
    [(1, "dispatch-combine", "gpt_oss"), (2, "dispatch-combine", "olmoe"), (3, "coherent", "gpt_oss")],
)
def test_nothing_of_a_former_tenant_is_read(
    pool: RankPool, tmp_path: Path, size: int, mode: str, family: str, dated_seed: int
) -> None:
    """NaN and infinity wherever somebody wrote: the next tenants' tokens are those of a new engine, with boolean and
    with additive masks and with windows, where K/V are at home and where they are everywhere."""
    save_checkpoint(family, tmp_path)
    for fresh, after in pool.run(serve_after, tmp_path, mode, dated_seed % 1000, size=size):
        assert fresh == after
