"""Prompts that begin like others take over their K/V: which tokens run then, and what stays unread."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.kv.views import rotates_by_length
from tests.model_families import save_family
from tests.runtime.checkpoints import FAMILIES, VOCABULARY, save_checkpoint

LIMITS = EngineLimits(max_sequences=4, max_length=64)


def make_engine(path: Path, **limits: Any) -> Engine:
    return Engine(path, dtype=torch.float64, limits=EngineLimits(**{**vars(LIMITS), **limits}))


def tokens(seed: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist())


def ask(engine: Engine, prompt: tuple[int, ...], new: int = 5) -> tuple[tuple[int, ...], int, int]:
    """Tokens, and how many of the prompt were taken over and run."""
    engine.group.counters.reset()
    engine.window.reset()
    (completion,) = engine.generate([Request("a", prompt, new, stop_ids=())])
    run = int(engine.window.load.sum()) // (engine.checkpoint.num_layers * engine.checkpoint.top_k)
    return completion.token_ids, engine.group.counters.tokens_reused, run - (new - 1)


def test_a_conversation_runs_what_is_new(gpt_oss: Path) -> None:
    """The second turn begins with the first and its answer: only what was added runs, and the answer is the same."""
    engine, plain = make_engine(gpt_oss), make_engine(gpt_oss, reuses_prefixes=False)
    prompt = tokens(1, 20)
    answer, reused, run = ask(engine, prompt)
    assert (reused, run) == (0, 20)
    second = (*prompt, *answer, *tokens(2, 6))
    expected = ask(plain, second)
    assert expected[1:] == (0, 31)
    assert ask(engine, second) == (expected[0], 24, 7)  # the last token that was drawn has no K/V
    assert ask(engine, second) == (expected[0], 30, 1)
    assert ask(engine, prompt) == (answer, 19, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_over(tmp_path: Path, family: str) -> None:
    """A live row, from which is copied, and a free one, in place."""
    save_checkpoint(family, tmp_path)
    stem = tokens(3, 22)
    requests = [Request(f"{n}", (*stem, *tokens(n, 3 + n)), 4 + n, stop_ids=()) for n in range(4)]
    expected = make_engine(tmp_path, reuses_prefixes=False).generate(requests)
    engine, found = make_engine(tmp_path), []
    engine.add_request(requests[0])
    found += engine.step()
    for request in requests[1:]:
        engine.add_request(request)
    while not engine.scheduler.is_idle:
        found += engine.step()
    assert engine.group.counters.tokens_reused >= 3 * 22
    assert sorted(found, key=lambda c: c.request_id) == expected
    assert engine.generate(requests) == expected


def test_several_completions_of_a_prompt_run_it_once(gpt_oss: Path) -> None:
    """Drawn ones: each has the tokens that it has alone."""
    prompt = tokens(9, 30)
    asked = [Request(str(n), prompt, 5, SamplingParameters(1.0, seed=1, choice=n), stop_ids=()) for n in range(4)]
    expected = make_engine(gpt_oss, reuses_prefixes=False).generate(asked)
    engine = make_engine(gpt_oss)
    assert engine.generate(asked) == expected
    assert engine.group.counters.tokens_reused == 3 * 29


def test_nothing_beyond_what_is_taken_over_is_read(gpt_oss: Path) -> None:
    """NaN and infinity behind the common beginning, in the row itself and in one that is copied from."""
    stem = tokens(4, 24)
    first, second = Request("a", (*stem, *tokens(5, 9)), 30, stop_ids=()), (*stem, *tokens(6, 3))
    expected = ask(make_engine(gpt_oss, reuses_prefixes=False), second)[0]
    for is_running in (False, True):
        engine = make_engine(gpt_oss)
        engine.add_request(first)
        engine.step()
        row = engine.scheduler.running[0].row
        if not is_running:
            engine.scheduler.cancel("a")
        cache = engine.executor.cache
        cache.all_keys[:, row, :, 24:], cache.all_values[:, row, :, 24:] = torch.inf, torch.nan
        engine.add_request(Request("b", second, 5, stop_ids=()))
        done = engine.step()
        assert engine.group.counters.tokens_reused == 24
        while not done:
            engine.scheduler.cancel("a")  # what runs on spoilt K/V is not asked for
            done = [completion for completion in engine.step() if completion.request_id == "b"]
        assert done[0].token_ids == expected


def test_scores_are_always_run(gpt_oss: Path) -> None:
    """All logits are wanted, and experts under doubt leave nothing for others."""
    engine, prompt = make_engine(gpt_oss), tokens(7, 30)
    before = engine.score([prompt])[0]
    assert ask(engine, prompt)[1:] == (0, 30)
    after = engine.score([prompt])[0]
    assert after.shape == before.shape
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


def test_rotations_that_depend_on_the_length_take_nothing_over(tmp_path: Path, gpt_oss: Path) -> None:
    """K/V of a short prompt are not those of a long one with the same beginning."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.5] * 8, "short_mscale": 1.1, "long_mscale": 1.7}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20, **factors}
    save_family("phimoe", tmp_path, rope_parameters=rope)  # type: ignore[arg-type]
    engine = make_engine(tmp_path)
    assert rotates_by_length(engine.executor.decoder)  # type: ignore[arg-type]
    assert not rotates_by_length(make_engine(gpt_oss).executor.decoder)  # type: ignore[arg-type]
    prompt = tokens(8, 19)
    ask(engine, prompt, new=1)
    assert ask(engine, (*prompt, 5, 6, 7))[1:] == (0, 22)
