"""Experts kept in fewer bits: the numbers are bit for bit those of `RoundedCheckpoint`, whose experts are plain; what a
rank keeps, loads and sends are the bytes of each expert's precision."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.migration.plan import plan_migration
from moeplace.placement.modes import MODES
from moeplace.placement.placement import Placement, with_slots
from moeplace.placement.tiers.policy import POLICIES
from moeplace.profiling.errors import FormatError
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.loading import load_experts
from moeplace.runtime.experts.bit_form import BitForm, PlainPart
from moeplace.runtime.experts.rounding import EXACT, PRECISIONS, rounded, stored_bytes
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.experts.tiered_store import TieredStore
from moeplace.runtime.experts.weights import ExpertWeights
from moeplace.runtime.migration.live import LiveMigration
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opening import open_model
from moeplace.runtime.models.precisions.precision_checkpoint import PrecisionCheckpoint
from moeplace.runtime.models.precisions.rounded_checkpoint import RoundedCheckpoint
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import save_checkpoint
from tests.runtime.placements import random_placement, with_random_tiers

EXPERTS = 6
SEQUENCES = [[3, 9, 27, 17, 51, 4, 12], [8, 1, 30, 2], [5, 5, 44, 13, 20]]
LENGTHS = [3, 1, 5]
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random_parts(draw: np.random.Generator, dtype: torch.dtype) -> dict[Any, torch.Tensor]:
    """An expert of some shape, with rows of zeros, rows of other sizes and numbers that lie on a border."""
    hidden, inner = (int(n) for n in draw.integers(1, 12, 2))
    shapes: dict[Any, tuple[int, ...]] = {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    if draw.random() < 0.5:
        shapes |= {"gate_up_bias": (2 * inner,), "down_bias": (hidden,)}
    parts = {}
    for name, shape in shapes.items():
        value = draw.normal(size=shape) * 10.0 ** draw.integers(-3, 3, (shape[0],) + (1,) * (len(shape) - 1))
        value[draw.random(shape) < 0.1] = 0.5
        value[draw.random(shape[0]) < 0.2] = 0.0
        parts[name] = torch.tensor(value).to(dtype)
    return parts


def test_bytes_mean_the_rounded_numbers(dated_seed: int) -> None:
    """Any shape, number type on disk and of the engine: what is packed takes what plans count, and gives the same."""
    print("seed", dated_seed)
    draw = np.random.default_rng(dated_seed)
    for dtype, engine, precision, _ in itertools.product(TYPES, TYPES, PRECISIONS, range(6)):
        parts = random_parts(draw, dtype)
        kept = engine if engine.itemsize < dtype.itemsize else dtype
        form = BitForm.of(precision, {n: PlainPart(tuple(v.shape), v.dtype, kept) for n, v in parts.items()})
        stored = form.pack(parts)
        assert stored.dtype == torch.uint8
        assert len(stored) == form.size <= stored_bytes(parts, precision)
        if kept == dtype:
            assert form.size == stored_bytes(parts, precision)
        for name, value in rounded(parts, precision).items():
            found = form.part(stored, name, engine)
            assert found.dtype == engine
            assert torch.equal(found, value.to(engine)), (dtype, engine, precision, name)


def test_parts_unlike_the_others_are_refused() -> None:
    """An expert in another number type or shape than its layer's is no expert of that form."""
    form = BitForm.of("int8", {"down": PlainPart((2, 3), torch.float32, torch.float32)})
    for wrong in (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(3, 2)):
        with pytest.raises(FormatError, match="down of an expert is"):
            form.pack({"down": wrong})


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without and with biases."""
    folder = tmp_path_factory.mktemp(request.param)
    save_checkpoint(request.param, folder)
    return folder


def both(path: Path, seed: int) -> tuple[PrecisionCheckpoint, RoundedCheckpoint]:
    """Some precision for every expert, kept in bits and as plain numbers."""
    plain = Checkpoint(path)
    choice = np.random.default_rng(seed).integers(0, len(PRECISIONS), (plain.num_layers, EXPERTS))
    return PrecisionCheckpoint(path, PRECISIONS, choice), RoundedCheckpoint(path, PRECISIONS, choice)


def sizes(checkpoint: PrecisionCheckpoint) -> np.ndarray:
    """(L, E) bytes of each expert, counted by the rule of plans."""
    found = np.zeros(checkpoint.choice_LE.shape, np.int64)
    for layer, expert in np.ndindex(*found.shape):
        name = checkpoint.precisions[checkpoint.choice_LE[layer, expert]]
        found[layer, expert] = stored_bytes(Checkpoint.expert(checkpoint, layer, expert), name)
    return found


def scores(engine: Engine) -> torch.Tensor:
    return torch.cat(engine.score(SEQUENCES, prompt_lengths=LENGTHS))


def check_bytes(engine: Engine, size_LE: np.ndarray) -> None:
    """Rows take the bytes of the experts that they are said to hold, in every memory."""
    store = engine.executor.runtime.experts
    on_host = [(layer, row, expert) for layer, by_row in enumerate(store.contents.expert_of_row)
               for row, expert in enumerate(by_row) if expert >= 0
               and not (isinstance(store, TieredStore) and store._is_on_disk(layer, row))]  # fmt: skip
    assert store.held_bytes == sum(int(size_LE[layer, expert]) for layer, _, expert in on_host)
    for layer, row, expert in on_host:
        assert store.bytes_in_row(layer, row) == store.expert_bytes(layer, expert) == size_LE[layer, expert]
    if isinstance(store, TieredStore):
        store.loader.drain()
        held = [(layer, store.contents.expert_of_row[layer][row]) for layer, by_row in enumerate(store.fast.held)
                for row in by_row]  # fmt: skip
        assert store.pool.held_bytes == sum(int(size_LE[spot]) for spot in held)


def settings(draw: np.random.Generator) -> list[TierLimits | None]:
    """No tiers; then every policy with some budget, from one expert per layer to all of them, in turn."""
    found: list[TierLimits | None] = [None]
    for number, policy in enumerate(POLICIES):
        fast = (1, EXPERTS + 1, *draw.integers(2, EXPERTS, 3).tolist())[number]
        host = (None, 0, 2)[int(draw.integers(3))]
        found.append(TierLimits(
            fast, policy=policy, host_slots=host, host_computes=bool(draw.integers(2)), look_ahead=number % 3,
        ))  # fmt: skip
    return found


def test_engines_compute_the_rounded_numbers(path: Path, dated_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, any policy and budget; rows hold no more bytes than their experts have, and loads carry those."""
    print("seed", dated_seed)
    monkeypatch.setattr(ExpertWeights, "suits_padding", lambda self, groups: False)  # the same products on both sides
    draw = np.random.default_rng(dated_seed)
    packed, plain = both(path, dated_seed)
    size_LE, decoder = sizes(packed), open_model(packed, dtype=torch.float64, device=torch.device("cpu"))
    for limits in settings(draw):
        placement = random_placement(
            packed.num_layers, EXPERTS, 1, seed=dated_seed, layer_ids=packed.layer_ids,
            num_hidden_layers=packed.num_hidden_layers,
        )  # fmt: skip
        if limits is not None and draw.random() < 0.5:
            placement = with_random_tiers(placement, limits, draw)
        ours, theirs = (
            Engine(
                checkpoint, placement, mode="allgather", decoder=decoder,
                limits=EngineLimits(max_sequences=4, max_length=20, max_prefill_tokens=12, tiers=limits),
            )
            for checkpoint in (packed, plain)
        )  # fmt: skip
        assert torch.equal(scores(ours), scores(theirs)), limits
        check_bytes(ours, size_LE)
        found = ours.counters().get("experts_found", {}).get("loaded", 0)
        if found:
            assert found * size_LE.min() <= ours.counters()["bytes_loaded"] <= found * size_LE.max()


def serve_packed(
    group: RankGroup, path: Path, seed: int, modes: Sequence[str]
) -> list[tuple[str, bool, float, int, int]]:
    """Under some modes: equal logits, their difference, bytes that ranks were sent and should have been."""
    patch = pytest.MonkeyPatch()
    patch.setattr(ExpertWeights, "suits_padding", lambda self, groups: False)
    packed, plain = both(path, seed)
    size_LE, results = sizes(packed), []
    fields: dict[str, Any] = {"layer_ids": packed.layer_ids, "num_hidden_layers": packed.num_hidden_layers}
    budgets = itertools.cycle((None, TierLimits(2, policy="lookahead"), TierLimits(1, policy="lru", host_slots=2)))
    for index, (mode, tiers) in enumerate(zip(modes, budgets, strict=False)):
        start, goal = (
            random_placement(packed.num_layers, EXPERTS, group.size, seed=seed + index + n, extra_slots=index, **fields)
            for n in (0, 100)
        )
        engine, reference = (
            Engine(
                checkpoint, start, mode=mode, group=group, dtype=torch.float64,
                limits=EngineLimits(max_sequences=4 * group.size, max_length=20, staging_rows=1, tiers=tiers),
            )
            for checkpoint in (packed, plain)
        )  # fmt: skip
        before, expected = scores(engine), scores(reference)
        plan = plan_migration(start, goal, expert_bytes=1, staging_bytes=1)
        moved = [t for each in plan.rounds for t in each if plan.members(t)[0] != plan.members(t)[1]]
        migration = LiveMigration(engine, plan, bytes_per_step=int(size_LE.max()) // 2 + 1)
        during = scores(engine) if migration.is_moving else before
        while migration.is_moving:
            migration.advance()
        assert engine.placement.equals(goal)
        check_bytes(engine, size_LE)
        reference = Engine(plain, goal, mode=mode, group=group, dtype=torch.float64, limits=engine.limits)
        after, beyond = scores(engine), scores(reference)
        same = torch.equal(before, expected) and torch.equal(during, expected) and torch.equal(after, beyond)
        worst = float((after - beyond).abs().max())
        sent = sum(int(size_LE[t.layer, t.expert]) for t in moved)
        results.append((f"{mode} {tiers}", same, worst, migration.progress.bytes_moved, sent))
    patch.undo()
    return results


def packed_on_a_rank(context: RankContext, path: Path, seed: int) -> list[tuple[str, bool, float, int, int]]:
    """See `serve_packed`; all modes on two ranks, one on more, another one every day."""
    shift = seed % len(MODES)
    return serve_packed(context.group(), path, seed, (*MODES[shift:], *MODES[:shift])[: 3 if context.size == 2 else 1])


@pytest.mark.parametrize(("path", "size"), [("gpt_oss", 2), ("olmoe", 3), ("gpt_oss", 4)], indirect=["path"])
def test_experts_travel_in_their_bits(pool: RankPool, path: Path, size: int, dated_seed: int) -> None:
    """Modes and ranks, with tiers and without: equal logits before, while and after experts move; the bytes that move
    are those of their precisions."""
    print("seed", dated_seed)
    for results in pool.run(packed_on_a_rank, path, dated_seed % 10_000, size=size):
        for label, same, worst, moved, sent in results:
            assert same, (label, worst)
            assert moved == sent, label


def test_plans_make_engines_that_disagree(path: Path) -> None:
    """Ranks must keep experts alike: the same numbers, kept otherwise, are another checkpoint to `agree` on."""
    packed, plain = both(path, 0)
    exact = PrecisionCheckpoint(path, (EXACT,), np.zeros(packed.choice_LE.shape, np.int64))
    names = {one.fingerprint for one in (packed, plain, exact, Checkpoint(path), both(path, 1)[0])}
    assert len(names) == 5
    assert math.isclose(exact.expert_bytes(torch.float32), Checkpoint(path).expert_bytes(torch.float32))


@pytest.mark.parametrize("fast", [1, 2, EXPERTS + 4])
def test_a_rank_may_have_no_experts_yet(path: Path, fast: int) -> None:
    """As one that has just joined: any number of slots, more of them than fast rows too; then experts come."""
    packed, plain = both(path, 3)
    size_LE = sizes(packed)
    table = np.full((packed.num_layers, 2 * EXPERTS), -1)
    table[:, :EXPERTS] = np.arange(EXPERTS)
    start = Placement(
        table, np.full(2, EXPERTS), np.zeros(2, int), np.full(packed.num_layers, EXPERTS),
        layer_ids=packed.layer_ids, num_hidden_layers=packed.num_hidden_layers,
    )  # fmt: skip
    limits = EngineLimits(tiers=TierLimits(fast), staging_rows=1)
    for checkpoint in (packed, plain):
        store = load_experts(checkpoint, start, 1, limits, torch.float64, torch.device("cpu"))
        assert isinstance(store, TieredStore)
        for slots in (EXPERTS, EXPERTS + 4, 1):
            store.resize(slots)
            placement = with_slots(start, np.array([EXPERTS, slots]))
            store.placed(placement, 1)
            assert not any(store.fast.held)
        assert checkpoint is plain or store.held_bytes == 0
        store.load(0, 0, 4, checkpoint.expert(0, 4))
        slots_LS = placement.slot_to_expert.copy()
        slots_LS[0, EXPERTS] = 4
        store.placed(placement.replace(slot_to_expert=slots_LS), 1)
        store.copy_to_fast(0, 0, 0)
        found, _ = store.pool.matrix("down", 0, torch.float64)
        wanted = rounded(Checkpoint.expert(packed, 0, 4), PRECISIONS[packed.choice_LE[0, 4]])["down"]
        assert torch.equal(found, wanted.double())
        assert checkpoint is plain or store.held_bytes == size_LE[0, 4]
