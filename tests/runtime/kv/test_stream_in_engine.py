"""K/V that travel while the next step computes: nothing reads them before they are there, whatever comes in between."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import VOCABULARY, save_checkpoint
from tests.runtime.placements import random_placement

LIMITS = EngineLimits(max_sequences=4, max_length=40)


def make_engine(group: RankGroup, path: Path, seed: int) -> Engine:
    placement = random_placement(3, 6, group.size, seed=seed, nodes=min(2, group.size))
    return Engine(path, placement, mode="coherent", group=group, dtype=torch.float64, limits=LIMITS)


def random_requests(seed: int, count: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(0, VOCABULARY, rng.integers(1, 9)).tolist()) for _ in range(count)]
    return [Request(f"r{n}", prompt, int(rng.integers(4, 14)), stop_ids=()) for n, prompt in enumerate(prompts)]


def lose_what_travels(context: RankContext, path: Path, seed: int) -> tuple[list[Any], list[Any], int]:
    """Completions undisturbed; and of an engine that takes steps back whose K/V were on their way, and spoils them."""
    rng, group = np.random.default_rng(seed), context.group()
    expected = make_engine(group, path, seed).generate(random_requests(seed, 6))
    engine, done, taken_back = make_engine(group, path, seed), {}, 0
    for request in random_requests(seed, 6):
        engine.add_request(request)
    while not engine.scheduler.is_idle:
        done.update({completion.request_id: completion for completion in engine.step()})
        if rng.random() < 0.3:  # alike on all ranks
            before = {id(s): s.cached for s in engine.scheduler.running}
            engine.executor.forget_unsettled()
            for sequence in engine.scheduler.running:
                taken_back += before[id(sequence)] - sequence.cached
                for slab in (*engine.executor.cache.keys, *engine.executor.cache.values):
                    slab[sequence.row, :, sequence.cached :] = 7.0  # a number: what is masked is multiplied by zero
    return [c.token_ids for c in expected], [done[c.request_id].token_ids for c in expected], taken_back


@pytest.mark.parametrize("size", [2, 3])
def test_a_step_is_taken_back(pool: RankPool, tmp_path: Path, size: int, dated_seed: int) -> None:
    """What had not arrived is computed again from the tokens: the same tokens follow."""
    save_checkpoint("olmoe", tmp_path)
    results = pool.run(lose_what_travels, tmp_path, dated_seed % 1000, size=size)
    for expected, found, _ in results:
        assert found == expected
    assert sum(taken_back for *_, taken_back in results) > 0
