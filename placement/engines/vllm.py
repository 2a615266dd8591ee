"""vLLM: two proposed files; no released vLLM reads either.

The first is a JSON line `eplb_initial_mapping` (pull request 41141), the second a list of lists (pull request 49572).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.placement.engines.form import Export, Facts, Rows, check_form, redundant_slots
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import FormatError
from moeplace.profiling.files import atomic_write, require_file

RECORD = "eplb_initial_mapping"
NOTE = (
    "no released vLLM (0.33.0 and before) reads a placement file: these are the forms that its open pull requests "
    "41141 and 49572 propose"
)


def write(placement: Placement, path: Path, table: np.ndarray | None = None) -> Export:
    """Write the record to `path` and the list beside it as `<path>.list.json`.

    `table` (L, S) says what slots hold that are empty in the placement.
    """
    check_form(placement, "vLLM", allow_empty=table is not None)
    rows = (placement.slot_to_expert if table is None else table).tolist()
    redundant = redundant_slots(placement)
    record = {
        "record_type": RECORD,
        "version": 1,
        "num_redundant_experts": redundant,
        "num_slots": placement.num_slots,
        "initial_global_assignments": {str(i): row for i, row in enumerate(rows)},
    }
    second = path.with_name(f"{path.name}.list.json")
    with atomic_write(path) as file:
        file.write(json.dumps(record).encode() + b"\n")
    with atomic_write(second) as file:
        file.write(json.dumps(rows).encode() + b"\n")
    one, other = (
        json.dumps({"num_redundant_experts": redundant, key: str(file)})
        for key, file in (("initial_mapping_path", path), ("initial_expert_map_path", second))
    )
    start = f"--enable-expert-parallel --enable-eplb --eplb-config '{one}' (41141) or '{other}' (49572)"
    return Export((str(path), str(second)), start, (NOTE,))


def read(path: Path, known: Facts) -> Rows:
    """Read either form; a list for all layers at once needs `known.layer_ids` to know how many."""
    try:
        text = require_file(path).read_text()
        documents = [json.loads(text)] if text.lstrip().startswith("[") else _lines(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not a vLLM placement: {error}") from error
    if isinstance(documents[0], list):
        rows = documents[0]
        if rows and isinstance(rows[0], int):
            if known.layer_ids is None:
                raise FormatError(
                    f"{path} has one list for all layers: give the layer ids (--layer-ids) to say how many there are"
                )
            rows = [rows] * len(known.layer_ids)
        return Rows(rows)
    records = [item for item in documents if isinstance(item, dict) and item.get("record_type") == RECORD]
    if len(records) != 1:
        raise FormatError(f"{path} has {len(records)} records {RECORD!r}, one is needed")
    return _read_record(records[0], path)


def _lines(text: str) -> list[Any]:
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("it is empty")
    return lines


def _read_record(record: dict[str, Any], path: Path) -> Rows:
    assignments, slots, redundant = (
        record.get(key) for key in ("initial_global_assignments", "num_slots", "num_redundant_experts")
    )
    if not isinstance(assignments, dict) or not isinstance(slots, int) or not isinstance(redundant, int):
        raise FormatError(f"{path}: the record lacks num_slots, num_redundant_experts or initial_global_assignments")
    if set(assignments) != {str(layer) for layer in range(len(assignments))}:
        raise FormatError(f"{path}: layers must be numbered '0'..'{len(assignments) - 1}', the MoE layers in order")
    rows = [assignments[str(layer)] for layer in range(len(assignments))]
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != slots:
            raise FormatError(f"{path}: MoE layer {layer} must list num_slots ({slots}) experts")
    return Rows(rows, Facts(num_experts=slots - redundant))
