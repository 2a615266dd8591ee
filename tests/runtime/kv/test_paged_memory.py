"""K/V memory by the page, in an engine: many short sequences, and sequences that give way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.kv import lazy_zeros
from moeplace.runtime.kv.cache import kv_bytes_per_position
from moeplace.runtime.kv.row_pool import PAGE
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.decoder import Decoder
from tests.model_families import save_family
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import VOCABULARY
from tests.runtime.placements import random_placement


def make_engine(path: Path, pages: int | None, placement: Placement | None = None, **options: Any) -> Engine:
    """With memory for so many pages, None = for all rows."""
    decoder = Decoder(Checkpoint(path), dtype=torch.float64)
    room = None if pages is None else pages * PAGE * kv_bytes_per_position(decoder)
    limits = EngineLimits(max_sequences=8, max_length=64, kv_bytes=room, max_prefill_tokens=40)
    return Engine(path, placement, dtype=torch.float64, limits=limits, **options)


def pages_in_use(engine: Engine) -> int:
    """Of this rank: up to the last position of each row that somebody wrote and nobody cleared."""
    keys = engine.executor.cache.all_keys  # type: ignore[union-attr]
    used = (keys != 0).any(0).any(1).any(-1)  # (rows, positions)
    return sum(-(-int(row.nonzero().max() + 1) // PAGE) for row in used if row.any())


def requests(seed: int, count: int, longest: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(
            str(number),
            tuple(rng.integers(0, VOCABULARY, rng.integers(1, longest)).tolist()),
            int(rng.integers(1, 64 - longest)),
            SamplingParameters(0.9, seed=number) if number % 2 else SamplingParameters(),
            stop_ids=(),
            logprobs=2,
        )
        for number in range(count)
    ]


def test_many_short_sequences_fit(gpt_oss: Path) -> None:
    """Into memory for one of full length; each takes a page."""
    engine = make_engine(gpt_oss, pages=4)
    assert engine.scheduler.kv_room == 64
    for number in range(8):
        engine.add_request(Request(str(number), (number, 3), 12, stop_ids=()))
    engine.step()
    assert len(engine.scheduler.running) == 4


@pytest.mark.parametrize("pages", [4, 6, 11])
def test_who_gives_way_gets_the_same_tokens(
    gpt_oss: Path, pages: int, dated_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn ones too, each once, and with their log-probabilities; somebody does give way, and memory is never more."""
    monkeypatch.setattr(lazy_zeros, "_LEAST_BYTES", 0)
    asked = requests(dated_seed % 1000, 12, longest=24)
    plain, engine = make_engine(gpt_oss, None), make_engine(gpt_oss, pages)
    expected = plain.generate(asked)
    for request in asked:
        engine.add_request(request)
    told: dict[str, list[int]] = {}
    done, gave_way = [], 0
    while not engine.scheduler.is_idle:
        stepped = engine.step_with_note(0)
        done += stepped.completions
        for name, index, token in stepped.drawn:
            assert index == len(told.setdefault(name, []))
            told[name].append(token)
        gave_way += any(engine.scheduler.added(request) for request in engine.scheduler.waiting)
        assert pages_in_use(engine) <= pages
    found = {completion.request_id: completion for completion in done}
    for completion in expected:
        assert found[completion.request_id].token_ids == completion.token_ids == tuple(told[completion.request_id])
        pairs = zip(found[completion.request_id].logprobs, completion.logprobs, strict=True)
        assert all(one and other and abs(one.value - other.value) < 1e-8 for one, other in pairs)
    assert gave_way or pages > 6


def serve_coherently(
    context: RankContext, path: Path, asked: list[Request], pages: int, seed: int
) -> tuple[dict[str, tuple[int, ...]], int, int]:
    """Completions, the most pages in use on this rank, and after how many steps some request had given way."""
    engine = make_engine(
        path, pages, random_placement(3, 6, context.size, seed=seed), mode="coherent", group=context.group()
    )
    for request in asked:
        engine.add_request(request)
    done, most, gave_way = [], 0, 0
    while not engine.scheduler.is_idle:
        done += engine.step()
        most = max(most, pages_in_use(engine))
        gave_way += any(engine.scheduler.added(request) for request in engine.scheduler.waiting)
    return {completion.request_id: completion.token_ids for completion in done}, most, gave_way


def test_what_is_on_its_way_arrives_before_memory_is_given_back(pool: RankPool, gpt_oss: Path, dated_seed: int) -> None:
    """K/V of a coherent step travel during the next one: none of them reach a row that has been cleared."""
    asked = requests(dated_seed % 1000, 12, longest=24)
    expected = {c.request_id: c.token_ids for c in make_engine(gpt_oss, None).generate(asked)}
    found = pool.run(serve_coherently, gpt_oss, asked, 4, dated_seed % 1000, size=2)
    for completions, most, gave_way in found:
        assert completions == expected
        assert gave_way
        assert most <= 4


def test_a_check_gets_memory_of_what_runs(gpt_oss: Path) -> None:
    """And what gave way for it ends with the same tokens."""
    engine, asked = make_engine(gpt_oss, pages=4), requests(3, 4, longest=9)
    expected = {c.request_id: c.token_ids for c in make_engine(gpt_oss, None).generate(asked)}
    for request in asked:
        engine.add_request(request)
    done = [completion for _ in range(3) for completion in engine.step()]
    sequence = list(range(40))
    plain = make_engine(gpt_oss, None).score([sequence])[0]
    torch.testing.assert_close(engine.score([sequence])[0], plain, rtol=0, atol=1e-9)
    while not engine.scheduler.is_idle:
        done += engine.step()
    assert {c.request_id: c.token_ids for c in done} == expected


def test_memory_for_less_than_one_is_refused(gpt_oss: Path) -> None:
    """With its number; memory for one is enough for a request of any length that may be asked for."""
    with pytest.raises(InputError, match="must hold at least one sequence of 64 positions"):
        make_engine(gpt_oss, pages=3)
    engine = make_engine(gpt_oss, pages=4)
    (completion,) = engine.generate([Request("a", tuple(range(40)), 24, stop_ids=())])
    assert len(completion.token_ids) == 24


def test_whole_models_have_their_memory_from_the_start(tmp_path: Path) -> None:
    """The number of their rows is bounded, as it was."""
    save_family("jamba", tmp_path)
    engine = Engine(tmp_path, mode="dispatch-combine", limits=EngineLimits(max_length=16, kv_bytes=400_000))
    assert 1 <= engine.executor.cache.rows < 64
    assert engine.scheduler.kv_room == engine.executor.cache.rows * 16
