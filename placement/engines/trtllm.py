"""TensorRT-LLM: `moe_load_balancer.yaml`; keys are decoder-layer indices."""

from pathlib import Path

import numpy as np
import yaml

from moeplace.placement.engines.form import Export, Facts, Rows, check_form
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import FormatError
from moeplace.profiling.files import atomic_write, require_file

KEYS = ("num_slots", "initial_global_assignments", "layer_updates_per_iter")
_SHOWN = 8
NOTE = (
    "TensorRT-LLM ignores the section in silence unless the EP size exceeds 1, attention DP is on and the architecture "
    "is DeepSeek-V3, V3.2 or V4, GLM MoE DSA, GPT-OSS, Kimi K2.5, Mixtral, Llama 4, Nemotron-H or Qwen2/3/3.5 MoE"
)


def write(placement: Placement, path: Path) -> Export:
    """Write the three keys that TensorRT-LLM knows."""
    check_form(placement, "TensorRT-LLM")
    layer_ids = [] if placement.layer_ids is None else placement.layer_ids.tolist()
    lines = [f"num_slots: {placement.num_slots}", "initial_global_assignments:"]
    lines += [f"  {i}: {row}" for i, row in zip(layer_ids, placement.slot_to_expert.tolist(), strict=True)]
    lines.append("layer_updates_per_iter: 0")
    with atomic_write(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    start = (
        f"--ep_size {placement.num_ranks} with --extra_llm_api_options FILE, where FILE holds "
        f"`enable_attention_dp: true` and `moe_config: {{load_balancer: {path}}}`"
    )
    return Export((str(path),), start, (NOTE, *_absent(placement)))


def _absent(placement: Placement) -> tuple[str, ...]:
    """What to say of layers that the file lacks: TensorRT-LLM stops at an MoE layer that it does not find."""
    layers = placement.num_hidden_layers
    missing = sorted(set(range(layers)) - set(np.asarray(placement.layer_ids).tolist()))
    shown = ", ".join(map(str, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
    unseen = (
        f"no row for decoder layers {shown}: if there are MoE layers among them that no recorder sees, --add-layers"
    )
    draft = f"a draft (MTP) layer is looked up as layer {layers}: where the model has one, --mtp-layers 1 adds it"
    return (f"{unseen} adds them", draft) if missing else (draft,)


def read(path: Path, known: Facts) -> Rows:
    """Read rows in the order of their decoder layers."""
    try:
        document = yaml.safe_load(require_file(path).read_text())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(document, dict) or not isinstance(document.get("initial_global_assignments"), dict):
        raise FormatError(f"{path} is not a TensorRT-LLM load balancer: it lacks initial_global_assignments")
    unknown = [str(key) for key in document if key not in KEYS]
    if unknown:
        raise FormatError(f"{path} has the key {unknown[0]!r}, which TensorRT-LLM does not know and stops at")
    assignments, slots = document["initial_global_assignments"], document.get("num_slots")
    for layer, row in assignments.items():
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise FormatError(f"{path}: layer {layer!r} must be a decoder-layer index")
        if not isinstance(row, list) or len(row) != slots:
            raise FormatError(f"{path}: layer {layer} must list num_slots ({slots}) experts")
    layer_ids = tuple(sorted(assignments))
    return Rows([assignments[layer] for layer in layer_ids], Facts(layer_ids=layer_ids))
