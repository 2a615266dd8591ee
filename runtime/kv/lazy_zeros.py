"""LazyZeros: a tensor of zeros that takes memory where it is written, and gives it back where it is cleared.

On a CPU: address space is reserved, and the system gives pages of it as they are touched. Reading an untouched page
takes none. On other devices all of it is there from the start.
"""

import math
import mmap
import platform
import sys
from contextlib import suppress

import torch

_PAGE = mmap.PAGESIZE
_NO_RESERVE = 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0
"""Linux: address space beyond what there is of memory may be asked for. (Python names it from 3.13 on.)"""
_LEAST_BYTES = 1 << 20
"""Less is not worth a mapping of its own."""


class LazyZeros:
    """See the module.

    Attributes:
        tensor: (layers, rows, heads, positions, dim).
    """

    def __init__(self, size: tuple[int, int, int, int, int], *, dtype: torch.dtype, device: torch.device) -> None:
        num_bytes = math.prod(size) * dtype.itemsize
        self._map: mmap.mmap | None = None
        if device.type != "cpu" or num_bytes < _LEAST_BYTES or not sys.platform.startswith("linux"):
            self.tensor = torch.zeros(size, dtype=dtype, device=device)
            return
        self._map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        with suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_NOHUGEPAGE)  # one would hold pieces of many rows
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.tensor = self._bytes.view(dtype).view(size)

    def clear(self, row: int, first: int, end: int) -> None:
        """Set positions `first` .. `end` - 1 of a row to zero in all layers and heads, and give their pages back."""
        if self._map is None:
            self.tensor[:, row, :, first:end] = 0
            return
        layers, _, heads, _, dim = self.tensor.shape
        width = dim * self.tensor.element_size()
        for layer in range(layers):
            for head in range(heads):
                start = self.tensor[layer, row, head, first:end].storage_offset() * self.tensor.element_size()
                self._clear_bytes(start, start + (end - first) * width)

    def _clear_bytes(self, start: int, end: int) -> None:
        """Whole pages are given back, after which they read as zero; what is left at both ends is overwritten."""
        assert self._map is not None
        first_page, last_page = -(-start // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if first_page >= last_page:
            self._bytes[start:end] = 0
            return
        self._bytes[start:first_page] = 0
        self._bytes[last_page:end] = 0
        self._map.madvise(mmap.MADV_DONTNEED, first_page, last_page - first_page)
