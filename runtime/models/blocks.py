"""ModelBlock: the MoE layer of a `transformers` decoder layer, as the exchange modes want it."""

from typing import Any

import torch
import torch.nn.functional as F


class ModelBlock:
    """Norm, router and shared experts of one decoder layer; see `moeplace.runtime.exchange.dispatcher.MoeBlock`."""

    def __init__(self, layer: Any) -> None:
        mlp = layer.mlp
        self._norm = layer.post_attention_layernorm
        self._router = getattr(mlp, "gate", None) or mlp.router
        self._shared = getattr(mlp, "shared_experts", None) or getattr(mlp, "shared_expert", None)
        self._shared_gate = getattr(mlp, "shared_expert_gate", None)  # Qwen2-MoE weighs its shared expert

    def modules(self) -> list[torch.nn.Module]:
        """What is used of the layer; parameters elsewhere in it would be left out."""
        used = [self._norm, self._router, self._shared, self._shared_gate]
        return [module for module in used if module is not None]

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """See `MoeBlock`."""
        return self._norm(x)

    def route(self, hidden: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `MoeBlock`."""
        _, weights, ids = self._router(hidden)
        return ids, weights

    def shared(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """See `MoeBlock`."""
        if self._shared is None:
            return None
        out = self._shared(hidden)
        return out if self._shared_gate is None else F.sigmoid(self._shared_gate(hidden)) * out
