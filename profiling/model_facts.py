"""What a model's configuration says that planning needs: sizes of tokens, of K/V, of experts.

Names differ by family; each fact is looked for under all names that families use, in nested configurations too.
"""

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
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float64": 8}
_WITHOUT_KV = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "lightning_attention", "moe", "mlp")
_MATRICES = 3
"""Gate, up and down projection of an expert."""
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
        expert_bytes=_MATRICES * hidden * _number(parts, *_EXPERT_HIDDEN) * _weight_bytes(parts),
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


def _weight_bytes(parts: list[Mapping[str, Any]]) -> int:
    """Bytes of a weight, 0 where weights are quantised to less than a byte or in a way that is not known."""
    quantised = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if quantised:
        return 1 if isinstance(quantised, Mapping) and quantised.get("quant_method") == "fp8" else 0
    dtype = next((str(part[n]) for part in parts for n in ("dtype", "torch_dtype") if part.get(n)), "")
    return _BYTES.get(dtype.removeprefix("torch."), 0)
