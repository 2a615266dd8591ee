"""Placement files: JSON with the format tag `moeplace.placement/1`, or `/2` where slots have tiers.

Readers that know no tiers must not take such a file for one whose experts are all in fast memory.
"""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.errors import FormatError, InputError, MoeplaceWarning
from moeplace.profiling.files import atomic_write, read_json

FORMAT = "moeplace.placement/1"
TIERED_FORMAT = "moeplace.placement/2"


@dataclass(frozen=True)
class PlacementFile:
    """A placement with its provenance.

    Attributes:
        placement: the placement.
        solver: name, seed, seconds, status, objective, lower_bound, gap of the run that made it; may be empty.
        evidence: what an evaluation said of it, with the split; may be empty.
    """

    placement: Placement
    solver: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Any] = field(default_factory=dict)


def save_placement(
    path: str | Path,
    placement: Placement,
    *,
    solver: dict[str, Any] | None = None,
    evidence: dict[str, Any] | None = None,
    problem: dict[str, Any] | None = None,
    certificate: dict[str, Any] | None = None,
) -> None:
    """Write a placement file, atomically; every layer is one line.

    Args:
        path: the file.
        placement: what it holds.
        solver, evidence: where it comes from, and what it is worth.
        problem, certificate: what `moeplace verify` needs to judge that, see `placement.statement` and
            `bounds.certificate`; absent where None.

    Raises:
        InputError: the file cannot be written.
    """
    slots, per_node = placement.slots_of_rank, np.bincount(placement.node_of_rank)
    experts = placement.experts_per_layer
    head: dict[str, Any] = {
        "format": FORMAT if placement.tier is None else TIERED_FORMAT,
        "num_layers": placement.num_layers,
        "num_experts": placement.num_experts,
        "num_ranks": placement.num_ranks,
        "ranks_per_node": _scalar_if_equal(per_node),
        "slots_per_rank": _scalar_if_equal(slots),
        "num_hidden_layers": placement.num_hidden_layers,
        "layer_ids": [] if placement.layer_ids is None else placement.layer_ids.tolist(),
    }
    if (experts != experts[0]).any():
        head["experts_per_layer"] = experts.tolist()
    tail = {
        "mode": placement.mode,
        "solver": solver or {},
        "evidence": evidence or {},
        "digest": placement.digest,
    }
    tail |= {key: value for key, value in (("problem", problem), ("certificate", certificate)) if value is not None}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for name, table in (("slot_to_expert", placement.slot_to_expert), ("tier", placement.tier)):
        if table is not None:
            rows = ",\n  ".join(json.dumps(row) for row in table.tolist())
            lines.append(f' "{name}": [\n  {rows}]')
    lines += [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in tail.items()]
    with atomic_write(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def load_placement_file(path: str | Path, *, running: bool = False) -> PlacementFile:
    """Read a placement file with its provenance.

    Args:
        path: the file.
        running: it is what an engine runs, whose own balancer may have put an expert twice on a rank: the second slot
            is then read as empty, free for another expert, and a warning says so. Elsewhere that is an error.

    Raises:
        InputError: there is no such file, or the placement breaks a rule.
        FormatError: it is not a placement file, or its digest does not fit its content.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") not in (FORMAT, TIERED_FORMAT):
        raise FormatError(f"{path} is not a placement file: it lacks the tag {FORMAT!r}")
    if ("tier" in document) != (document["format"] == TIERED_FORMAT):
        raise FormatError(f"{path} is not a placement file: tiers and the tag {TIERED_FORMAT!r} go together")
    try:
        ranks = int(document["num_ranks"])
        slots = np.broadcast_to(np.asarray(document["slots_per_rank"], dtype=np.int64), (ranks,))
        per_node = np.asarray(document.get("ranks_per_node", ranks), dtype=np.int64)
        if per_node.ndim:
            node = np.repeat(np.arange(len(per_node)), per_node)
        else:
            node = np.arange(ranks) // int(per_node)
        rows = np.asarray(document["slot_to_expert"])
        layers = int(document["num_layers"])
        if rows.ndim != 2 or len(rows) != layers:
            raise ValueError(f"slot_to_expert must be {layers} rows of equal length")
        twice = _held_twice(rows, slots) if running else np.zeros(rows.shape, bool)
        experts = document.get("experts_per_layer", document["num_experts"])
        placement = Placement(
            slot_to_expert=np.where(twice, EMPTY_SLOT, rows) if twice.any() else rows,
            slots_of_rank=slots,
            node_of_rank=node,
            experts_per_layer=np.broadcast_to(np.asarray(experts, dtype=np.int64), (layers,)),
            layer_ids=np.asarray(document.get("layer_ids") or np.arange(layers)),
            num_hidden_layers=int(document.get("num_hidden_layers", 0)),
            mode=document.get("mode", "dispatch-combine"),
            tier=np.asarray(document["tier"]) if "tier" in document else None,
        )
    except InputError as error:
        raise type(error)(f"{path}: {error}") from error
    except KeyError as error:
        raise FormatError(f"{path} is not a placement file: it lacks the key {error}") from error
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise FormatError(f"{path} is not a placement file: {error}") from error
    if twice.any():
        warnings.warn(
            f"{path}: {int(twice.sum())} slots hold an expert that their rank holds already; they count as empty",
            MoeplaceWarning,
            stacklevel=2,
        )
    stated = None if twice.any() else document.get("digest")  # of what no placement can hold there is no digest
    if stated is not None and stated != placement.digest:
        raise FormatError(f"{path} was changed after it was written: its digest does not fit its content")
    solver, evidence = document.get("solver") or {}, document.get("evidence") or {}
    if not isinstance(solver, dict) or not isinstance(evidence, dict):
        raise FormatError(f"{path} is not a placement file: solver and evidence must be objects")
    return PlacementFile(placement, solver, evidence)


def load_placement(path: str | Path, *, running: bool = False) -> Placement:
    """Read the placement of a placement file; arguments and errors are those of `load_placement_file`."""
    return load_placement_file(path, running=running).placement


def _held_twice(rows_LS: np.ndarray, slots_R: np.ndarray) -> np.ndarray:
    """(L, S) bool, slots whose expert is in an earlier slot of the same rank."""
    rank_S, twice_LS = np.repeat(np.arange(len(slots_R)), slots_R), np.zeros(rows_LS.shape, bool)
    for row_S, twice_S in zip(rows_LS, twice_LS, strict=True):
        if len(row_S) == len(rank_S):  # else the placement says what is wrong
            twice_S[:] = row_S >= 0
            twice_S[np.unique(np.stack([rank_S, row_S]), axis=1, return_index=True)[1]] = False
    return twice_LS


def _scalar_if_equal(values: np.ndarray) -> int | list[int]:
    return int(values[0]) if (values == values[0]).all() else values.tolist()
