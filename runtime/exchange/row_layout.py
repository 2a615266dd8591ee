"""RowLayout: the fields of a row on the wire.

row    | meta: token, count, flags, extra | slots (K) | gate weights (K) | x (D) |
         int32 x 4                           int32       float             hidden type
       |<------------- head ------------------------>|
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

META = "meta"
META_WIDTH = 4
TOKEN, COUNT, FLAGS, EXTRA = range(META_WIDTH)

_ALIGNMENT = 8  # every field starts where any element type may start


@dataclass(frozen=True)
class RowField:
    """A field of a row: `width` elements of `dtype`, `offset` bytes from its start."""

    offset: int
    dtype: torch.dtype
    width: int

    @property
    def nbytes(self) -> int:
        return self.width * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def view(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, width) view of the field in (n, row_bytes) uint8 rows."""
        return rows[:, self.offset : self.end].view(self.dtype)


@dataclass(frozen=True)
class RowLayout:
    """Where the fields of a row are.

    Attributes:
        fields: name -> field; every layout has "meta".
        row_bytes: size of a row, a multiple of 8.
        head_words: int32 words that a row begins with, up to the first field of another type.
    """

    fields: Mapping[str, RowField]
    row_bytes: int
    head_words: int

    @classmethod
    def of(cls, **fields: tuple[torch.dtype, int]) -> "RowLayout":
        """A layout from name=(type, width), "meta" in front."""
        placed: dict[str, RowField] = {}
        end = 0
        for name, (dtype, width) in {META: (torch.int32, META_WIDTH), **fields}.items():
            placed[name] = RowField(end, dtype, width)
            end = -(-placed[name].end // _ALIGNMENT) * _ALIGNMENT
        others = [field.offset for field in placed.values() if field.dtype != torch.int32]
        return cls(placed, end, min([*others, end]) // torch.int32.itemsize)

    @classmethod
    def of_tokens(cls, top_k: int, *, weights: torch.Tensor, x: torch.Tensor) -> "RowLayout":
        """Tokens with the slots (K) and gate weights (K) of their experts; `weights` and `x` are like those to send."""
        return cls.of(
            slots=(torch.int32, top_k),
            weights=(weights.dtype, top_k),
            x=(x.dtype, x.shape[1]),
        )

    def view(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """(n, width) view of a field of (n, row_bytes) uint8 rows."""
        return self.fields[name].view(rows)
