"""Families whose MoE block does not tell its experts module which experts serve which token, one class each.

An adapter takes the block's place and does what it does, with a tap for the experts.
"""

from typing import Any

import torch
from torch import nn

from moeplace.profiling.recording.experts_modules import ExpertsModule


class Llama4Block(nn.Module):
    """Llama 4 scales what goes into an expert, not what comes out of it, by the sigmoid of the router's logit.

    Each of a token's experts gets an input of its own, hence a call of its own.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.router, self.shared_expert, self.experts = block.router, block.shared_expert, block.experts
        self._top_k = int(block.top_k)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, D) sums, and the router's logits."""
        flat_MD = hidden.reshape(-1, hidden.shape[-1])
        scores_ME, logits = self.router(flat_MD)
        scale_MK, ids_MK = scores_ME.topk(self._top_k, dim=1)  # of experts that were not chosen the score is 0
        out_MD = self.shared_expert(flat_MD)
        for scale_M, ids_M in zip(scale_MK.split(1, 1), ids_MK.split(1, 1), strict=True):
            out_MD = out_MD + self.experts(flat_MD * scale_M, ids_M, torch.ones_like(scale_M))
        return out_MD, logits


_ADAPTERS: dict[str, type[nn.Module]] = {"Llama4TextMoe": Llama4Block}
"""Class of the block -> what takes its place."""


def adapter_of(experts: ExpertsModule) -> type[nn.Module] | None:
    """What takes the place of the block of an experts module, None = nothing needs to."""
    return _ADAPTERS.get(type(experts.parent).__name__)


def put_tap(model: Any, experts: ExpertsModule, tap: nn.Module) -> None:
    """Let a tap take the place of the experts module of that name, and an adapter that of its block where needed."""
    model.set_submodule(experts.name, tap)
    adapter = adapter_of(experts)
    if adapter is not None:
        block = experts.name.rpartition(".")[0]
        model.set_submodule(block, adapter(model.get_submodule(block)))
