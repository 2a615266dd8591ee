"""Decoder: a Hugging Face causal language model without its routed experts.

Attention, norms, routers, rotary embeddings and shared experts are the modules of `transformers`. The model is built on
the meta device, its routed experts are dropped there, and the remaining tensors are read from the checkpoint.

Shape letters: M tokens, D hidden size, B x Q sequences by queries, V vocabulary.
"""

import re
import warnings
from typing import Any, Protocol

import torch
from torch import nn

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.recording.cache_names import cache_keyword
from moeplace.runtime.models.blocks import ModelBlock
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.families import disk_to_module


class AttentionView(Protocol):
    """How the tokens of a rank sit in sequences during one pass; also the cache that attention modules write to."""

    position_embeddings: Any

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """(M, D) tokens -> (B, Q, D)."""

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Q, D) -> (M, D)."""

    def mask(self, window: int | None, *, additive: torch.dtype | None) -> torch.Tensor | None:
        """(B, 1, Q, keys) mask, or None where causality alone suffices; `window` = keys a query sees, if limited."""

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Keep new keys and values (B, heads, Q, dim) of a layer; all keys and values that the queries see."""


class Decoder:
    """The parts of a model between its exchanges.

    Attributes:
        config: the model's configuration object.
        num_layers: decoder layers.
        moe_index: decoder layer -> MoE layer; dense layers are absent.
        dtype: of the hidden states.
        device: where it lives.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> None:
        """Build the model and read everything but the routed experts.

        Raises:
            FormatError: the configuration is not understood, or tensors are missing or have other shapes.
        """
        self.device = torch.device(device)
        self._model, self.config = _build_skeleton(checkpoint)
        self.dtype = dtype or _stated_dtype(self.config)
        self._layers: list[Any] = list(self._model.model.layers)
        self.num_layers = len(self._layers)
        self.moe_index = {int(layer): index for index, layer in enumerate(checkpoint.layer_ids)}
        for layer in self.moe_index:
            self._drop_experts(checkpoint, layer)
        _load(self._model, checkpoint, self.dtype, self.device)
        self._model.model.rotary_emb = _rebuild_rotary(self._model.model.rotary_emb, self.config, self.device)
        self._eager = self.config._attn_implementation == "eager"
        self._windows = [_window(self.config, layer) for layer in range(self.num_layers)]
        self._cache_keywords = [cache_keyword(layer.self_attn.forward) for layer in self._layers]
        self.blocks = [ModelBlock(self._layers[int(layer)]) for layer in checkpoint.layer_ids]
        self._account_for_parameters(checkpoint)

    def _drop_experts(self, checkpoint: Checkpoint, layer: int) -> None:
        mlp = self._layers[layer].mlp
        if getattr(mlp, "experts", None) is None:
            raise FormatError(
                f"{checkpoint.path} has experts in decoder layer {layer}, which its config.json makes dense"
            )
        mlp.experts = nn.Identity()

    def _account_for_parameters(self, checkpoint: Checkpoint) -> None:
        """Stop where a parameter of the model would be left out: its tokens would be wrong without a word."""
        used: list[Any] = [self._model.model.embed_tokens, self._model.model.norm, self._model.lm_head]
        for layer, module in enumerate(self._layers):
            used += [module.input_layernorm, module.self_attn]
            moe_layer = self.moe_index.get(layer)
            used += (
                [module.post_attention_layernorm, module.mlp] if moe_layer is None else self.blocks[moe_layer].modules()
            )
        known = {id(parameter) for module in used for parameter in (*module.parameters(), *module.buffers())}
        left = [name for name, parameter in self._model.named_parameters() if id(parameter) not in known]
        if left:
            family = checkpoint.model_type
            raise InputError(
                f"family {family} is not supported (because the engine would leave out {len(left)} of its parameters, "
                f"the first is {left[0]})"
            )

    @property
    def max_positions(self) -> int:
        """Longest sequence the model was made for."""
        return int(self.config.max_position_embeddings)

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self._model.lm_head.out_features)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self._model.lm_head.in_features)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(M,) token ids -> (M, D)."""
        return self._model.model.embed_tokens(ids)

    def position_embeddings(self, positions: torch.Tensor) -> Any:
        """What attention wants to know of positions (B, Q)."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self._model.model.rotary_emb(like, positions)

    def attend(self, layer: int, x: torch.Tensor, view: AttentionView) -> torch.Tensor:
        """(M, D) residual stream -> after the attention of a decoder layer."""
        module = self._layers[layer]
        out, _ = module.self_attn(
            hidden_states=view.fold(module.input_layernorm(x)),
            position_embeddings=view.position_embeddings,
            attention_mask=view.mask(self._windows[layer], additive=self.dtype if self._eager else None),
            **{self._cache_keywords[layer]: view},
        )
        return x + view.unfold(out)

    def feed_forward(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """(M, D) residual stream -> after the dense feed-forward of a decoder layer."""
        module = self._layers[layer]
        return x + module.mlp(module.post_attention_layernorm(x))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(M, D) -> (M, V)."""
        return self._model.lm_head(self._model.model.norm(x))


def _build_skeleton(checkpoint: Checkpoint) -> tuple[Any, Any]:
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a foreign configuration can fail anywhere in transformers
        reason = " ".join(str(error).split())[:200]
        raise FormatError(
            f"{checkpoint.path / 'config.json'} does not describe a causal language model: {reason}"
        ) from error
    return model.eval().requires_grad_(False), model.config


def _stated_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _load(model: Any, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Replace every meta tensor by the checkpoint's."""
    kept_exact = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept_exact += tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    on_disk = {disk_to_module(name): name for name in checkpoint.other_names()}
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, meta in [*model.named_parameters(), *model.named_buffers()]:
        if "rotary_emb" in name or (tied and name == "lm_head.weight"):
            continue
        if name not in on_disk:
            raise FormatError(f"{checkpoint.path} lacks the tensor {name}")
        value = checkpoint.tensor(on_disk[name])
        if value.shape != meta.shape:
            raise FormatError(
                f"{checkpoint.path}: the tensor {name} has shape {list(value.shape)}, its config.json says "
                f"{list(meta.shape)}"
            )
        exact = any(re.search(rf"\b{part}\b", name) for part in kept_exact)
        _assign(model, name, value.to(device, torch.float32 if exact and dtype.itemsize < 4 else dtype))
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _rebuild_rotary(rotary: Any, config: Any, device: torch.device) -> Any:
    """The rotary module again, with real frequencies: they are computed, not stored."""
    return type(rotary)(config=config).to(device)


def _window(config: Any, layer: int) -> int | None:
    """Keys that a query of a layer sees, None = all before it."""
    window = getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None)
    if types is not None:
        return window if types[layer] == "sliding_attention" else None
    return window
