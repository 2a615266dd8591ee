"""Words of 64 bits as sets, for the compiled searches: of ranks, of tokens."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, inline="always")
def popcount(x):  # type: ignore[no-untyped-def]
    """Bits set in a word (LLVM makes one instruction of it)."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True, inline="always")
def lowest_bit(mask):  # type: ignore[no-untyped-def]
    """Number of the lowest bit set."""
    return np.int64(popcount((mask & (~mask + np.uint64(1))) - np.uint64(1)))
