"""Pieces of large arrays, and threads over them: the kernels of this folder release the interpreter lock."""

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

CHUNK_TOKENS = 1 << 13
_KEPT_BYTES = 1 << 28


def workers(limit: int | None = None) -> int:
    """Threads to use: one per core that this process may run on, at most `limit`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores if limit is None else min(cores, limit))


def thread_pool(limit: int | None = None) -> ThreadPoolExecutor:
    """A pool of `workers(limit)` threads."""
    return ThreadPoolExecutor(workers(limit))


def chunks(array: np.ndarray, size: int = CHUNK_TOKENS) -> Iterator[np.ndarray]:
    """Pieces of `array` along its first axis; pages of a memory map are given back as the iteration goes on."""
    mapped = _mapping(array)
    read = 0
    for start in range(0, len(array), size):
        piece = array[start : start + size]
        yield piece
        read += piece.nbytes
        if mapped is not None and read > _KEPT_BYTES:
            mapped.madvise(mmap.MADV_DONTNEED)
            read = 0


def _mapping(array: np.ndarray) -> mmap.mmap | None:
    """The memory map behind an array that cannot be written to, or None."""
    base: object = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) and not array.flags.writeable else None
