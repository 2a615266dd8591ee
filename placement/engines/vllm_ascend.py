"""vllm-ascend: `expert_map` JSON; layers and devices count by their position in the lists."""

import json
import warnings
from pathlib import Path
from typing import Any

from moeplace.placement.engines.form import Export, Facts, Rows, check_form, redundant_slots
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import FormatError, InputError, MoeplaceWarning
from moeplace.profiling.files import atomic_write, read_json

NOTE = "the expert map is for Model Runner V1 of vllm-ascend, whose guide schedules its removal for v0.25.1"


def write(placement: Placement, path: Path) -> Export:
    """Write the map, one layer a line."""
    if path.suffix != ".json":
        raise InputError(f"{path} must end in .json: vllm-ascend refuses any other name")
    check_form(placement, "vllm-ascend")
    ranks = placement.num_ranks
    layers = [
        {
            "layer_id": layer,
            "device_count": ranks,
            "device_list": [{"device_id": i, "device_expert": held} for i, held in enumerate(row)],
        }
        for layer, row in enumerate(placement.slot_to_expert.reshape(placement.num_layers, ranks, -1).tolist())
    ]
    text = ",\n".join(json.dumps(layer) for layer in layers)
    with atomic_write(path) as file:
        file.write(f'{{"moe_layer_count": {placement.num_layers}, "layer_list": [\n{text}\n]}}\n'.encode())
    setting = {"eplb_config": {"expert_map_path": str(path), "num_redundant_experts": redundant_slots(placement)}}
    return Export((str(path),), f"--additional-config '{json.dumps(setting)}'", (NOTE,))


def read(path: Path, known: Facts) -> Rows:
    """Read layers and devices by position, as the engine does; warn where their numbers say something else."""
    document = read_json(path)
    layers = document.get("layer_list") if isinstance(document, dict) else None
    if not isinstance(layers, list) or document.get("moe_layer_count") != len(layers):
        raise FormatError(
            f"{path} is not a vllm-ascend expert map: it needs moe_layer_count and as many layers in a list"
        )
    rows, ranks = [], None
    for position, layer in enumerate(layers):
        devices = _entries(layer, "device_list", path, position)
        held = [_entries(device, "device_expert", path, position) for device in devices]
        if len({len(experts) for experts in held}) != 1 or ranks not in (None, len(held)):
            raise FormatError(f"{path}: layer {position} must have equally many devices and experts on each")
        named = [layer.get("layer_id"), *(device.get("device_id") for device in devices)]
        if named != [position, *range(len(devices))]:
            warnings.warn(
                f"{path}: layer {position} has other numbers than its positions say; vllm-ascend reads positions",
                MoeplaceWarning,
                stacklevel=3,
            )
        ranks = len(held)
        rows.append([expert for experts in held for expert in experts])
    return Rows(rows, Facts(num_ranks=ranks))


def _entries(entry: Any, key: str, path: Path, layer: int) -> list[Any]:
    found = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(found, list) or not found:
        raise FormatError(f"{path}: layer {layer} lacks a list {key}")
    return found
