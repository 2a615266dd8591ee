"""ExpertsTap: what stands in a model where its routed experts were. It hands over what they would have got.

The family's own block computes router, biases, shared experts and scale around it. Zero-computation experts are worked
out here, where the token is: their output is their input, so they cost no traffic and no load.

Shape letters: M token rows, K top-k, D hidden size, E experts with weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moeplace.profiling.recording.experts_modules import ExpertsModule

SumExperts = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(MoE layer, hidden (M, D), ids (M, K) with -1 = none, weights (M, K)) -> (M, D) weighted sums of the experts."""


class ExpertsTap(nn.Module):
    """Calls a function in place of the experts of one MoE layer.

    Attributes:
        layer: MoE layer.
        sum_experts: what to call; None = nothing may come here yet.
    """

    def __init__(self, layer: int, experts: ExpertsModule) -> None:
        super().__init__()
        self.layer = layer
        self.sum_experts: SumExperts | None = None
        self._num_experts, self._num_null = experts.num_experts, experts.num_null

    def forward(
        self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """What the experts module would return: (..., D) like `hidden`."""
        assert self.sum_experts is not None, "the experts of this model have not been placed"
        flat_MD = hidden.reshape(-1, hidden.shape[-1])
        ids_MK, weights_MK = ids.reshape(len(flat_MD), -1), weights.reshape(len(flat_MD), -1)
        absent = ids_MK >= self._num_experts  # id E says "no expert", where there are no zero-computation ones
        real_MK, share_MK = ids_MK.masked_fill(absent, -1), weights_MK.masked_fill(absent, 0)
        routed = self.sum_experts(self.layer, flat_MD, real_MK, share_MK)
        if self._num_null:
            null_M = (weights_MK * absent).sum(1, keepdim=True)
            routed = routed + (flat_MD * null_M).to(routed.dtype)
        return routed.to(hidden.dtype).view(hidden.shape)
