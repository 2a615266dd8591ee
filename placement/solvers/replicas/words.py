"""Words of 64 bits as sets of tokens, for the search on bits.

Shape letter: W words of 64 tokens.
"""

import numpy as np

from moeplace.profiling.kernel_cache import njit


@njit(cache=True, nogil=True, inline="always")
def popcount(x):  # type: ignore[no-untyped-def]
    """Bits set in a word (LLVM makes one instruction of it)."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True)
def count_row(row_W):  # type: ignore[no-untyped-def]
    """Tokens of a row."""
    total = np.uint64(0)
    for w in range(len(row_W)):
        total += popcount(row_W[w])
    return total


@njit(cache=True, nogil=True, inline="always")
def clear(row_W):  # type: ignore[no-untyped-def]
    for w in range(len(row_W)):
        row_W[w] = np.uint64(0)


@njit(cache=True, nogil=True, inline="always")
def copy(into_W, row_W):  # type: ignore[no-untyped-def]
    """Faster than a slice assignment, which looks for overlap."""
    for w in range(len(into_W)):
        into_W[w] = row_W[w]


@njit(cache=True, nogil=True, inline="always")
def unite(into_W, row_W):  # type: ignore[no-untyped-def]
    for w in range(len(into_W)):
        into_W[w] |= row_W[w]


@njit(cache=True, nogil=True, inline="always")
def subtract(from_W, row_W):  # type: ignore[no-untyped-def]
    for w in range(len(from_W)):
        from_W[w] &= ~row_W[w]


@njit(cache=True, nogil=True, inline="always")
def add_repeats(once_W, twice_W, row_W):  # type: ignore[no-untyped-def]
    """Tokens seen before go to `twice_W`, all to `once_W`."""
    for w in range(len(once_W)):
        twice_W[w] |= once_W[w] & row_W[w]
        once_W[w] |= row_W[w]
