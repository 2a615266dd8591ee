"""Decoder: a Hugging Face causal language model cut at its MoE layers, its routed experts elsewhere.

Attention, norms, routers, rotary embeddings and shared experts are the modules of `transformers`. What lies between two
exchanges is called here module by module, for the tokens of many sequences at once; so tokens may change ranks at every
MoE layer. Only families whose decoder layers fall into an attention and an MoE part can be cut (`splitting` compares
the parts with the whole); the others run as a `WholeModel`.

Shape letters: M tokens, D hidden size, B x Q sequences by queries, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from moeplace.profiling.recording.cache_names import cache_keyword
from moeplace.runtime.models.blocks import ModelBlock, NotSplitError
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opened_model import OpenedModel
from moeplace.runtime.models.quick_norm import quicken_norms
from moeplace.runtime.models.token_attention import (
    Rotation,
    SeenKv,
    TokenAttention,
    find_token_attention,
    tried_positions,
)


class AttentionView(Protocol):
    """How the tokens of a rank sit in sequences during one pass; also the cache that attention modules write to."""

    position_embeddings: Any

    @property
    def rotation(self) -> Rotation | None:
        """Of one new token per sequence, where `store` takes its keys and values; None = there may be more tokens."""

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Sequence[SeenKv]:
        """See `OneTokenView`."""

    def fold(self, x: torch.Tensor) -> torch.Tensor:
        """(M, D) tokens -> (B, Q, D)."""

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """(B, Q, D) -> (M, D)."""

    def mask(self, window: int | None, *, additive: torch.dtype | None) -> torch.Tensor | None:
        """(B, 1, Q, keys) mask, or None where causality alone suffices; `window` = keys a query sees, if limited."""

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Keep new keys and values (B, heads, Q, dim) of a layer; all keys and values that the queries see."""


class Decoder(OpenedModel):
    """The parts of a model between its exchanges.

    Attributes:
        num_layers: decoder layers.
        moe_index: decoder layer -> MoE layer; dense layers are absent.
        blocks: the MoE layers.
        windows: per decoder layer, keys that a query sees; None = all before it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        model: Any = None,
    ) -> None:
        """As `OpenedModel`, and find its parts.

        Raises:
            FormatError: tensors are missing or have other shapes.
            NotSplitError: the family's layers have other parts.
        """
        super().__init__(checkpoint, dtype=dtype, device=device, model=model)
        self._layers: list[Any] = list(part(self._base, "layers"))
        self.num_layers = len(self._layers)
        self.moe_index = {int(layer): index for index, layer in enumerate(checkpoint.layer_ids)}
        if len(self.moe_index) < checkpoint.num_layers:
            raise NotSplitError("a decoder layer has several MoE parts")
        if any(form.experts.num_null for form in checkpoint.family.forms):
            raise NotSplitError("its zero-computation experts are worked out in its own code")
        self._eager = self._model.config._attn_implementation == "eager"
        self._cache_keywords = [cache_keyword(part(layer, "self_attn").forward) for layer in self._layers]
        self.windows = [window_of(self.config, layer) for layer in range(self.num_layers)]
        self.blocks = [self._make_block(form.experts.name) for form in checkpoint.family.forms]
        self._account_for_parameters()
        self._quick: list[TokenAttention | None] = [None] * self.num_layers

    def quicken(self) -> None:
        """Take quicker forms of norms, and of the attention of single tokens, where they give what the modules give."""
        quicken_norms(self._model, self.dtype)
        if self._eager:  # such attention has parts that the quick form does not know
            return
        embeddings = self.position_embeddings(tried_positions(self.device))
        for layer, module in enumerate(self._layers):
            self._quick[layer] = find_token_attention(
                module.self_attn,
                embeddings,
                layer=layer,
                dtype=self.dtype,
                width=self.hidden_size,
                cache_keyword=self._cache_keywords[layer],
            )

    @property
    def is_quick(self) -> bool:
        """Whether some layer has a quick attention of single tokens."""
        return any(quick is not None for quick in self._quick)

    @torch.inference_mode()
    def _make_block(self, name: str) -> ModelBlock:
        layer_name, block_name, _ = name.rsplit(".", 2)
        layer = self._model.get_submodule(layer_name)
        if all(layer is not known for known in self._layers):
            raise NotSplitError(f"its experts are at {name}, not in a part of a decoder layer")
        x = self._base.get_input_embeddings().weight[:2].to(self.dtype)
        return ModelBlock(part(layer, "post_attention_layernorm"), part(layer, block_name), x)

    def _account_for_parameters(self) -> None:
        """Stop where a parameter of the model would be left out: its tokens would be wrong without a word."""
        used: list[Any] = [self._base.get_input_embeddings(), part(self._base, "norm")]
        used += [module for module in self._model.children() if module is not self._base]
        for layer, module in enumerate(self._layers):
            used += [part(module, "input_layernorm"), part(module, "self_attn")]
            moe_layer = self.moe_index.get(layer)
            if moe_layer is None:
                used += [part(module, "post_attention_layernorm"), part(module, "mlp")]
            else:
                used += self.blocks[moe_layer].modules()
        known = {id(parameter) for module in used for parameter in (*module.parameters(), *module.buffers())}
        left = [name for name, parameter in self._model.named_parameters() if id(parameter) not in known]
        if left:
            raise NotSplitError(f"{len(left)} of its parameters are elsewhere in its layers, the first is {left[0]}")

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(M,) token ids -> (M, D)."""
        return self._base.get_input_embeddings()(ids)

    def position_embeddings(self, positions: torch.Tensor) -> Any:
        """What attention wants to know of positions (B, Q)."""
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        return self._base.rotary_emb(like, positions)

    def attend(self, layer: int, x: torch.Tensor, view: AttentionView) -> torch.Tensor:
        """(M, D) residual stream -> after the attention of a decoder layer."""
        module, quick = self._layers[layer], self._quick[layer]
        hidden = module.input_layernorm(x)
        if quick is not None and view.rotation is not None:
            return quick(layer, x, hidden, view, window=self.windows[layer])
        out, *_ = module.self_attn(
            hidden_states=view.fold(hidden),
            position_embeddings=view.position_embeddings,
            attention_mask=view.mask(self.windows[layer], additive=self.dtype if self._eager else None),
            **{self._cache_keywords[layer]: view},
        )
        return x + view.unfold(out)

    def feed_forward(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """(M, D) residual stream -> after the dense feed-forward of a decoder layer."""
        module = self._layers[layer]
        return x + module.mlp(module.post_attention_layernorm(x))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(M, D) -> (M, V)."""
        return self._head.logits(self._base.norm(x))


def part(module: Any, name: str) -> Any:
    """A module of a module.

    Raises:
        NotSplitError: it has none of that name.
    """
    found = getattr(module, name, None)
    if found is None:
        raise NotSplitError(f"{type(module).__name__} has no part called {name}")
    return found


def window_of(config: Any, layer: int) -> int | None:
    """Keys that a query of a layer sees, None = all before it.

    Raises:
        NotSplitError: the layer attends in another way.
    """
    window = getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None)
    if types is None:
        return window
    if types[layer] not in ("sliding_attention", "full_attention"):
        raise NotSplitError(f"decoder layer {layer} is of the type {types[layer]}")
    return window if types[layer] == "sliding_attention" else None
