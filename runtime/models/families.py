"""What differs between model families beyond what their modules say."""

from typing import Any

import torch

from moeplace.runtime.experts.weights import Activation, gated_silu


def disk_to_module(name: str) -> str:
    """The module path of a tensor on disk: Mixtral's files use another name for the MoE layer."""
    return name.replace(".block_sparse_moe.", ".mlp.")


def activation_of(config: Any) -> Activation:
    """The function between the two products of an expert."""
    if config.model_type == "gpt_oss":
        return ClampedSwiglu(float(config.swiglu_alpha), float(config.swiglu_limit))
    name = config.hidden_act
    return gated_silu if name == "silu" else GatedActivation(name)


class GatedActivation:
    """act(gate) * up, for an activation that `transformers` knows by name."""

    def __init__(self, name: str) -> None:
        from transformers.activations import ACT2FN

        self._act = ACT2FN[name]

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self._act(gate) * up


class ClampedSwiglu:
    """gpt-oss: clamped gate and up, (up + 1) * gate * sigmoid(alpha * gate)."""

    def __init__(self, alpha: float, limit: float) -> None:
        self._alpha, self._limit = alpha, limit

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=self._limit)
        return (up.clamp(-self._limit, self._limit) + 1) * gate * torch.sigmoid(gate * self._alpha)
