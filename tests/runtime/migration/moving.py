"""Engines that serve while experts move, and what their slots hold meanwhile."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeplace.placement.migration.plan import MigrationPlan, plan_migration
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.migration.live import LiveMigration, MigrationProgress
from moeplace.runtime.models.checkpoint import Checkpoint
from tests.rank_pool import RankContext
from tests.runtime.checkpoints import Oracle
from tests.runtime.placements import random_placement


def placements(checkpoint: Checkpoint, ranks: int, count: int, **options: Any) -> list[Placement]:
    """Random valid placements of one shape, with replicas and empty slots."""
    experts = int(checkpoint.experts_per_layer[0])
    fields = {"layer_ids": checkpoint.layer_ids, "num_hidden_layers": checkpoint.num_hidden_layers}
    return [
        random_placement(checkpoint.num_layers, experts, ranks, seed=seed, **{**fields, **options})
        for seed in range(count)
    ]


def start(context: RankContext, path: Path, placement: Placement, *, mode: str = "coherent", rows: int = 1) -> Engine:
    group = context.group()
    limits = EngineLimits(max_sequences=12, max_length=24, staging_rows=rows)
    return Engine(path, placement, mode=mode, group=group, dtype=torch.float64, limits=limits)


def plan_for(engine: Engine, new: Placement, *, staged: int = 1) -> MigrationPlan:
    size = engine.executor.runtime.experts.expert_bytes(0)
    return plan_migration(engine.placement, new, expert_bytes=size, staging_bytes=staged * size)


def misplaced(engine: Engine) -> list[tuple[int, int, int]]:
    """(layer, slot, expert) of slots of this rank whose bytes are not those of the expert that the placement names."""
    store, checkpoint = engine.executor.runtime.experts, engine.checkpoint
    here = engine.placement.slot_to_expert[:, engine.placement.slots_on(engine.group.rank)]
    wrong = []
    for layer, slot in np.argwhere(here != EMPTY_SLOT).tolist():
        parts, expert = store.read(layer, slot), int(here[layer, slot])
        named = checkpoint.expert(layer, expert)
        if not all(torch.equal(parts[name].cpu(), value.to(parts[name].dtype)) for name, value in named.items()):
            wrong.append((layer, slot, expert))
    return wrong


def rows_in_use(engine: Engine) -> int:
    """Staging rows that hold an expert of some layer."""
    store = engine.executor.runtime.experts
    staged = [experts[store.num_rows(layer) :] for layer, experts in enumerate(store.contents.expert_of_row)]
    return sum(any(expert != -1 for expert in row) for row in zip(*staged, strict=True))


def serve_while_moving(
    context: RankContext, oracle: Oracle, mode: str, rows: int, bytes_per_step: int
) -> tuple[float, list[tuple[int, ...]], list[MigrationProgress], list[Any]]:
    """Two migrations, one after another, with a step, a scoring and a check of all slots at every boundary."""
    targets = placements(Checkpoint(oracle.path), context.size, 3)
    engine = start(context, oracle.path, targets[0], mode=mode, rows=rows)
    for request in oracle.requests:
        engine.add_request(replace(request, request_id=f"served {request.request_id}"))
    done: dict[str, tuple[int, ...]] = {}
    worst, seen, wrong = 0.0, [], misplaced(engine)
    scored, scored_version = slice(1, 3), 0
    for new in targets[1:]:
        migration = LiveMigration(engine, plan_for(engine, new), bytes_per_step=bytes_per_step)
        while migration.is_moving:
            done.update({completion.request_id: completion.token_ids for completion in engine.step()})
            seen.append(migration.advance())
            wrong += misplaced(engine)
            assert rows_in_use(engine) <= rows
            if len(seen) % 4 == 0 or engine.executor.version != scored_version:
                scored_version = engine.executor.version
                logits = engine.score(oracle.sequences[scored], prompt_lengths=oracle.prompt_lengths[scored])
                pairs = zip(logits, oracle.logits[scored], strict=True)
                worst = max([worst, *(float(np.abs(ours.numpy() - plain).max()) for ours, plain in pairs)])
        assert engine.placement.equals(new)
    while not engine.scheduler.is_idle:
        done.update({completion.request_id: completion.token_ids for completion in engine.step()})
    assert engine.counters()["placement_version"] == engine.executor.version == seen[-1].version
    tokens = [done[f"served {request.request_id}"] for request in oracle.requests]
    return worst, tokens, seen, wrong
