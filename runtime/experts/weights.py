"""ExpertWeights: the weights of an MoE layer's experts, by row, and what is between their two products.

Shape letters: D hidden size, H expert hidden size, M token rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F

Part = Literal["gate_up", "down", "gate_up_bias", "down_bias"]
Activation = Callable[[torch.Tensor], torch.Tensor]


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """(M, 2H) gate then up -> (M, H): the activation of most MoE models."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Weights of one MoE layer on one rank, by storage row.

    Attributes:
        gate_up: (rows, 2H, D), gate and up as the activation takes them; (rows, H, D) where experts are not gated.
        down: (rows, D, H).
        gate_up_bias: (rows, 2H) or None.
        down_bias: (rows, D) or None.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @classmethod
    def of_shapes(
        cls, rows: int, shapes: Mapping[Part, tuple[int, ...]], *, dtype: torch.dtype, device: str | torch.device
    ) -> "ExpertWeights":
        """Room for `rows` experts whose parts have these shapes, uninitialised."""
        parts = {part: torch.empty(rows, *shape, dtype=dtype, device=device) for part, shape in shapes.items()}
        return cls(**parts)

    @classmethod
    def empty(
        cls, rows: int, hidden: int, expert_hidden: int, *, bias: bool, dtype: torch.dtype, device: str | torch.device
    ) -> "ExpertWeights":
        """Room for `rows` experts, uninitialised."""

        def room(*shape: int) -> torch.Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        biases = (room(2 * expert_hidden), room(hidden)) if bias else (None, None)
        return cls(room(2 * expert_hidden, hidden), room(hidden, expert_hidden), *biases)

    def select_rows(self, rows: list[int], *, room: int) -> "ExpertWeights":
        """New room for `room` experts, the first of which are those of `rows`."""

        def select(tensor: torch.Tensor) -> torch.Tensor:
            selected = tensor.new_empty(room, *tensor.shape[1:])
            selected[: len(rows)] = tensor[rows]
            return selected

        parts = {name: select(tensor) for name, tensor in self.parts().items()}
        return ExpertWeights(**parts)

    @cached_property
    def gate_up_matrices(self) -> tuple[torch.Tensor, ...]:
        """(D, 2H) view of each row's first matrix."""
        return self.gate_up.transpose(1, 2).unbind(0)

    @cached_property
    def down_matrices(self) -> tuple[torch.Tensor, ...]:
        """(H, D) view of each row's second matrix."""
        return self.down.transpose(1, 2).unbind(0)

    def parts(self) -> dict[Part, torch.Tensor]:
        """The tensors that exist, by name."""
        named = {
            "gate_up": self.gate_up,
            "down": self.down,
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}  # type: ignore[misc]
