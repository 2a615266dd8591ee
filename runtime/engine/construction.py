"""What an engine is made of, worked out before ranks talk: every input is checked here, and nothing is sent.

The experts are not read yet: whether the ranks agree comes first.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moeplace.placement.cluster import even_slots
from moeplace.placement.cost.evaluation import require_same_model
from moeplace.placement.cost.replica_rule import OWN_RULES
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.placement import Placement, index_order
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.modes import AtHome, ModeRule, RecordedRouting, TracePredictor, choose_mode_rule
from moeplace.runtime.kv.cache import kv_bytes_per_position, kv_bytes_per_sequence
from moeplace.runtime.kv.row_pool import PAGE
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opening import ServedModel, open_model
from moeplace.runtime.models.whole import WholeModel


@dataclass(frozen=True, eq=False)
class EngineParts:
    """See the module.

    Attributes:
        checkpoint: what is served.
        placement: what is where.
        decoder: the model without routed experts.
        modes: how modes are chosen.
        node_aware: whether dispatch-combine sends one copy per node.
        replica_rule: who serves an expert with several slots.
        cache_rows: rows per rank of the K/V cache.
        spare_rows: of these, those that are only for what sequences leave behind.
        cache_positions: positions of each.
        cache_pages: memory for them, where it is claimed by the page; None = all of it.
        agreed: what must be the same on all ranks, beside the placement.
    """

    checkpoint: Checkpoint
    placement: Placement
    decoder: ServedModel
    modes: ModeRule
    node_aware: bool
    replica_rule: str
    cache_rows: int
    spare_rows: int
    cache_positions: int
    cache_pages: int | None
    agreed: dict[str, str]


@dataclass(frozen=True, eq=False)
class EngineChoices:
    """What a caller wants of an engine; see `Engine`."""

    mode: str | ModeRule
    dtype: torch.dtype | None
    limits: EngineLimits
    node_aware: bool | None
    recorded: RecordedRouting | None
    replica_rule: str


def prepare_engine(
    checkpoint: str | Path | Checkpoint,
    placement: Placement | None,
    choices: EngineChoices,
    *,
    decoder: ServedModel | None,
    size: int,
    device: torch.device,
) -> EngineParts:
    """Check the inputs of a rank and open the checkpoint.

    Raises:
        InputError: the model is dense, the placement is for another model or number of ranks, the replica rule is that
            of an engine, or the model cannot forecast its experts and is to.
        FormatError: the checkpoint is incomplete or foreign.
    """
    if choices.replica_rule not in OWN_RULES:
        raise InputError(f"replica rule {choices.replica_rule!r} must be one of {', '.join(OWN_RULES)} to serve by")
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    placement = _checked_placement(checkpoint, placement, size)
    if decoder is None:
        decoder = open_model(checkpoint, dtype=choices.dtype, device=device)
    if choices.limits.alike and isinstance(decoder, WholeModel):
        raise InputError(
            f"alike requests ({choices.limits.alike}) cannot be put together for family {decoder.family}: its routers "
            f"cannot be asked before its experts have run (because {decoder.reason})"
        )
    node_aware = choices.node_aware
    if node_aware is None:
        node_aware = checkpoint.top_k > 1
    modes = _mode_rule(choices, placement, decoder)
    rows, spare, positions, pages = _cache_size(choices.limits, decoder, size, replicated=modes.may_be_coherent)
    name = choices.mode if isinstance(choices.mode, str) else "a rule"
    agreed = {
        "checkpoint": checkpoint.fingerprint,
        "mode": f"{name}{' node-aware' if node_aware else ''}",
        "recorded routing": "none" if choices.recorded is None else f"{choices.recorded.trace.num_tokens} tokens",
        "number type": str(decoder.dtype),
        "limits": str(choices.limits),
        "replica rule": choices.replica_rule,
    }
    rule = choices.replica_rule
    return EngineParts(checkpoint, placement, decoder, modes, node_aware, rule, rows, spare, positions, pages, agreed)


def _mode_rule(choices: EngineChoices, placement: Placement, decoder: ServedModel) -> ModeRule:
    if isinstance(choices.mode, str):
        predictor = None
        if choices.mode == "auto" and choices.recorded is not None:
            predictor = _make_predictor(choices.recorded, placement, decoder)
        rule = choose_mode_rule(choices.mode, placement, predictor)
    else:
        rule = choices.mode
    if not isinstance(decoder, WholeModel) or not rule.may_be_coherent:
        return rule
    if choices.mode == "coherent":
        raise InputError(
            f"family {decoder.family} cannot be served in mode coherent (because {decoder.reason}); modes "
            "dispatch-combine and allgather can"
        )
    return AtHome(rule)


def _checked_placement(checkpoint: Checkpoint, placement: Placement | None, size: int) -> Placement:
    if placement is None:
        slots = even_slots(int(checkpoint.experts_per_layer.max()), size)
        return index_order(
            checkpoint.experts_per_layer,
            slots,
            np.zeros(size, dtype=np.int64),
            layer_ids=checkpoint.layer_ids,
            num_hidden_layers=checkpoint.num_hidden_layers,
        )
    if placement.num_ranks != size:
        raise InputError(f"the placement is for {placement.num_ranks} ranks, but {size} are running")
    checkpoint.check_placement(placement)
    return placement


def _make_predictor(recorded: RecordedRouting, placement: Placement, decoder: ServedModel) -> TracePredictor:
    require_same_model(recorded.trace, placement)
    kv_dim = kv_bytes_per_position(decoder) // (decoder.num_layers * decoder.dtype.itemsize)
    shape = StepShape(hidden_size=decoder.hidden_size, dtype_bytes=decoder.dtype.itemsize, kv_dim=kv_dim)
    return TracePredictor(recorded, placement, shape)


def _cache_size(
    limits: EngineLimits, decoder: ServedModel, ranks: int, *, replicated: bool
) -> tuple[int, int, int, int | None]:
    """Rows per rank, how many of them are spare, positions per row, and pages of the K/V cache, None = rows have
    memory of their own.

    Where they have not, as many rows again cost address space alone.
    """
    positions = min(decoder.max_positions, 2048) if limits.max_length is None else limits.max_length
    if not 1 <= positions <= decoder.max_positions:
        raise InputError(f"max_length ({positions}) must lie in 1..{decoder.max_positions}, the model's own limit")
    rows = limits.max_sequences if replicated else limits.rank_sequences or -(-limits.max_sequences // ranks)
    if limits.kv_bytes is None:
        return rows, 0, positions, None
    row_bytes = kv_bytes_per_sequence(decoder, positions)
    if limits.kv_bytes < row_bytes:
        raise InputError(
            f"the K/V budget ({limits.kv_bytes} bytes) must hold at least one sequence of {positions} positions, "
            f"which takes {row_bytes} bytes"
        )
    if isinstance(decoder, WholeModel) or decoder.device.type != "cpu":  # what is reserved there takes memory
        return min(rows, limits.kv_bytes // row_bytes), 0, positions, None
    pages = limits.kv_bytes // (kv_bytes_per_position(decoder) * PAGE)
    spare = rows if limits.reuses_prefixes else 0
    return rows + spare, spare, positions, max(pages, -(-positions // PAGE))
