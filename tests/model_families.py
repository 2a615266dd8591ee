"""Every MoE family of the installed `transformers`, small: found by looking at the modules of what can be built.

A configuration class is filled with small numbers wherever it has an attribute of a known meaning; what a few classes
need beyond that is in `_OWN`.
"""

import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moeplace.profiling.recording.experts_modules import find_experts

VOCABULARY = 96
LAYERS = 4
MOST_PARAMETERS = 10_000_000
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "qk_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("num_experts_per_token", "index_n_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "moe_layer_interval"), 1),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "moe_num_expert_groups", "moe_layer_freq"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "mamba_d_state", "ssm_state_size", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads"), 8),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 512),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "num_mtp_modules", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("num_kv_shared_layers",), 0),
    "linear_num_value_heads": 4,
    "mamba_d_ssm": 128,
    "sliding_window": 16,
    "index_topk": 256,
    "moe_layer_end_index": -1,
    "hidden_size_per_layer_input": 16,
    "use_mamba_kernels": False,
}
_OWN: dict[str, dict[str, Any]] = {
    "jamba": {
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"], "moe_latent_size": None},
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [1]},
    "llama4_text": {
        "interleave_moe_layer_step": 1,
        "num_experts_per_tok": 1,
        "moe_layers": [0, 1, 2, 3],
        "attention_chunk_size": 64,
        "no_rope_layers": [1, 1, 1, 0],
    },
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 4, "moe_topk": 3, "num_key_value_heads": 4},
    "deepseek_v2": {"q_lora_rank": None, "topk_method": "greedy", "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
    "hunyuan_v1_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "moe_topk": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "dots3_note_text": {"layer_types": ["indexed_attention"] * 4, "per_layer_config": {}},
    "kimi_linear": {
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
        "hc_lowrank": 8,
        "hc_count": 2,
        "split_ngram_parts": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
}


@cache
def moe_families() -> tuple[str, ...]:
    """All model types of causal language models that have experts, or would have if they could be built."""
    return tuple(family for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if _speaks_of_experts(family))


def families_with_back_ends() -> list[str]:
    """Those of them whose source takes back ends for experts; nothing is imported for that."""
    return [f for f in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if "@use_experts_implementation" in _source_of(f)]


def _source_of(family: str) -> str:
    """The source of a family's models, empty where what is served of it is another family, its language model."""
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(family)
    path = folder / f"modeling_{folder.name}.py"
    if family not in CONFIG_MAPPING_NAMES or f"{family}_text" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return ""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _speaks_of_experts(family: str) -> bool:
    """Whether its source has a class of experts; of those that can be built the modules decide."""
    if "xperts" not in _source_of(family):
        return False
    try:
        with torch.device("meta"):
            model = build(family)
    except Exception:
        return True
    return bool(find_experts(model))


def small_config(family: str, **sizes: int) -> Any:
    """A small configuration of a model type; `sizes` where it has attributes of these names."""
    config_class = getattr(transformers, CONFIG_MAPPING_NAMES[family])
    plain = config_class()
    plain.__dict__["allow_global_per_layer_attribute_access"] = True
    own = _OWN.get(family, {})
    changes = {
        name: value
        for name, value in (_SMALL | sizes).items()
        if getattr(plain, name, None) is not None or (name.endswith("token_id") and hasattr(plain, name))
    }
    if hasattr(plain, "kv_lora_rank") and family != "kimi_linear":  # latent attention: a head has no size of its own
        changes.pop("qk_head_dim", None)
        changes.update(head_dim=8, num_key_value_heads=4)
    return config_class(**{**changes, **own})


def build(family: str, **sizes: int) -> Any:
    """A small model of a family, its weights as its constructor leaves them."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = small_config(family, **sizes)
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size} parameters are not small: its configuration nests what it is made of")
        return transformers.AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def save_family(family: str, folder: Path, *, seed: int = 0, shard_size: str = "5GB", **sizes: int) -> None:
    """Write a checkpoint with weights under which experts, routers and biases all matter for the logits."""
    torch.manual_seed(seed)
    model = build(family, **sizes).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "conv" not in name and "A_log" not in name:
            fan = parameter.shape[-1] if parameter.ndim == 2 else min(parameter.shape[-2:])
            routes = "gate.weight" in name or "router" in name
            parameter.normal_(0, 0.5 if "embed" in name else 1.0 if routes else 1.2 / math.sqrt(fan))
        elif parameter.ndim == 1 and "bias" in name and "dt_bias" not in name:
            parameter.normal_(0, 0.1)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name or "expert_bias" in name:
            buffer.normal_(0, 0.05)
        elif "tid2eid" in name:  # a table from token to experts, which must differ
            buffer.copy_(torch.rand(len(buffer), 8).argsort(1)[:, : buffer.shape[1]])
    model.generation_config = transformers.GenerationConfig(eos_token_id=0, pad_token_id=0, bos_token_id=0)
    model.save_pretrained(folder, max_shard_size=shard_size)


@torch.inference_mode()
def plain_logits(folder: Path, sequences: list[list[int]], *, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """(length, V) per sequence, of the plain model, one sequence at a time and without a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return [model.eval()(torch.tensor([s]), use_cache=False).logits[0] for s in sequences]
