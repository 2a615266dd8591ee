"""Tiny random checkpoints of the supported families, and what the plain model says of some sequences."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampler import Draw, draw_tokens
from moeplace.runtime.engine.sampling import SamplingParameters

VOCABULARY = 60
TOLERANCE, DEEPSEEK_TOLERANCE = 1e-7, 2e-5
"""Absolute, for logits around 1 in float64; DeepSeek's own modules compute routers and rotations in float32."""
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,  # large, so that experts matter for the logits
    "eos_token_id": 7,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
}
_QWEN: dict[str, Any] = {"moe_intermediate_size": 8, "num_experts": 6, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("OlmoeConfig", {"num_experts": 6, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6}),
    # Dense layers between the MoE layers and at the end.
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_QWEN, "num_hidden_layers": 4, "mlp_only_layers": [1, 3], "shared_expert_intermediate_size": 10},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**_QWEN, "num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 8}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_DEEPSEEK,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "q_lora_rank": None,
            "topk_method": "group_limited_greedy",
            "n_group": 3,
            "topk_group": 2,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_DEEPSEEK, "n_routed_experts": 8, "num_experts_per_tok": 2, "q_lora_rank": 8, "n_group": 4, "topk_group": 2},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


@dataclass(frozen=True, eq=False)
class Oracle:
    """A checkpoint and the plain model's answers, in float64.

    Attributes:
        path: the folder.
        sequences: token ids.
        prompt_lengths: where decoding takes over when sequences are scored.
        logits: (length, V) per sequence.
        requests: prompts with several sampling parameters and lengths.
        completions: token ids per request.
    """

    path: Path
    sequences: list[list[int]]
    prompt_lengths: list[int]
    logits: list[np.ndarray]
    requests: list[Request]
    completions: list[tuple[int, ...]]


def save_checkpoint(family: str, folder: Path, *, shard_size: str = "5GB", **changes: Any) -> Any:
    """Write a random checkpoint; returns the model."""
    class_name, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, class_name)(**{**_COMMON, **options, **changes})
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name:  # some start at zero
            torch.nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.normal_(std=0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


@torch.no_grad()
def make_oracle(family: str, folder: Path, **changes: Any) -> Oracle:
    """A checkpoint of a family with the plain model's answers."""
    save_checkpoint(family, folder, **changes)
    return ask_plain_model(folder)


@torch.no_grad()
def ask_plain_model(folder: Path, *, new_tokens: int = 5) -> Oracle:
    """The answers of the plain model, one sequence at a time and without a cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    rng = np.random.default_rng(1)
    vocabulary = model.config.vocab_size
    sequences = [rng.integers(0, vocabulary, n).tolist() for n in (9, 4, 12, 1, 9)]
    logits = [model(torch.tensor([s])).logits[0].numpy() for s in sequences]
    sampling = [
        SamplingParameters(),
        SamplingParameters(temperature=0.8, seed=5),
        SamplingParameters(temperature=1.5, top_p=0.7, seed=6),
        SamplingParameters(temperature=1.0, top_k=4, seed=6, repetition_penalty=1.3, min_tokens=4, choice=2),
        SamplingParameters(presence_penalty=0.5, frequency_penalty=1.0),
    ]
    requests = [
        Request(str(i), tuple(s), max_new_tokens=new_tokens + i % 3, sampling=p)
        for i, (s, p) in enumerate(zip(sequences, sampling, strict=True))
    ]
    stops = model.generation_config.eos_token_id
    completions = [_complete(model, request, (stops,)) for request in requests]
    return Oracle(folder, sequences, [5, 4, 7, 1, 1], logits, requests, completions)


def _complete(model: Any, request: Request, stops: tuple[int, ...]) -> tuple[int, ...]:
    prompt, added = request.token_ids, []
    while len(added) < request.max_new_tokens and (not added or added[-1] not in stops):
        logits = model(torch.tensor([[*prompt, *added]])).logits[:, -1]
        draw = Draw(request.sampling, len(prompt) + len(added), prompt, added, stops)
        added.append(int(draw_tokens(logits, [draw])[0]))
    return tuple(added)
