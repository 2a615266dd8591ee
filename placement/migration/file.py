"""Migration plan files: JSON with the format tag `moeplace.plan/1`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.placement.migration.copies import CHECKPOINT
from moeplace.placement.migration.layout import Layout
from moeplace.placement.migration.plan import MigrationPlan, Transfer
from moeplace.placement.modes import MODES
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import atomic_write, read_json

FORMAT = "moeplace.plan/1"

SUMS = ("staging_bytes", "bytes", "inter_node_bytes", "checkpoint_bytes", "local_bytes", "least_bytes")


def summarize_plan(plan: MigrationPlan) -> dict[str, Any]:
    """The figures of a plan, without its transfers."""
    return {
        "num_rounds": len(plan.rounds),
        "num_transfers": len(plan.transfers),
        "fetched": sum(len(set(plan.members(transfer))) == 2 for transfer in plan.transfers),
        **{name: getattr(plan, name) for name in SUMS},
        "seconds": plan.seconds,
    }


def save_plan(path: str | Path, plan: MigrationPlan) -> None:
    """Write a plan file, atomically; every round is one line of `[layer, expert, source, target, lands]`.

    Raises:
        InputError: the file cannot be written.
    """
    head = {"format": FORMAT, **plan_to_json(plan)}
    rows = head.pop("rounds")
    lines = [f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in head.items()]
    rounds = ",\n  ".join(json.dumps(transfers) for transfers in rows)
    lines.append(f' "rounds": [\n  {rounds}]' if rounds else ' "rounds": []')
    with atomic_write(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def plan_to_json(plan: MigrationPlan) -> dict[str, Any]:
    """As plain data: what a plan file holds."""
    layout = plan.layout
    return {
        **summarize_plan(plan),
        "old": {"digest": plan.old_digest, "slots_of_rank": layout.old_slots_of_rank.tolist()},
        "new": {
            "digest": plan.new_digest,
            "slots_of_rank": layout.new_slots_of_rank.tolist(),
            "node_of_rank": plan.node_of_rank.tolist(),
            "mode": plan.mode,
            "layer_ids": plan.layer_ids.tolist(),
            "num_hidden_layers": plan.num_hidden_layers,
            **({} if plan.tier is None else {"tier": plan.tier.tolist()}),
        },
        "origin": layout.origin.tolist(),
        "lost_ranks": list(layout.lost_ranks),
        "emptied": plan.emptied,
        "round_seconds": plan.round_seconds,
        "rounds": plan.rounds,
    }


def load_plan(path: str | Path) -> MigrationPlan:
    """Read a plan file. `apply_plan` and `replay` check it against the placement that it starts from.

    Raises:
        InputError: there is no such file.
        FormatError: it is not a plan file, or a transfer names a slot or a round that does not exist.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FormatError(f"{path} is not a plan file: it lacks the tag {FORMAT!r}")
    try:
        plan = plan_from_json(document)
        _check_transfers(plan)
    except KeyError as error:
        raise FormatError(f"{path} is not a plan file: it lacks the key {error}") from error
    except (InputError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"{path} is not a plan file: {error}") from error
    return plan


def plan_from_json(document: dict[str, Any]) -> MigrationPlan:
    """From plain data, as `plan_to_json` gives it; raises whatever a wrong document makes the types raise."""
    old, new = document["old"], document["new"]
    if new["mode"] not in MODES:
        raise ValueError(f"mode {new['mode']!r} must be one of {', '.join(MODES)}")
    layout = Layout(old["slots_of_rank"], new["slots_of_rank"], document["origin"], tuple(document["lost_ranks"]))
    rounds = tuple(tuple(Transfer(*map(int, item)) for item in transfers) for transfers in document["rounds"])
    return MigrationPlan(
        rounds=rounds,
        emptied=tuple((int(layer), int(slot)) for layer, slot in document["emptied"]),
        layout=layout,
        node_of_rank=np.asarray(new["node_of_rank"], dtype=np.int64),
        mode=new["mode"],
        layer_ids=np.asarray(new["layer_ids"], dtype=np.int64),
        num_hidden_layers=int(new["num_hidden_layers"]),
        old_digest=str(old["digest"]),
        new_digest=str(new["digest"]),
        round_seconds=tuple(float(seconds) for seconds in document["round_seconds"]),
        tier=np.asarray(new["tier"], dtype=np.int8) if "tier" in new else None,
        **{name: int(document[name]) for name in SUMS},
    )


def _check_transfers(plan: MigrationPlan) -> None:
    layout, layers = plan.layout, len(plan.layer_ids)
    old_slots, new_slots = len(layout.place_of_old), len(layout.place_of_new)
    if plan.node_of_rank.shape != layout.new_slots_of_rank.shape or len(plan.round_seconds) != len(plan.rounds):
        raise ValueError("ranks and nodes, or rounds and their seconds, differ in number")
    for index, transfers in enumerate(plan.rounds):
        for transfer in transfers:
            inside = 0 <= transfer.layer < layers and 0 <= transfer.target < new_slots
            if not inside or not CHECKPOINT <= transfer.source < old_slots:
                raise ValueError(f"round {index} has the transfer {list(transfer)} of an unknown layer or slot")
            if not index <= transfer.lands < len(plan.rounds):
                raise ValueError(f"a transfer of round {index} lands in round {transfer.lands} of {len(plan.rounds)}")
    for layer, slot in plan.emptied:
        if not (0 <= layer < layers and 0 <= slot < new_slots):
            raise ValueError(f"slot {slot} of MoE layer {layer} is emptied but not there")
