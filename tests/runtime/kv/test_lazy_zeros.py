"""Memory that is there where it is written, and given back where it is cleared."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moeplace.runtime.kv.lazy_zeros import LazyZeros

SIZE = (2, 6, 2, 512, 24)


@pytest.mark.parametrize("size", [SIZE, (1, 2, 1, 40, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_cleared_is_zero_and_nothing_else(
    size: tuple[int, int, int, int, int], dtype: torch.dtype, dated_seed: int
) -> None:
    """Any stretch of positions of any row, in whole pages of the system or parts of them."""
    rng = np.random.default_rng(dated_seed)
    lazy = LazyZeros(size, dtype=dtype, device=torch.device("cpu"))
    assert lazy.tensor.shape == size
    assert lazy.tensor.dtype == dtype
    assert not lazy.tensor.any()
    for _ in range(20):
        lazy.tensor.copy_(torch.arange(1, math.prod(size) + 1).view(size) % 251 + 1)
        expected = lazy.tensor.clone()
        row, (first, end) = int(rng.integers(size[1])), sorted(rng.integers(0, size[3] + 1, 2).tolist())
        lazy.clear(row, first, end)
        expected[:, row, :, first:end] = 0
        assert torch.equal(lazy.tensor, expected)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_comes_and_goes() -> None:
    """Of much more address space than is written; what is read only takes nothing."""
    size = (4, 64, 8, 4096, 32)
    lazy, before = LazyZeros(size, dtype=torch.float32, device=torch.device("cpu")), resident_bytes()
    row_bytes = 4 * 8 * 4096 * 32 * 4
    assert not lazy.tensor[:, :2].any()
    assert resident_bytes() - before < row_bytes
    lazy.tensor[:, 5] = 1.0
    written = resident_bytes()
    assert written - before >= 0.9 * row_bytes
    lazy.clear(5, 1024, 4096)
    assert written - resident_bytes() >= 0.5 * row_bytes
    assert lazy.tensor[:, 5, :, :1024].all()
