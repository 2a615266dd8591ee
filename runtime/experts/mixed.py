"""MixedWeights: experts that a plan keeps in fewer bits, each in its own precision; see `BitForm`.

    row 0   [ 0x1f 0x83 ...             ]    an expert in int8
    row 1   [ ... ]                          one in int4: half of that
    row 2   -                                none

Every row has memory of its own, as much as its expert takes: that is what a rank keeps, loads and sends. A matrix is
made of it when it is used, one at a time; what is computed with it are the numbers that the bits mean, in the engine's
number type.

Shape letters: M token rows.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from moeplace.runtime.experts.bit_form import BitForm
from moeplace.runtime.experts.grouped import Groups, made_linear
from moeplace.runtime.experts.weights import GroupSizes, LayerWeights, Matrix, Part

_STORED = "stored"
_BIASES: dict[Matrix, Part] = {"gate_up": "gate_up_bias", "down": "down_bias"}


class _Held(NamedTuple):
    """The bytes of an expert, and what they mean."""

    stored: torch.Tensor
    form: BitForm


class MixedWeights:
    """See the module, and `LayerWeights`."""

    def __init__(
        self, rows: int, forms: Sequence[BitForm], *, device: str | torch.device, is_pinned: bool = False
    ) -> None:
        """Rows that hold nothing.

        Args:
            rows: how many.
            forms: of the experts of the layer; of rows for experts of any layer, all forms that there are.
            device: where they are.
            is_pinned: whether a GPU is to copy from them by itself.
        """
        self._forms, self._device, self._is_pinned = tuple(forms), torch.device(device), is_pinned
        self._held: list[_Held | None] = [None] * rows

    @property
    def rows(self) -> int:
        """See `LayerWeights`."""
        return len(self._held)

    @property
    def row_size(self) -> int:
        """See `LayerWeights`."""
        return max(form.size for form in self._forms)

    @property
    def held_bytes(self) -> int:
        """See `LayerWeights`."""
        return sum(len(held.stored) for held in self._held if held is not None)

    @property
    def device(self) -> torch.device:
        """See `LayerWeights`."""
        return self._device

    @property
    def part_names(self) -> tuple[str, ...]:
        """See `LayerWeights`."""
        return (_STORED,)

    def size_of(self, expert: int) -> int:
        """See `LayerWeights`."""
        return self._forms[expert].size

    def row(self, row: int) -> dict[str, torch.Tensor]:
        """See `LayerWeights`; no bytes where nothing is held."""
        held = self._held[row]
        return {_STORED: self._room(0) if held is None else held.stored}

    def blank(self, expert: int) -> dict[str, torch.Tensor]:
        """See `LayerWeights`."""
        return {_STORED: self._room(self.size_of(expert))}

    def fitted(self, expert: int, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `LayerWeights`: packed."""
        return {_STORED: self._forms[expert].pack(parts)}

    def make_room(self, row: int, expert: int, layer: LayerWeights) -> None:
        """See `LayerWeights`."""
        assert isinstance(layer, MixedWeights)
        form, before = layer._forms[expert], self._held[row]
        if before is not None and before.form.size == form.size:
            self._held[row] = before._replace(form=form)
            return
        self._held[row] = before = None  # first, so that both are never there
        self._held[row] = _Held(self._room(form.size), form)

    def free(self, row: int) -> None:
        """See `LayerWeights`."""
        self._held[row] = None

    def exchange(self, row: int, other: "MixedWeights", other_row: int) -> None:
        """See `LayerWeights`; nothing is copied."""
        self._held[row], other._held[other_row] = other._held[other_row], self._held[row]

    def select_rows(self, rows: list[int], *, room: int) -> "MixedWeights":
        """See `LayerWeights`; the memory is shared."""
        selected = MixedWeights(room, self._forms, device=self._device, is_pinned=self._is_pinned)
        selected._held[: len(rows)] = [self._held[row] for row in rows]
        return selected

    def between(self, start: int, stop: int) -> "MixedWeights":
        """See `LayerWeights`."""
        return self.select_rows(list(range(start, stop)), room=stop - start)

    def pinned(self) -> "MixedWeights":
        """See `LayerWeights`; before anything is held."""
        assert not self.held_bytes
        return MixedWeights(self.rows, self._forms, device=self._device, is_pinned=True)

    def matrix(self, matrix: Matrix, row: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `LayerWeights`; made now."""
        bias = _BIASES[matrix]
        return self._part(row, matrix, dtype), self._part(row, bias, dtype) if self._forms[0].has(bias) else None

    def linear(self, matrix: Matrix, x: torch.Tensor, storage: torch.Tensor, groups: GroupSizes) -> torch.Tensor:
        """See `LayerWeights`; on a GPU this waits for the counts, to make no matrix of an expert that has no rows."""
        used: list[int] = []

        def make(row: int) -> torch.Tensor:
            used.append(row)
            return self._part(row, matrix, x.dtype)

        out_M = made_linear(x, make, groups, width=self._forms[0].width(matrix))
        bias = _BIASES[matrix]
        if used and self._forms[0].has(bias):
            bias_R = x.new_zeros(self.rows, out_M.shape[1])
            for row in used:
                bias_R[row] = self._part(row, bias, x.dtype)
            # On a GPU rows without an expert stand at the end; they were not computed, and nobody looks at them.
            out_M += bias_R[storage]
        return out_M

    def suits_padding(self, groups: Groups) -> bool:
        """See `LayerWeights`: never, as matrices are made one at a time."""
        return False

    def padded(self, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
        """See `LayerWeights`; nobody asks, see `suits_padding`."""
        raise AssertionError("matrices in few bits are made one at a time")

    def _part(self, row: int, part: Part, dtype: torch.dtype) -> torch.Tensor:
        held = self._held[row]
        assert held is not None, f"row {row} holds no expert"
        return held.form.part(held.stored, part, dtype)

    def _room(self, size: int) -> torch.Tensor:
        with torch.inference_mode(False):  # else it could not be changed outside of it
            return torch.empty(size, dtype=torch.uint8, device=self._device, pin_memory=self._is_pinned)
