"""SGLang: `--init-expert-location`, JSON (or read from `.pt`) with one row for every decoder layer, dense included."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.placement.engines.form import Export, Facts, Rows, check_form, redundant_slots
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import FormatError, InputError, MoeplaceWarning
from moeplace.profiling.files import atomic_write, read_json

KEY = "physical_to_logical_map"
NOTE = (
    "SGLang gives model classes without get_model_config_for_expert_location (OLMoE, Mixtral, PhiMoE, GraniteMoE in "
    "0.5.23) no placement and stops at their first MoE layer"
)


def write(placement: Placement, path: Path, table: np.ndarray | None = None) -> Export:
    """Write the placement; a dense layer gets the trivial row `i % E`.

    `table` (L, S) says what slots hold that are empty in the placement.
    """
    if path.suffix != ".json":
        raise InputError(f"{path} must end in .json: SGLang takes any other name for the JSON text itself")
    check_form(placement, "SGLang", allow_empty=table is not None)
    rows = np.tile(np.arange(placement.num_slots) % placement.num_experts, (placement.num_hidden_layers, 1))
    rows[placement.layer_ids] = placement.slot_to_expert if table is None else table
    text = ",\n".join(json.dumps(row) for row in rows.tolist())
    with atomic_write(path) as file:
        file.write(f'{{"{KEY}": [\n{text}\n]}}\n'.encode())
    start = (
        f"--tp-size {placement.num_ranks} --ep-size {placement.num_ranks} --nnodes {placement.num_nodes} "
        f"--ep-num-redundant-experts {redundant_slots(placement)} "
        f"--init-expert-location {path}"
    )
    return Export((str(path),), start, (NOTE,))


def read(path: Path, known: Facts) -> Rows:
    """Read rows; which of them are MoE layers only `known.layer_ids` can tell."""
    document = _read_archive(path) if path.suffix == ".pt" else read_json(path)
    if not isinstance(document, dict) or KEY not in document:
        loads = isinstance(document, dict) and "logical_count" in document
        why = "it holds loads (logical_count), not a placement" if loads else f"it lacks the key {KEY!r}"
        raise FormatError(f"{path} is not an SGLang placement: {why}")
    unknown = sorted(set(document) - {KEY})
    if unknown:
        raise FormatError(f"{path} has the key {unknown[0]!r}, which SGLang does not know and stops at")
    rows = document[KEY]
    if not isinstance(rows, list):
        raise FormatError(f"{path}: {KEY} must be a list of rows")
    if known.layer_ids is None:
        warnings.warn(
            f"{path} does not say which decoder layers are dense: all {len(rows)} rows are taken for MoE layers "
            "(--layer-ids says which are)",
            MoeplaceWarning,
            stacklevel=3,
        )
        return Rows(rows, Facts(num_hidden_layers=len(rows)))
    outside = [layer for layer in known.layer_ids if not 0 <= layer < len(rows)]
    if outside:
        raise InputError(f"{path} has {len(rows)} rows, so decoder layer {outside[0]} is not among them")
    return Rows([rows[layer] for layer in known.layer_ids], Facts(num_hidden_layers=len(rows)))


def _read_archive(path: Path) -> Any:
    """The dictionary of a `.pt` file, its map as lists; nothing in it is executed."""
    from moeplace.profiling.containers.torch_archive import StoredTensor, read_torch_archive

    document = read_torch_archive(path)
    if isinstance(document, dict) and isinstance(tensor := document.get(KEY), StoredTensor):
        if len(tensor.shape) != 2 or tensor.dtype.kind != "i":
            raise FormatError(f"{path}: {KEY} must be integers (layers, slots), not {tensor.dtype} {tensor.shape}")
        document = {**document, KEY: tensor.read().tolist()}
    return document
