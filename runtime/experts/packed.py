"""PackedWeights: quantised experts as they are on disk. Their matrices are made when they are used, one at a time.

    gate_up = [unpack(gate_up.0.weight, gate_up.0.scale)]      the pieces of a matrix, one below the other,
              [unpack(gate_up.1.weight, gate_up.1.scale)]      each stored in one of `forms`

So what a rank keeps, sends and receives of an expert are the bytes of the checkpoint.

Shape letters: M token rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from moeplace.profiling.recording.quantised.forms import Plain, StoredForm
from moeplace.profiling.recording.stored_tensors import PartKind
from moeplace.runtime.experts.grouped import Groups, made_linear
from moeplace.runtime.experts.weights import GroupSizes, Matrix, StackedWeights


class Piece(NamedTuple):
    """Rows of a matrix that are stored together.

    Attributes:
        form: how.
        pattern: by which the converter of the checkpoint knows them.
        is_turned: whether `form.unpack` gives (in, out).
    """

    form: StoredForm
    pattern: str
    is_turned: bool


@dataclass(frozen=True)
class PackedLayout:
    """What experts are stored in, alike for all experts of all layers.

    Attributes:
        matrices: matrix -> its pieces from the first row to the last.
        kinds: name of a part -> what it is; `part_name` makes the names.
        biases: name -> shape of biases, which are not quantised.
        rows: matrix -> its rows.
    """

    matrices: Mapping[Matrix, tuple[Piece, ...]]
    kinds: Mapping[str, PartKind]
    biases: Mapping[str, tuple[int, ...]]
    rows: Mapping[Matrix, int]

    @property
    def is_quantised(self) -> bool:
        """Whether anything is not plain."""
        return any(not isinstance(piece.form, Plain) for pieces in self.matrices.values() for piece in pieces)

    def make(self, matrix: Matrix, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """(out, in) matrix of one expert whose parts these are."""
        made = []
        for index, piece in enumerate(self.matrices[matrix]):
            prefix = part_name(matrix, index, "")
            own = {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}
            unpacked = piece.form.unpack(own).to(dtype)
            made.append(unpacked.t() if piece.is_turned else unpacked)
        return made[0] if len(made) == 1 else torch.cat(made)


def part_name(matrix: Matrix, index: int, part: str) -> str:
    """Name of a tensor of an expert: piece number `index` of a matrix, part of its form."""
    return f"{matrix}.{index}.{part}"


@dataclass(frozen=True, eq=False)
class PackedWeights(StackedWeights):
    """Quantised experts of one MoE layer on one rank, by storage row; see `LayerWeights`.

    Attributes:
        layout: what the tensors mean.
        tensors: name -> (rows, ...).
    """

    layout: PackedLayout
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of_layout(
        cls, rows: int, layout: PackedLayout, *, dtype: torch.dtype, device: str | torch.device
    ) -> "PackedWeights":
        """Room for `rows` experts, uninitialised; `dtype`: of biases."""
        kinds = {**layout.kinds, **{name: PartKind(dtype, shape) for name, shape in layout.biases.items()}}
        return cls(
            layout, {name: torch.empty(rows, *k.shape, dtype=k.dtype, device=device) for name, k in kinds.items()}
        )

    def parts(self) -> Mapping[str, torch.Tensor]:
        """See `StackedWeights`."""
        return self.tensors

    def like(self, tensors: Mapping[str, torch.Tensor]) -> "PackedWeights":
        """See `StackedWeights`."""
        return PackedWeights(self.layout, tensors)

    def matrix(self, matrix: Matrix, row: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `LayerWeights`; made now."""
        bias = self.tensors.get(f"{matrix}_bias")
        weight = self.layout.make(matrix, self.row(row), dtype)
        return weight, None if bias is None else bias[row]

    def linear(self, matrix: Matrix, x: torch.Tensor, storage: torch.Tensor, groups: GroupSizes) -> torch.Tensor:
        """See `LayerWeights`; on a GPU this waits for the counts, to unpack no expert that has no rows."""

        def make(row: int) -> torch.Tensor:
            return self.layout.make(matrix, self.row(row), x.dtype)

        out_M = made_linear(x, make, groups, width=self.layout.rows[matrix])
        bias = self.tensors.get(f"{matrix}_bias")
        if bias is not None:
            # On a GPU rows without an expert stand at the end; they were not computed, and nobody looks at them.
            out_M += bias[storage]
        return out_M

    def suits_padding(self, groups: Groups) -> bool:
        """See `LayerWeights`: never, as matrices are made one at a time."""
        return False

    def padded(self, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `LayerWeights`; nobody asks, see `suits_padding`."""
        raise AssertionError("packed matrices are made one at a time")
