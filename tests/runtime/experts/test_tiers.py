"""Memory tiers: whatever is where, logits are those of the plain model, and fast memory holds what it may."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.memory import HOST
from moeplace.placement.migration.plan import plan_migration
from moeplace.placement.modes import MODES
from moeplace.placement.tiers.policy import POLICIES
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.experts.row_contents import NOTHING
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.experts.tiered_store import TieredStore
from moeplace.runtime.migration.live import LiveMigration
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opening import open_model
from tests.rank_pool import RankContext, RankPool
from tests.runtime.checkpoints import Oracle, make_oracle
from tests.runtime.placements import random_placement, with_random_tiers

TOLERANCE = 1e-7
"""Absolute, for logits around 1 in float64."""
EXPERTS = 6


@pytest.fixture(scope="module", params=["olmoe", "gpt_oss"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Without and with biases."""
    return make_oracle(request.param, tmp_path_factory.mktemp(request.param))


def settings() -> Iterator[TierLimits]:
    """Every policy with every budget from one expert per layer to all of them, and what goes with it in turn."""
    turn = itertools.cycle(itertools.product((False, True), (0, 2), (None, 0, 3), (1, 2, 4)))
    for policy, fast in itertools.product(POLICIES, range(1, EXPERTS + 2)):
        host_computes, look_ahead, host_slots, transit = next(turn)
        if fast * 3 > transit:
            yield TierLimits(
                fast, policy=policy, host_computes=host_computes, look_ahead=look_ahead, host_slots=host_slots,
                transit=transit,
            )  # fmt: skip


def worst(engine: Engine, oracle: Oracle) -> float:
    """Largest difference of a logit."""
    ours = engine.score(oracle.sequences, prompt_lengths=oracle.prompt_lengths)
    return max(np.abs(a.numpy() - b).max() for a, b in zip(ours, oracle.logits, strict=True))


def check_integrity(store: TieredStore) -> None:
    """Between steps: no fast row is used twice, rooms and transit are kept, what has come has the right bytes."""
    fast, total = store.fast, store.limits.fast_slots * len(store.weights)
    targets = [held.target for by_row in fast.held for held in by_row.values()]
    assert len(set(targets)) == len(targets)
    assert len(targets) + len(fast._spare) == total == store.pool.rows
    transit = 0
    for layer, by_row in enumerate(fast.held):
        loose = [row for row, held in by_row.items() if row not in fast.pinned[layer] and not held.in_transit]
        assert len(loose) <= fast._room[layer]
        transit += sum(held.in_transit for held in by_row.values())
        for row, held in by_row.items():
            assert store.contents.expert_of_row[layer][row] != NOTHING, "a fast row for an expert that has left"
            if held.has_come:
                for part, value in store.parts_of(layer, row).items():
                    assert torch.equal(store.pool.parts()[part][held.target].cpu(), value)
    assert transit <= store.limits.transit


def test_logits_are_those_of_the_plain_model(oracle: Oracle, dated_seed: int) -> None:
    """One process: policies, budgets, hosts that compute, disks, prefill and decoding."""
    checkpoint = Checkpoint(oracle.path)
    decoder = open_model(checkpoint, dtype=torch.float64, device=torch.device("cpu"))
    found: set[str] = set()
    for number, limits in enumerate(settings()):
        plain = random_placement(
            checkpoint.num_layers, EXPERTS, 1, seed=number, layer_ids=checkpoint.layer_ids,
            num_hidden_layers=checkpoint.num_hidden_layers,
        )  # fmt: skip
        placement = with_random_tiers(plain, limits, dated_seed + number) if number % 3 else plain
        engine = Engine(
            checkpoint, placement, mode="allgather", decoder=decoder,
            limits=EngineLimits(max_sequences=4, max_length=20, max_prefill_tokens=12, tiers=limits),
        )  # fmt: skip
        assert worst(engine, oracle) <= TOLERANCE, limits
        completions = engine.generate(oracle.requests)
        assert [c.token_ids for c in completions] == oracle.completions, limits
        store = engine.executor.runtime.experts
        assert isinstance(store, TieredStore)
        check_integrity(store)
        counters = engine.counters()
        found |= set(counters.get("experts_found", ()))
        if limits.fast_slots > EXPERTS:  # every slot has a row
            assert placement.tier is not None or "experts_found" not in counters  # all there: the plain way
        elif "experts_found" in counters:
            assert sum(counters["experts_found"].values()) == engine.group.counters.activated.total()
    assert found >= {"resident", "cached", "loaded"}


def serve_tiered(context: RankContext, oracle: Oracle, seed: int) -> list[tuple[str, float]]:
    """Largest difference of a logit under every mode, for a few settings."""
    checkpoint, group = Checkpoint(oracle.path), context.group()
    results = []
    fields = {"layer_ids": checkpoint.layer_ids, "num_hidden_layers": checkpoint.num_hidden_layers}
    chosen = [
        TierLimits(1, policy="lookahead", look_ahead=1, transit=2),
        TierLimits(2, policy="score", host_computes=True),
        TierLimits(1, policy="pinned", host_slots=1, transit=1),
        TierLimits(2, policy="lru", look_ahead=2, transit=3),
    ]
    for index, (limits, mode) in enumerate(zip(chosen, itertools.cycle(MODES), strict=False)):
        plain = random_placement(
            checkpoint.num_layers, EXPERTS, context.size, seed=seed + index, extra_slots=index % 3, **fields
        )
        placement = with_random_tiers(plain, limits, seed + index)
        engine = Engine(
            checkpoint, placement, mode=mode, group=group, dtype=torch.float64,
            limits=EngineLimits(max_sequences=4 * context.size, max_length=20, max_prefill_tokens=12, tiers=limits),
        )  # fmt: skip
        results.append((f"{limits} {mode}", worst(engine, oracle)))
        assert isinstance(engine.executor.runtime.experts, TieredStore)
        check_integrity(engine.executor.runtime.experts)
    return results


@pytest.mark.parametrize("size", [2, 3, 4])
def test_logits_on_several_ranks(pool: RankPool, oracle: Oracle, size: int, dated_seed: int) -> None:
    """Modes, replicas and empty slots, with other tiers on every rank."""
    for results in pool.run(serve_tiered, oracle, dated_seed % 10_000, size=size):
        for label, difference in results:
            assert difference <= TOLERANCE, label


def replace_tiered(context: RankContext, path: Path, oracle: Oracle, seed: int, host_slots: int | None) -> list[float]:
    """Logits after re-placements with tiers, in pieces; what rows are said to hold is what they hold."""
    checkpoint = Checkpoint(path)
    fields = {"layer_ids": checkpoint.layer_ids, "num_hidden_layers": checkpoint.num_hidden_layers}
    limits = TierLimits(2, policy="lookahead", look_ahead=1, host_slots=host_slots)
    placements = [
        with_random_tiers(
            random_placement(checkpoint.num_layers, EXPERTS, context.size, seed=seed + n, **fields), limits, n
        )
        for n in range(4)
    ]
    engine = Engine(
        checkpoint, placements[0], mode="dispatch-combine", group=context.group(), dtype=torch.float64,
        limits=EngineLimits(max_sequences=12, max_length=24, staging_rows=1, tiers=limits),
    )  # fmt: skip
    store = engine.executor.runtime.experts
    assert isinstance(store, TieredStore)
    differences = [worst(engine, oracle)]
    for new in [*placements[1:3], placements[3].replace(tier=None)]:
        size = store.expert_bytes(0)
        plan = plan_migration(engine.placement, new, expert_bytes=size, staging_bytes=size)
        migration = LiveMigration(engine, plan, bytes_per_step=size // 2 + 1)
        for number in itertools.count():
            if migration.advance().state != "moving":
                break
            if number % 5 == seed % 5:
                differences.append(worst(engine, oracle))
        assert engine.placement.equals(new)
        differences.append(worst(engine, oracle))
        check_integrity(store)
    return differences


@pytest.mark.parametrize("host_slots", [None, 1])
def test_re_placement_works_with_tiers(pool: RankPool, oracle: Oracle, host_slots: int | None, dated_seed: int) -> None:
    """Before, during and after, also to a placement that says nothing of tiers, also with experts on disk."""
    for differences in pool.run(replace_tiered, oracle.path, oracle, dated_seed % 10_000, host_slots, size=3):
        assert max(differences) <= TOLERANCE


def test_too_many_residents_are_refused_at_the_start(oracle: Oracle) -> None:
    """One sentence that names rank and numbers; limits that make no sense are refused too."""
    checkpoint = Checkpoint(oracle.path)
    fields: dict[str, Any] = {"layer_ids": checkpoint.layer_ids, "num_hidden_layers": checkpoint.num_hidden_layers}
    placement = random_placement(checkpoint.num_layers, EXPERTS, 1, seed=0, **fields)
    tier = np.zeros(placement.slot_to_expert.shape, int)
    tier[0, 0] = HOST
    limits = EngineLimits(max_sequences=2, max_length=8, tiers=TierLimits(2))
    with pytest.raises(InputError, match=r"rank 0 has 17 resident experts, its fast memory holds 4 and 2 in transit"):
        Engine(checkpoint, placement.replace(tier=tier), limits=limits)
    for name, wrong in (("latency", (-1.0, math.inf)), ("bandwidth", (-1.0, 0.0))):
        for value in (*wrong, -math.inf, math.nan):
            with pytest.raises(InputError, match="cannot be emulated"):
                TierLimits(1, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"fast_slots \(0\)"):
        TierLimits(0)
    with pytest.raises(InputError, match="must hold more than its 8 in transit"):
        Engine(
            checkpoint, placement, limits=EngineLimits(max_sequences=2, max_length=8, tiers=TierLimits(1, transit=8))
        )
    again = EngineLimits(tiers={"fast_slots": 2, "policy": "lru"})  # type: ignore[arg-type]
    assert again.tiers == TierLimits(2, policy="lru")
