"""Prompts in chunks beside sequences that go on: logits, tokens and log-probabilities are those of whole prompts."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.modes import MODES
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Completion, Request, RunningSequence
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.kv import lazy_zeros
from moeplace.runtime.kv.cache import kv_bytes_per_position
from moeplace.runtime.kv.row_pool import PAGE
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.service.snapshot import Snapshot, continue_from, take_snapshot_of
from tests.model_families import plain_logits, save_family
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import (
    DEEPSEEK_TOLERANCE,
    TOLERANCE,
    VOCABULARY,
    Oracle,
    ask_plain_model,
)
from tests.runtime.placements import placement_for


def make_engine(group: RankGroup, path: Path, mode: str, seed: int, **limits: Any) -> Engine:
    checkpoint = Checkpoint(path)
    placement = placement_for(checkpoint, group.size, seed=seed, extra_slots=seed % 3, nodes=min(2, group.size))
    options = {"max_sequences": 4 * group.size, "max_length": 24, **limits}
    return Engine(checkpoint, placement, mode=mode, group=group, dtype=torch.float64, limits=EngineLimits(**options))


def run(engine: Engine, batch: Batch, mode: Any, *, share: bool) -> list[torch.Tensor]:
    """Logits of every token of a pass, by sequence of the batch."""
    rows, decoder = engine.executor.run(batch, mode, share=share), engine.executor.decoder
    logits = torch.zeros(batch.num_tokens, decoder.vocabulary, dtype=decoder.logits_dtype)
    with torch.inference_mode():
        logits[rows.token] = decoder.logits(rows.x)
    if engine.group.size > 1:
        engine.group.all_reduce(logits, kind="logits")
    return list(logits.split(batch.lengths))


def walk(context: RankContext, path: Path, sequences: list[list[int]], seed: int) -> list[np.ndarray]:
    """Logits of sequences of which some run in each pass, by stretches of any length, in any mode that serves them."""
    rng = np.random.default_rng(seed)
    engine = make_engine(context.group(), path, "coherent", seed, max_sequences=len(sequences))
    placed = [engine.scheduler.place(Request(str(n), tuple(tokens))) for n, tokens in enumerate(sequences)]
    found: dict[str, list[torch.Tensor]] = {}
    while active := [sequence for sequence in placed if sequence is not None and sequence.num_missing]:
        chosen: list[RunningSequence] = [s for s in active if rng.random() < 0.6] or active[:1]
        mode = str(rng.choice(MODES))
        most = 1 if mode == "coherent" else int(rng.choice([1, 3, 20]))
        lengths = [int(rng.integers(1, min(s.num_missing, most) + 1)) for s in chosen]
        batch = Batch.of(chosen, lengths, has_prompts=most > 1)
        blocks = run(engine, batch, mode, share=mode != "coherent" and rng.random() < 0.5)
        for sequence, block in zip(batch.sequences, blocks, strict=True):
            found.setdefault(sequence.request.request_id, []).append(block)
    return [torch.cat(found[str(n)]).numpy() for n in range(len(sequences))]


@pytest.mark.parametrize("size", [1, 3])
def test_logits_do_not_depend_on_how_a_sequence_is_cut(
    pool: RankPool, oracle: Oracle, size: int, dated_seed: int
) -> None:
    """Every family; each token's logits after any stretches, in passes that others share, single tokens by coherent
    passes too: masks, windows, positions, and K/V that are at home or everywhere."""
    tolerance = DEEPSEEK_TOLERANCE if "deepseek" in oracle.path.name else TOLERANCE
    for logits in pool.run(walk, oracle.path, oracle.sequences, dated_seed % 1000, size=size):
        for ours, plain in zip(logits, oracle.logits, strict=True):
            np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance)


def complete(context: RankContext, path: Path, requests: list[Request], budgets: list[int]) -> Any:
    """Tokens in every mode with every budget."""
    found, group = [], context.group()
    for mode, budget in itertools.product(MODES, budgets):
        engine = make_engine(group, path, mode, budget, max_prefill_tokens=budget)
        found.append([completion.token_ids for completion in engine.generate(requests)])
    return found


def test_tokens_of_every_family_in_chunks(pool: RankPool, oracle: Oracle) -> None:
    """Sampled ones with penalties and `min_tokens` too."""
    for found in pool.run(complete, oracle.path, oracle.requests, [3], size=3):
        assert found == [oracle.completions] * len(MODES)


@pytest.mark.parametrize("size", [1, 2])
def test_tokens_do_not_depend_on_the_budget(pool: RankPool, olmoe: Oracle, size: int) -> None:
    """From a token a pass to everything at once."""
    for found in pool.run(complete, olmoe.path, olmoe.requests, [1, 2, 7, 100], size=size):
        assert found == [olmoe.completions] * 4 * len(MODES)


def score_in_chunks(path: Path, sequences: list[list[int]], budget: int) -> list[np.ndarray]:
    limits = EngineLimits(max_sequences=2, max_length=24, max_prefill_tokens=budget)
    return [block.numpy() for block in Engine(path, dtype=torch.float64, limits=limits).score(sequences)]


def test_a_rotation_that_depends_on_the_length(tmp_path: Path) -> None:
    """LongRoPE turns the tokens of a prompt beyond some length otherwise, also those of its first chunk."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.5] * 8, "short_mscale": 1.1, "long_mscale": 1.7}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8, **factors}
    save_family("phimoe", tmp_path, rope_parameters=rope)  # type: ignore[arg-type]
    tokens = [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    (plain,) = plain_logits(tmp_path, [tokens])
    (short,) = plain_logits(tmp_path, [tokens[:4]])
    assert (plain[:4] - short).abs().max() > 1e-2  # it does depend on it
    for budget in (1, 4, 7, 100):
        np.testing.assert_allclose(score_in_chunks(tmp_path, [tokens], budget)[0], plain.numpy(), rtol=0, atol=2e-5)


def random_requests(rng: np.random.Generator, prefix: str, count: int) -> list[Request]:
    """Drawn, greedy, with and without log-probabilities; some prompts begin alike."""
    requests = []
    stems = [tuple(np.random.default_rng(stem).integers(0, VOCABULARY, 25).tolist()) for stem in range(2)]
    for number in range(count):
        stem = stems[number % 2][: int(rng.integers(0, 26))] if rng.random() < 0.7 else ()
        prompt = (*stem, *rng.integers(0, VOCABULARY, rng.integers(1, 15)).tolist())
        sampling = SamplingParameters(0.8, seed=number, repetition_penalty=1.2) if number % 2 else SamplingParameters()
        wish = int(rng.integers(0, 4)) if number % 3 else None
        requests.append(Request(f"{prefix}{number}", prompt, int(rng.integers(1, 9)), sampling, (), wish))
    return requests


def lose_a_rank(engine: Engine, lost: int, progress: int) -> None:
    """Go on as if a rank had been lost and another had come in its place: what it held is gone."""
    executor, size, old = engine.executor, engine.group.size, engine.scheduler
    executor.forget_unsettled()
    held = take_snapshot_of(old, range(size))
    snapshots = [
        Snapshot(100 + rank) if rank == lost else Snapshot(rank, progress, sequences=held) for rank in range(size)
    ]
    start = continue_from(snapshots, replicated=old.replicated, delivered=None)
    if engine.group.rank == lost:
        for slab in (*executor.cache.keys, *executor.cache.values):
            slab[slab != 0] = 7.0  # a number: what is masked is multiplied by zero
    engine.scheduler = engine._make_scheduler()
    start.fill(engine.scheduler, rank=engine.group.rank)
    if old.replicated and start.running:
        replicated = [sequence.replicated for sequence in start.running]
        executor.give_kv(engine.scheduler.running, replicated, start.newcomers)
        for sequence, count in zip(engine.scheduler.running, replicated, strict=True):
            sequence.replicated = count


def serve_disturbed(context: RankContext, path: Path, mode: str, seed: int) -> tuple[Any, Any, tuple[int, int, int]]:
    """Completions undisturbed with whole prompts, and in chunks among arrivals, cancellations and lost ranks, with
    little memory; prompts that were unfinished at losses, tokens that were taken over, and passes before which a
    sequence had given way."""
    lazy_zeros._LEAST_BYTES = 0  # type: ignore[attr-defined]  # small caches too
    rng, group = np.random.default_rng(seed), context.group()
    requests, others = random_requests(rng, "r", 9), random_requests(rng, "x", 6)
    whole = make_engine(group, path, mode, seed, max_prefill_tokens=1000, max_length=64, reuses_prefixes=False)
    expected = whole.generate(requests)
    budget, pages = int(rng.integers(1, 17)), int(rng.choice([4, 5, 9]))
    room = pages * PAGE * kv_bytes_per_position(whole.executor.decoder)
    engine = make_engine(group, path, mode, seed, max_prefill_tokens=budget, max_length=64, kv_bytes=room)
    assert group.counters.tokens_reused == 0
    arriving, done, in_prompt, gave_way = [*requests, *others], {}, 0, 0
    rng.shuffle(arriving)  # type: ignore[arg-type]
    while arriving or not engine.scheduler.is_idle:
        for _ in range(int(rng.integers(0, 3))):
            if arriving:
                engine.add_request(arriving.pop())
        if rng.random() < 0.3:
            engine.scheduler.cancel(f"x{rng.integers(0, 6)}")
        gave_way += any(engine.scheduler.added(request) for request in engine.scheduler.waiting)
        done.update({completion.request_id: completion for completion in engine.step()})
        if rng.random() < 0.15 and context.size > 1:
            in_prompt += sum(s.num_missing > 1 for s in engine.scheduler.running)
            lose_a_rank(engine, int(rng.integers(0, context.size)), progress=1 + len(done))
    counts = in_prompt, group.counters.tokens_reused, gave_way
    return expected, [done[request.request_id] for request in requests], counts


def same(found: Completion, expected: Completion) -> bool:
    """But for rounding of log-probabilities."""
    if (found.token_ids, found.finish_reason) != (expected.token_ids, expected.finish_reason):
        return False
    pairs = list(zip(found.logprobs, expected.logprobs, strict=True))
    return all(a is not None and b is not None and abs(a.value - b.value) < 1e-7 for a, b in pairs)


@pytest.mark.parametrize(
    ("size", "mode", "seed"),
    [
        *((size, mode, seed) for size in (2, 3) for mode in ("dispatch-combine", "coherent") for seed in (5, None)),
        (1, "coherent", None),
        (3, "allgather", None),
    ],
)
def test_nothing_that_happens_in_mid_prompt_changes_a_token(
    pool: RankPool, olmoe: Oracle, size: int, mode: str, seed: int | None, dated_seed: int
) -> None:
    """Arrivals, cancellations, and the loss of any rank with all that it held, whatever prompts are unfinished then;
    nor do K/V that are taken over from other prompts, running or ended, nor memory that is given to older ones."""
    results = pool.run(serve_disturbed, olmoe.path, mode, dated_seed % 1000 if seed is None else seed, size=size)
    for expected, found, _ in results:
        assert all(map(same, found, expected)), (found, expected)
    if seed is not None:  # all of it has happened
        assert all(in_prompt for *_, (in_prompt, _, _) in results)
        assert sum(reused for *_, (_, reused, _) in results)
        assert all(gave_way or size == 3 for *_, (_, _, gave_way) in results)


def test_whole_models_are_never_cut(tmp_path: Path) -> None:
    """A family that runs its own code gets prompts whole, whatever the budget, beside the tokens of others."""
    save_family("jamba", tmp_path)
    oracle = ask_plain_model(tmp_path)
    engine = Engine(
        tmp_path, mode="dispatch-combine", dtype=torch.float64, limits=EngineLimits(max_length=24, max_prefill_tokens=2)
    )
    lengths = []
    forward = engine.executor.decoder.forward

    def note(ids: list[int], state: Any) -> Any:
        lengths.append((len(ids), state is None))
        return forward(ids, state)

    engine.executor.decoder.forward = note
    assert [completion.token_ids for completion in engine.generate(oracle.requests)] == oracle.completions
    assert sorted(length for length, is_first in lengths if is_first) == sorted(map(len, oracle.sequences))
    assert {length for length, is_first in lengths if not is_first} == {1}
