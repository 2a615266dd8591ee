"""LayerWeights: the weights of an MoE layer's experts, by row, their products, and what is between the two products.

    ExpertWeights    plain matrices
    PackedWeights    quantised ones (`packed`)
    MixedWeights     plain ones that a plan gives fewer bits, each its own number of them (`mixed`)

Shape letters: D hidden size, H expert hidden size, M token rows.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, Self, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from moeplace.runtime.experts.grouped import Groups, grouped_linear, suits_padding

Matrix = Literal["gate_up", "down"]
Part = Literal["gate_up", "down", "gate_up_bias", "down_bias"]
Activation = Callable[[torch.Tensor], torch.Tensor]
GroupSizes: TypeAlias = "torch.Tensor | np.ndarray"

_CHUNK = 1 << 20
"""Bytes that an exchange of rows copies at a time."""


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
        """Bytes of one expert, of the largest where they differ."""

    @property
    def held_bytes(self) -> int:
        """Bytes that all rows take now."""

    @property
    def device(self) -> torch.device:
        """Where they are."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """Of what experts consist of, alike on all ranks."""

    def size_of(self, expert: int) -> int:
        """Bytes of an expert of this layer."""

    def row(self, row: int) -> dict[str, torch.Tensor]:
        """Views of the parts of the expert in a row."""

    def blank(self, expert: int) -> dict[str, torch.Tensor]:
        """Tensors as the parts of an expert of this layer are, uninitialised, of no row."""

    def fitted(self, expert: int, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parts of an expert of this layer, as a checkpoint has them, as rows hold them: in the order of names."""

    def make_room(self, row: int, expert: int, layer: "LayerWeights") -> None:
        """Let a row have room for all bytes of an expert of `layer`; what was there is lost."""

    def free(self, row: int) -> None:
        """What is in a row is not needed any more."""

    def exchange(self, row: int, other: Self, other_row: int) -> None:
        """Let the experts of two rows change places."""

    def select_rows(self, rows: list[int], *, room: int) -> Self:
        """New room for `room` experts, the first of which are those of `rows`."""

    def between(self, start: int, stop: int) -> Self:
        """A view of some rows, for as long as nothing is put there."""

    def pinned(self) -> Self:
        """The same in memory that a GPU copies from by itself."""

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


class StackedWeights(ABC):
    """Experts that take as much room each: one tensor for each part, (rows, ...). See `LayerWeights`."""

    @abstractmethod
    def parts(self) -> Mapping[str, torch.Tensor]:
        """The tensors, by name."""

    @abstractmethod
    def like(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Experts of the same form in other tensors, (rows, ...) by the names of `parts`."""

    @property
    def rows(self) -> int:
        """See `LayerWeights`."""
        return len(next(iter(self.parts().values())))

    @property
    def row_size(self) -> int:
        """See `LayerWeights`."""
        return sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in self.parts().values())

    @property
    def held_bytes(self) -> int:
        """See `LayerWeights`."""
        return self.rows * self.row_size

    @property
    def device(self) -> torch.device:
        """See `LayerWeights`."""
        return next(iter(self.parts().values())).device

    @property
    def part_names(self) -> tuple[str, ...]:
        """See `LayerWeights`."""
        return tuple(self.parts())

    def size_of(self, expert: int) -> int:
        """See `LayerWeights`."""
        return self.row_size

    def row(self, row: int) -> dict[str, torch.Tensor]:
        """See `LayerWeights`."""
        return {part: tensor[row] for part, tensor in self.parts().items()}

    def blank(self, expert: int) -> dict[str, torch.Tensor]:
        """See `LayerWeights`."""
        return {part: tensor.new_empty(tensor.shape[1:]) for part, tensor in self.parts().items()}

    def fitted(self, expert: int, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `LayerWeights`."""
        return {part: parts[part].to(tensor.dtype) for part, tensor in self.parts().items()}

    def make_room(self, row: int, expert: int, layer: LayerWeights) -> None:  # noqa: B027
        """See `LayerWeights`: there is always room."""

    def free(self, row: int) -> None:  # noqa: B027
        """See `LayerWeights`: the room stays."""

    def exchange(self, row: int, other: Self, other_row: int) -> None:
        """See `LayerWeights`; piece by piece, so that it takes little memory."""
        theirs = other.row(other_row)
        for part, mine in self.row(row).items():
            ours, others = (tensor.view(-1).view(torch.uint8) for tensor in (mine, theirs[part]))
            for start in range(0, len(ours), _CHUNK):
                piece = slice(start, start + _CHUNK)
                kept = ours[piece].clone()
                ours[piece] = others[piece]
                others[piece] = kept

    def select_rows(self, rows: list[int], *, room: int) -> Self:
        """See `LayerWeights`."""
        selected = {name: tensor.new_empty(room, *tensor.shape[1:]) for name, tensor in self.parts().items()}
        for name, tensor in self.parts().items():
            selected[name][: len(rows)] = tensor[rows]
        return self.like(selected)

    def between(self, start: int, stop: int) -> Self:
        """See `LayerWeights`."""
        return self.like({name: tensor[start:stop] for name, tensor in self.parts().items()})

    def pinned(self) -> Self:
        """See `LayerWeights`."""
        return self.like({name: tensor.pin_memory() for name, tensor in self.parts().items()})


@dataclass(frozen=True, eq=False)
class ExpertWeights(StackedWeights):
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

    @cached_property
    def gate_up_matrices(self) -> tuple[torch.Tensor, ...]:
        """(D, 2H) view of each row's first matrix."""
        return self.gate_up.transpose(1, 2).unbind(0)

    @cached_property
    def down_matrices(self) -> tuple[torch.Tensor, ...]:
        """(H, D) view of each row's second matrix."""
        return self.down.transpose(1, 2).unbind(0)

    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that exist, by name; see `StackedWeights`."""
        named = {
            "gate_up": self.gate_up,
            "down": self.down,
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def like(self, tensors: Mapping[str, torch.Tensor]) -> "ExpertWeights":
        """See `StackedWeights`."""
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
