"""What a model's configuration says that planning needs: sizes of tokens, of K/V, of experts.

Names differ by family; each fact is looked for under all names that families use, in nested configurations too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplace.profiling.errors import FormatError
from moeplace.profiling.files import read_json

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "attn_config", "ffn_config")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_routed_experts")
_NULL = ("zero_expert_num", "num_zero_experts", "num_null_experts", "moe_num_null_experts")
_SHARED = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
_EXPERT_HIDDEN = (
    "moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "ffn_hidden_size", "intermediate_size",
)  # fmt: skip
_FP4_BLOCK = 32
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float64": 8}
_WITHOUT_KV = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "lightning_attention", "moe", "mlp")
_MOST = 1 << 40


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model; 0 and blank = not said.

    Attributes:
        model: name.
        hidden_size: D.
        num_hidden_layers: decoder layers in all.
        num_experts: routed experts per layer.
        null_experts: zero-computation experts per layer.
        top_k: K.
        kv_dim: K/V elements that a token leaves in a decoder layer, in the mean over decoder layers.
        shared_experts: shared experts per layer.
        expert_bytes: bytes of an expert's weights.
    """

    model: str = ""
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_experts: int = 0
    null_experts: int = 0
    top_k: int = 0
    kv_dim: int = 0
    shared_experts: int = 0
    expert_bytes: int = 0


def read_model_facts(path: str | Path) -> ModelFacts:
    """The facts in a `config.json`, or in that of a checkpoint folder; the folder's name is the model's.

    Raises:
        InputError: there is no such file.
        FormatError: it is not a configuration.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    config = read_json(file)
    if not isinstance(config, dict):
        raise FormatError(f"{file} is not a model configuration")
    return facts_of(config, name=file.resolve().parent.name)


def facts_of(config: Mapping[str, Any], *, name: str = "") -> ModelFacts:
    """The facts in a configuration given as a dictionary."""
    parts = [config, *(config[key] for key in _NESTED if isinstance(config.get(key), Mapping))]
    inner: Mapping[str, Any] = next((part for part in parts[1:] if "hidden_size" in part), {})
    parts += [inner[key] for key in _NESTED if isinstance(inner.get(key), Mapping)]
    hidden = _number(parts, "hidden_size", "d_model", "n_embd")
    shared = _number(parts, *_SHARED) or int(_number(parts, "shared_expert_intermediate_size") > 0)
    return ModelFacts(
        model=name,
        hidden_size=hidden,
        num_hidden_layers=_number(parts, "num_hidden_layers", "num_layers", "n_layers"),
        num_experts=_number(parts, *_EXPERTS),
        null_experts=_number(parts, *_NULL),
        top_k=_number(parts, "num_experts_per_tok", "moe_topk", "moe_top_k", "num_experts_per_token", "top_k_experts"),
        kv_dim=_kv_dim(parts, hidden),
        shared_experts=shared,
        expert_bytes=_expert_bytes(parts, hidden, _number(parts, *_EXPERT_HIDDEN)),
    )


def _number(parts: list[Mapping[str, Any]], *names: str) -> int:
    """The first positive whole number under one of the names, 0 where there is none."""
    for name in names:
        for part in parts:
            value = part.get(name)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if type(value) is int and 0 < value < _MOST:
                return value
    return 0


def _kv_dim(parts: list[Mapping[str, Any]], hidden: int) -> int:
    """K and V of all heads, or the latent of multi-head latent attention; layers without K/V thin it out."""
    latent = _number(parts, "kv_lora_rank")
    if latent:
        full = latent + _number(parts, "qk_rope_head_dim")
    else:
        heads = _number(parts, "num_attention_heads", "n_heads", "n_head")
        per_head = _number(parts, "head_dim") or (hidden // heads if heads else 0)
        full = 2 * (_number(parts, "num_key_value_heads", "kv_n_heads", "num_kv_heads") or heads) * per_head
    names = ("layer_types", "layers_block_type")
    kinds: list[str] = next((part[n] for part in parts for n in names if _is_names(part.get(n))), [])
    if kinds:
        return round(full * sum(not str(kind).startswith(_WITHOUT_KV) for kind in kinds) / len(kinds))
    period = _number(parts, "attn_layer_period", "full_attention_interval")
    return round(full / period) if period else full


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, str) for entry in value)


def _expert_bytes(parts: list[Mapping[str, Any]], hidden: int, expert_hidden: int) -> int:
    """Bytes of gate, up and down projection; 0 where weights are quantised in a way that is not known."""
    quantised = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if isinstance(quantised, Mapping):
        up, down = (_matrix_bytes(quantised, *size) for size in ((expert_hidden, hidden), (hidden, expert_hidden)))
        return 2 * up + down
    dtype = next((str(part[n]) for part in parts for n in ("dtype", "torch_dtype") if part.get(n)), "")
    return 3 * hidden * expert_hidden * _BYTES.get(dtype.removeprefix("torch."), 0)


def _matrix_bytes(stated: Mapping[str, Any], rows: int, columns: int) -> int:
    """Bytes of a quantised matrix (out, in), its scales and zeros; 0 where the form is not known.

    Forms: `moeplace.profiling.recording.quantised`; scales as they are published: 2 bytes, of fp8 blocks 4.
    """
    method, weights = stated.get("quant_method"), rows * columns
    if method == "mxfp4" or stated.get("expert_dtype") == "fp4":
        return weights // 2 + weights // _FP4_BLOCK
    if method == "fp8":
        block = stated.get("weight_block_size") or ()
        scales = math.prod(-(-size // step) for size, step in zip((rows, columns), block, strict=False)) if block else 0
        return weights + scales * (1 if stated.get("scale_fmt") == "ue8m0" else 4)
    if method == "compressed-tensors":
        groups = list((stated.get("config_groups") or {}).values())
        stated = (groups[0].get("weights") if groups else None) or {}
    bits, group = stated.get("bits", stated.get("num_bits")), stated.get("group_size") or columns
    if not isinstance(bits, int) or method not in ("awq", "gptq", "compressed-tensors"):
        return 0
    pairs = rows * (-(-columns // group) if group > 0 else 1)
    zeros = 0 if stated.get("symmetric") else pairs * bits // 8
    return weights * bits // 8 + 2 * pairs + zeros + (4 * columns if method == "gptq" else 0)
