"""Step check: what must hold after every step, on all ranks together. For tests: it costs a collective per step."""

import zlib

import numpy as np
import torch

from moeplace.placement.placement import EMPTY_SLOT
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.errors import DisagreementError


def check_step(engine: Engine, *, applied: int, progress: int) -> None:
    """Ranks have the same placement, version, commands and sequences, and each slot has the expert that it should.

    Raises:
        DisagreementError: on all ranks, says what differs.
    """
    executor, group = engine.executor, engine.group
    names = ("placement", "placement version", "commands", "progress", "sequences", "requests", "damaged slots")
    scheduler = engine.scheduler
    values = [
        int(executor.placement.digest.removeprefix("sha256:")[:15], 16),
        executor.version,
        applied,
        progress,
        zlib.crc32(repr([(s.request, s.home, s.row, s.token_ids) for s in scheduler.running]).encode()),
        zlib.crc32(repr([(r.request_id, scheduler.order.overtaken(r.request_id)) for r in scheduler.waiting]).encode()),
        _count_damaged(engine),
    ]
    if group.size == 1:
        return
    mine = torch.tensor(values, device=group.device)
    everyone = mine.new_empty(group.size, len(mine))
    group.all_gather(everyone, mine, kind="check")
    for name, column in zip(names, everyone.T.tolist(), strict=True):
        if len(set(column)) > 1 or (name == "damaged slots" and any(column)):
            raise DisagreementError(f"after step {progress} the ranks have these {name}: {column}")


def _count_damaged(engine: Engine) -> int:
    placement, store = engine.placement, engine.executor.runtime.experts
    here_LC = placement.slot_to_expert[:, placement.slots_on(engine.group.rank)]
    return sum(
        not store.contents.is_intact(layer, int(store.row_of_slot[layer, slot]), int(here_LC[layer, slot]))
        for layer, slot in np.argwhere(here_LC != EMPTY_SLOT).tolist()
    )
