"""Reading rows of a K/V cache together: neighbours as a view, stretches of neighbours as several, others as a copy.

Attention that is told of several stretches is called for each of them. That costs a call, and spares the copy; for few
positions and narrow heads the copy is cheaper. `benchmarks/kv_pages.py` measures all three, and pages beside them.

Shape letters: M tokens, one per row.
"""

import numpy as np
import torch

CALL_BYTES = 1 << 16
"""Bytes that are copied while one more attention is called: 10 us at 6 GB/s on the machine of `benchmarks/results`."""


def stretches_of(row: torch.Tensor, row_bytes: int) -> list[slice]:
    """Neighbours among rows (M,), in the order of the tokens; none = the rows are better copied together.

    Looked at on the CPU only, where that is free.

    Args:
        row_bytes: that are read of each.
    """
    if row.device.type != "cpu" or not len(row):
        return []
    numbers = row.numpy()
    first = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
    if (len(first) - 1) * CALL_BYTES > len(numbers) * row_bytes:
        return []
    lengths = np.diff(first, append=len(numbers)).tolist()
    starts = numbers[first].tolist()
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]


class RowGathering:
    """Copies of rows, in memory that is kept on a CPU: new memory takes longer to get than rows take to copy.

    A copy is good until the next one of the same name. On other devices every copy has memory of its own, which their
    allocators keep.
    """

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def gather(self, name: str, slab: torch.Tensor, row: torch.Tensor, longest: int) -> torch.Tensor:
        """(M, heads, longest, dim) the first positions of rows (M,) of a slab (rows, heads, positions, dim)."""
        source = slab[:, :, :longest]
        if slab.device.type != "cpu":
            return source.index_select(0, row)
        shape = (len(row), *source.shape[1:])
        size = int(np.prod(shape))
        if name not in self._kept or len(self._kept[name]) < size:
            self._kept[name] = slab.new_empty(size)
        return torch.index_select(source, 0, row, out=self._kept[name][:size].view(shape))
