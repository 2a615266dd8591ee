"""What every engine's placement file has in common: what it cannot say, and what must be added to read it.

Shape letters: L MoE layers, E experts per layer, R ranks, C slots per rank, S = R*C slots per layer.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import numpy as np

from moeplace.placement.modes import Mode
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.errors import FormatError, InputError, MoeplaceWarning

_SHOWN = 6


@dataclass(frozen=True)
class Export:
    """What was written and how to start the engine with it.

    Attributes:
        files: paths, the placement first.
        start: the exact flags or settings.
        notes: what the user must know, one sentence each.
    """

    files: tuple[str, ...]
    start: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What a file may leave open; None = not known.

    Attributes:
        num_ranks: R.
        ranks_per_node: one number, or one a node.
        num_experts: E.
        layer_ids: decoder-layer index of each MoE layer.
        num_hidden_layers: decoder layers in all.
        mode: execution mode the placement was made for.
    """

    num_ranks: int | None = None
    ranks_per_node: int | tuple[int, ...] | None = None
    num_experts: int | None = None
    layer_ids: tuple[int, ...] | None = None
    num_hidden_layers: int | None = None
    mode: str | None = None

    def over(self, other: "Facts") -> Self:
        """These facts, completed by `other`."""
        missing = {f.name: getattr(other, f.name) for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **missing)


@dataclass(frozen=True)
class Rows:
    """What a reader found.

    Attributes:
        slot_to_expert: L lists of S expert ids.
        facts: what the file says itself.
    """

    slot_to_expert: Sequence[Sequence[int]]
    facts: Facts = Facts()


def check_form(placement: Placement, engine: str, *, allow_empty: bool = False) -> None:
    """Refuse what no engine's file can say: unequal slots, unequal layers, empty slots.

    Raises:
        InputError: names the first layer (and rank or slot) that does not fit.
    """
    slots_R, experts_L = placement.slots_of_rank, placement.experts_per_layer
    if (slots_R != slots_R[0]).any():
        rank, most = int(np.argmax(slots_R != slots_R[0])), int(slots_R.max())
        raise InputError(
            f"{engine} needs equal slots on every rank, but in MoE layer 0 (as in all) rank {rank} has {slots_R[rank]} "
            f"and rank 0 has {slots_R[0]}: solve again with --slots-per-rank {most} "
            f"({most * len(slots_R)} slots, {most * len(slots_R) - int(experts_L.max())} of them redundant)"
        )
    if (experts_L != experts_L[0]).any():
        layer = int(np.argmax(experts_L != experts_L[0]))
        raise InputError(
            f"{engine} needs equally many experts in every layer, but MoE layer {layer} has {experts_L[layer]} "
            f"and MoE layer 0 has {experts_L[0]}"
        )
    if not allow_empty and (placement.slot_to_expert == EMPTY_SLOT).any():
        layer, slot = np.argwhere(placement.slot_to_expert == EMPTY_SLOT)[0]
        raise InputError(
            f"{engine} cannot express empty slots, but slot {slot} of MoE layer {layer} is empty: "
            "fill it with a replica, or solve without --leave-empty, a looser --max-imbalance or fewer slots per rank"
        )


def redundant_slots(placement: Placement) -> int:
    """S - E, the redundancy that an engine must be started with."""
    return placement.num_slots - placement.num_experts


def build_placement(rows: Rows, known: Facts, path: str, engine: str) -> Placement:
    """A validated placement from rows and facts; what the file says must agree with what the caller says.

    Raises:
        InputError: something needed is neither in the file nor given, or the two disagree.
        FormatError: the rows are no placement.
    """
    for field in fields(Facts):
        said, given = getattr(rows.facts, field.name), getattr(known, field.name)
        if None not in (said, given) and said != given:
            raise InputError(f"{path} says {field.name} {said}, but {given} was given")
    facts = rows.facts.over(known)
    table = integer_rows(rows.slot_to_expert, path)
    if facts.num_ranks is None:
        raise InputError(f"{path} does not say how many ranks there are: give the number of ranks (--ranks)")
    slots = table.shape[1]
    if facts.num_ranks < 1 or not slots or slots % facts.num_ranks:
        raise FormatError(f"{path} has {slots} slots per layer, not a multiple of {facts.num_ranks} ranks")
    table = _without_duplicates(table, facts, path)
    experts = int(table.max(initial=0)) + 1 if facts.num_experts is None else facts.num_experts
    _check_experts(table, experts, facts.num_ranks, path)
    if not 1 <= experts <= slots:
        raise FormatError(f"{path} has {slots} slots per layer, which cannot hold {experts} experts")
    try:
        return Placement(
            table,
            np.full(facts.num_ranks, slots // facts.num_ranks),
            _nodes(facts.ranks_per_node, facts.num_ranks),
            np.full(len(table), experts),
            None if facts.layer_ids is None else np.asarray(facts.layer_ids),
            facts.num_hidden_layers or 0,
            "dispatch-combine" if facts.mode is None else cast(Mode, facts.mode),
        )
    except (InputError, OverflowError) as error:
        raise FormatError(f"{path} is not a valid {engine} placement: {error}") from error


def _without_duplicates(table: np.ndarray, facts: Facts, path: str) -> np.ndarray:
    """The table with -1, and a warning, where a slot repeats an expert that its rank holds: what balancers waste."""
    assert facts.num_ranks is not None
    rows_LRC = table.reshape(len(table), facts.num_ranks, -1)
    again_LRC = np.zeros(rows_LRC.shape, bool)
    for slot in range(1, rows_LRC.shape[2]):
        here_LR1 = rows_LRC[:, :, slot : slot + 1]
        again_LRC[:, :, slot] = ((rows_LRC[:, :, :slot] == here_LR1) & (here_LR1 >= 0)).any(axis=2)
    if not again_LRC.any():
        return table
    layer, rank, slot = np.argwhere(again_LRC)[0].tolist()
    layers = np.flatnonzero(again_LRC.any(axis=(1, 2)))
    known = facts.layer_ids is not None and len(facts.layer_ids) == len(table)
    named = [facts.layer_ids[index] if known and facts.layer_ids else index for index in layers.tolist()]
    kind = "decoder" if known else "MoE"
    shown = ", ".join(map(str, named[:_SHOWN])) + (", ..." if len(named) > _SHOWN else "")
    warnings.warn(
        f"{path}: {int(again_LRC.sum())} slots repeat an expert that their rank holds already, are wasted and read as "
        f"empty (first: rank {rank} holds expert {rows_LRC[layer, rank, slot]} twice in {kind} layer {named[0]}; "
        f"{kind} layers {shown})",
        MoeplaceWarning,
        stacklevel=4,
    )
    return np.where(again_LRC, EMPTY_SLOT, rows_LRC).reshape(table.shape)


def _check_experts(table: np.ndarray, experts: int, ranks: int, path: str) -> None:
    """Refuse an expert beyond those of a layer, and say what it may be."""
    over = np.argwhere(table >= experts)
    if not len(over):
        return
    layer, slot = over[0].tolist()
    expert = int(table[layer, slot])
    held = (table[layer].reshape(ranks, -1) == expert).any(axis=1)
    why = ""
    if held.all() and ranks > 1:
        why = (
            ": every rank holds it, as a shared expert that is placed among the routed ones; read it with "
            f"--num-experts {int(table.max()) + 1}"
        )
    raise FormatError(
        f"{path}: slot {slot} of MoE layer {layer} holds expert {expert}, which must lie in 0..{experts - 1}{why}"
    )


def integer_rows(rows: Any, path: str) -> np.ndarray:
    """(L, S) int64 from lists.

    Raises:
        FormatError: they are not rows of integers of equal length.
    """
    if not isinstance(rows, Sequence | np.ndarray) or not len(rows) or not isinstance(rows[0], Sequence | np.ndarray):
        raise FormatError(f"{path} holds no rows of expert ids")
    width = len(rows[0])
    for layer, row in enumerate(rows):
        if not isinstance(row, Sequence | np.ndarray) or isinstance(row, str):
            raise FormatError(f"{path}: layer {layer} is not a list of expert ids")
        if len(row) != width:
            raise FormatError(f"{path}: layer {layer} has {len(row)} slots, layer 0 has {width}")
        for value in row:
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or abs(int(value)) > 2**31 - 1:
                shown = repr(value)[:40] if isinstance(value, str | float) else f"a {type(value).__name__}"
                raise FormatError(f"{path}: layer {layer} holds {shown}, which is not an expert id")
    return np.asarray(rows, dtype=np.int64).reshape(len(rows), width)


def _nodes(ranks_per_node: int | tuple[int, ...] | None, ranks: int) -> np.ndarray:
    """(R,) node of each rank; None = one node."""
    if isinstance(ranks_per_node, tuple):
        if min(ranks_per_node, default=0) < 1 or sum(ranks_per_node) != ranks:
            raise InputError(f"ranks per node {list(ranks_per_node)} must add up to {ranks} ranks")
        return np.repeat(np.arange(len(ranks_per_node)), ranks_per_node)
    per_node = ranks if ranks_per_node is None else ranks_per_node
    if per_node < 1 or ranks % per_node:
        raise InputError(f"ranks ({ranks}) must be a multiple of ranks per node ({per_node})")
    return np.arange(ranks) // per_node
