"""One thread for numpy's linear algebra, while many small matrices are decomposed.

OpenBLAS splits even a 64 x 64 eigenproblem over all cores and lets them spin; on a shared machine that costs five
times what it saves. Parallelism over matrices belongs to the caller's own threads.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_PREFIXES = ("scipy_openblas", "openblas")
_SUFFIXES = ("64_", "_64_", "")


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit numpy's OpenBLAS to one thread inside the block; without OpenBLAS nothing changes.

    The limit holds for the whole process, and is put back at the end.
    """
    functions = _thread_functions()
    if functions is None:
        yield
        return
    get_threads, set_threads = functions
    before = int(get_threads())
    set_threads(1)
    try:
        yield
    finally:
        set_threads(before)


@cache
def _thread_functions() -> tuple[Any, Any] | None:
    """(get, set) number of threads of the OpenBLAS that numpy's wheel brings, or None."""
    folder = Path(np.__file__).parent.parent / "numpy.libs"
    for path in sorted(folder.glob("*openblas*")):
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            continue
        for prefix in _PREFIXES:
            for suffix in _SUFFIXES:
                get_threads = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
                set_threads = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
                if get_threads is not None and set_threads is not None:
                    return get_threads, set_threads
    return None
