"""Forecasts of experts, and engines that let alike requests in first, with the tokens that the plain model gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.modes import MODES
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.admission.forecast import MOST_TOKENS, ExpertForecast
from moeplace.runtime.engine.construction import EngineChoices, prepare_engine
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.windows.rows import join_rows
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.experts.tiered_store import TieredStore
from tests.model_families import save_family
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import Oracle
from tests.shared_data import text_paths, tiny_moe_path

WHOLE = "jamba"
"""A family that runs its own code."""


def serve(
    context: RankContext, path: Path, requests: list[Request], modes: tuple[str, ...], limits: dict[str, Any]
) -> list[tuple[dict[str, tuple[int, ...]], list[str], int]]:
    """Per mode: tokens, requests in the order in which they got a place, and collectives of forecasts. Rank 0 alone
    may work out forecasts."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a rank that is not rank 0 works out a forecast of its own")

    count = ExpertForecast.count
    results, group = [], context.group()
    try:
        if context.rank:
            ExpertForecast.count = refuse  # type: ignore[assignment, method-assign]
        for mode in modes:
            options = EngineLimits(max_length=24, max_prefill_tokens=7, **limits)
            engine = Engine(path, mode=mode, group=group, dtype=torch.float64, limits=options)
            results.append(_serve(engine, requests))
            group.counters.reset()
    finally:
        ExpertForecast.count = count  # type: ignore[method-assign]
    return results


def _serve(engine: Engine, requests: list[Request]) -> tuple[dict[str, tuple[int, ...]], list[str], int]:
    for request in requests:
        engine.add_request(request)
    tokens: dict[str, tuple[int, ...]] = {}
    placed: list[str] = []
    while not engine.scheduler.is_idle:
        tokens.update({done.request_id: done.token_ids for done in engine.step()})
        placed += [s.request.request_id for s in engine.scheduler.running if s.request.request_id not in placed]
        placed += [name for name in tokens if name not in placed]
    return tokens, placed, engine.group.counters.collectives[-1, "forecasts"]


@pytest.mark.parametrize("size", [1, 3])
def test_tokens_are_those_of_the_plain_model(pool: RankPool, oracle: Oracle, size: int) -> None:
    """Every family that is cut, every mode: with the option each request has the plain model's tokens, and all ranks
    gave places in one order, by forecasts that rank 0 alone had worked out."""
    limits = {"max_sequences": 2 * size, "alike": 3}
    results = pool.run(serve, oracle.path, oracle.requests, MODES, limits, size=size)
    expected = {r.request_id: tokens for r, tokens in zip(oracle.requests, oracle.completions, strict=True)}
    for number, mode in enumerate(MODES):
        for rank, found in enumerate(results):
            tokens, placed, collectives = found[number]
            assert tokens == expected, (mode, rank)
            assert placed == results[0][number][1]
            assert (0 < collectives <= len(oracle.requests)) == (size > 1)  # one where a choice comes up


def test_without_the_option_nothing_is_forecast(pool: RankPool, oracle: Oracle) -> None:
    """Places go as requests come, and no message is sent for it."""
    results = pool.run(serve, oracle.path, oracle.requests, MODES, {"max_sequences": 2}, size=2)
    for tokens, placed, collectives in [one for rank in results for one in rank]:
        assert len(tokens) == len(oracle.requests)
        assert collectives == 0
        assert placed == sorted(placed)


def prompts(length: int, each: int) -> list[tuple[int, ...]]:
    """Tokens from each of the shipped texts, text by text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_moe_path())
    found = []
    for path in text_paths():
        ids = tokenizer(path.read_text()[: each * length * 8], add_special_tokens=False)["input_ids"]
        found += [tuple(ids[n * length : (n + 1) * length]) for n in range(each)]
    assert all(len(prompt) == length for prompt in found)
    return found


def routed(engine: Engine, prompt: tuple[int, ...], new: int) -> np.ndarray:
    """(T, L, K) ids of a prompt and all but the last of the tokens that follow it, as the engine served them."""
    assert engine.window.recent is not None
    engine.window.recent.restart()
    engine.generate([Request("a", prompt, new, stop_ids=())])
    checkpoint = engine.checkpoint
    rows = [engine.window.recent.snapshot()]
    return np.asarray(join_rows(rows, checkpoint.experts_per_layer, layer_ids=checkpoint.layer_ids).topk_ids)


def counts(ids: np.ndarray, num_experts: int) -> np.ndarray:
    return np.stack([np.bincount(ids[:, layer].reshape(-1), minlength=num_experts) for layer in range(ids.shape[1])])


def correlation_of_likeness(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Over all pairs of requests, of the cosines of their counts."""

    def cosines(counts_G: list[np.ndarray]) -> np.ndarray:
        pairs = np.triu_indices(len(counts_G), 1)
        units = [c / np.linalg.norm(c, axis=1, keepdims=True) for c in counts_G]
        return np.array([(units[i] * units[j]).sum() for i, j in zip(*pairs, strict=True)])

    return float(np.corrcoef(cosines(one), cosines(other))[0, 1])


def test_forecasts_tell_who_is_alike() -> None:
    """On the shipped model. In the first MoE layer a forecast is what is chosen. Later layers lack what experts add:
    there likeness of forecasts follows likeness of what the tokens behind the prompts ask for (0.76 of 96 requests).
    Longer prompts are looked at as far as their end goes."""
    limits = EngineLimits(max_sequences=1, max_length=64, recent_ids=80, reuses_prefixes=False)
    engine = Engine(tiny_moe_path(), mode="allgather", dtype=torch.float32, limits=limits)
    forecast = ExpertForecast(engine.executor.decoder, 16)  # type: ignore[arg-type]
    foreseen, asked = [], []
    for prompt in prompts(24, 8):
        ids = routed(engine, prompt, 33)
        foreseen.append(forecast.count(prompt))
        asked.append(counts(ids[24:], 16))
        assert np.array_equal(foreseen[-1][0], counts(ids[:24], 16)[0])
        assert (foreseen[-1].sum(axis=1) == 24).all()
    assert correlation_of_likeness(foreseen, asked) > 0.5
    long = prompts(24, 8)[0] * 5
    assert np.array_equal(forecast.count(long), forecast.count(long[-MOST_TOKENS:]))
    assert forecast.count(long).sum() == 6 * MOST_TOKENS
    assert np.array_equal(forecast.count(prompts(24, 8)[3]), foreseen[3])  # nothing of the prompt before is left


def same_text_pairs(alike: int) -> tuple[float, list[str]]:
    """Of pairs of requests that run in a step, the share from one text; and the order in which they got a place."""
    limits = EngineLimits(max_sequences=4, max_length=64, alike=alike)
    engine = Engine(tiny_moe_path(), mode="allgather", dtype=torch.float32, limits=limits)
    by_text = np.arange(24).reshape(3, 8)
    found = prompts(24, 8)
    for index in by_text.T.reshape(-1):  # one of each text in turn
        engine.add_request(Request(str(index), found[index], 6 + int(index) * 7 % 9, stop_ids=()))
    placed: list[str] = []
    pairs = []
    while not engine.scheduler.is_idle:
        engine.foresee()
        names = [s.request.request_id for s in engine.scheduler.running]
        placed += [name for name in names if name not in placed]
        engine.step()
        if len(names) == 4:
            texts = [int(name) // 8 for name in names]
            pairs += [texts[i] == texts[j] for i in range(4) for j in range(i)]
    return float(np.mean(pairs)), placed


def test_requests_of_one_text_come_together() -> None:
    """Three texts in turn: batches have more pairs of one text, and nobody waits longer than may be."""
    share, placed = same_text_pairs(0)
    alike_share, alike_placed = same_text_pairs(6)
    assert alike_share > share + 0.1
    assert sorted(alike_placed) == sorted(placed)
    turn = {name: number for number, name in enumerate(placed)}
    for place, name in enumerate(alike_placed):
        assert sum(turn[other] > turn[name] for other in alike_placed[:place]) <= 6


def test_a_forecast_loads_no_expert() -> None:
    """And asks for none."""
    limits = EngineLimits(max_sequences=1, max_length=64, tiers=TierLimits(2), alike=4)
    engine = Engine(tiny_moe_path(), mode="allgather", limits=limits)
    store = engine.executor.runtime.experts
    assert isinstance(store, TieredStore)
    for number, prompt in enumerate(prompts(24, 2)):
        engine.add_request(Request(str(number), prompt, 2))
    before = store.loader.bytes
    assert len(engine.scheduler.unforeseen()) == 5
    engine.foresee()
    assert store.loader.bytes == before
    assert len(engine.scheduler.running) == 1
    assert engine.scheduler.unforeseen() == []


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    """A family whose routers cannot be asked beforehand; a negative number."""
    with pytest.raises(InputError, match=r"alike \(-1\) must not be negative"):
        EngineLimits(alike=-1)
    path = tmp_path / WHOLE
    save_family(WHOLE, path)
    choices = EngineChoices("auto", torch.float64, EngineLimits(max_length=16, alike=2), None, None, "moeplace")
    with pytest.raises(InputError, match=r"alike requests \(2\) cannot be put together for family"):
        prepare_engine(path, None, choices, decoder=None, size=1, device=torch.device("cpu"))
