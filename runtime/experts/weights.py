"""LayerWeights: the weights of an MoE layer's experts, by row, their products, and what is between the two products.

    ExpertWeights    plain matrices
    PackedWeights    quantised ones (`packed`)

Shape letters: D hidden size, H expert hidden size, M token rows.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, Self, TypeAlias, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from moeplace.runtime.experts.grouped import Groups, grouped_linear, suits_padding

Matrix = Literal["gate_up", "down"]
Part = Literal["gate_up", "down", "gate_up_bias", "down_bias"]
Activation = Callable[[torch.Tensor], torch.Tensor]
GroupSizes: TypeAlias = "torch.Tensor | np.ndarray"


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """(M, 2H) gate then up -> (M, H): the activation of most MoE models."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class LayerWeights(Protocol):
    """Experts of one MoE layer on one rank, by storage row."""

    @property
    def rows(self) -> int:
        """Experts that there is room for."""

    @property
    def row_size(self) -> int:
        """Bytes of one expert."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    def parts(self) -> Mapping[str, torch.Tensor]:
        """The tensors that experts consist of, by name, alike on all ranks: (rows, ...)."""

    def select_rows(self, rows: list[int], *, room: int) -> "LayerWeights":
        """New room for `room` experts, the first of which are those of `rows`."""

    def like(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Experts of the same form in other tensors, (rows, ...) by the names of `parts`."""

    def matrix(self, matrix: Matrix, row: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(out, in) matrix of one expert, and its bias."""

    def linear(self, matrix: Matrix, x: torch.Tensor, storage: torch.Tensor, groups: GroupSizes) -> torch.Tensor:
        """Product of an expert's matrix with each token row, bias included.

        Args:
            x: (M, in) rows, grouped by storage row.
            storage: (M,) storage row of each.
            groups: (rows,) sizes of the groups on the host, or int32 ends on the device.

        Returns:
            (M, out); rows behind the last group are not defined.
        """

    def suits_padding(self, groups: Groups) -> bool:
        """Whether `padded` is the quicker way."""

    def padded(self, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
        """`linear` of as many rows for every expert: (rows, n, in) -> (rows, n, out)."""


WeightsT = TypeVar("WeightsT", bound=LayerWeights)


def bytes_of_row(tensors: Mapping[str, torch.Tensor]) -> int:
    """Bytes of one expert, of tensors (rows, ...)."""
    return sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in tensors.values())


def rows_between(weights: WeightsT, start: int, stop: int) -> WeightsT:
    """A view of some of the experts."""
    return weights.like({name: tensor[start:stop] for name, tensor in weights.parts().items()})


def pinned_for(weights: WeightsT, device: torch.device) -> WeightsT:
    """The same in memory that a GPU copies from by itself; unchanged where there is none."""
    if device.type != "cuda":
        return weights
    return weights.like({name: tensor.pin_memory() for name, tensor in weights.parts().items()})


def select_rows(tensors: Mapping[str, torch.Tensor], rows: list[int], *, room: int) -> dict[str, torch.Tensor]:
    """New tensors (room, ...), the first of whose rows are `rows`."""
    selected = {name: tensor.new_empty(room, *tensor.shape[1:]) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        selected[name][: len(rows)] = tensor[rows]
    return selected


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

    @property
    def rows(self) -> int:
        """See `LayerWeights`."""
        return len(self.gate_up)

    @property
    def row_size(self) -> int:
        """See `LayerWeights`."""
        return bytes_of_row(self.parts())

    @property
    def device(self) -> torch.device:
        """See `LayerWeights`."""
        return self.gate_up.device

    @cached_property
    def gate_up_matrices(self) -> tuple[torch.Tensor, ...]:
        """(D, 2H) view of each row's first matrix."""
        return self.gate_up.transpose(1, 2).unbind(0)

    @cached_property
    def down_matrices(self) -> tuple[torch.Tensor, ...]:
        """(H, D) view of each row's second matrix."""
        return self.down.transpose(1, 2).unbind(0)

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that exist, by name; see `LayerWeights`."""
        named = {
            "gate_up": self.gate_up,
            "down": self.down,
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def select_rows(self, rows: list[int], *, room: int) -> "ExpertWeights":
        """See `LayerWeights`."""
        return ExpertWeights(**select_rows(self.parts(), rows, room=room))

    def like(self, tensors: Mapping[str, torch.Tensor]) -> "ExpertWeights":
        """See `LayerWeights`."""
        return ExpertWeights(**tensors)

    def matrix(self, matrix: Matrix, row: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `LayerWeights`."""
        weight, bias = self._matrix(matrix)
        return weight[row], None if bias is None else bias[row]

    def linear(self, matrix: Matrix, x: torch.Tensor, storage: torch.Tensor, groups: GroupSizes) -> torch.Tensor:
        """See `LayerWeights`."""
        weight, bias = self._matrix(matrix)
        matrices = self.gate_up_matrices if matrix == "gate_up" else self.down_matrices
        out_M = grouped_linear(x, weight, groups, matrices=matrices)
        if bias is not None:
            out_M += bias[storage]
        return out_M

    def suits_padding(self, groups: Groups) -> bool:
        """See `LayerWeights`."""
        return suits_padding(groups, self.gate_up)

    def padded(self, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `LayerWeights`."""
        weight, bias = self._matrix(matrix)
        out = torch.bmm(x, weight.transpose(1, 2))
        if bias is not None:
            out += bias.unsqueeze(1)
        return out

    def _matrix(self, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (self.gate_up, self.gate_up_bias) if matrix == "gate_up" else (self.down, self.down_bias)
