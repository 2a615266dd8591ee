"""Reads safetensors files by memory map, with numpy alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.errors import FormatError
from moeplace.profiling.files import require_file

_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library itself
_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
}


def check_safetensors(path: str | Path) -> tuple[dict[str, Any], int]:
    """(header, offset of the data) of a safetensors file whose size is what the header says.

    Raises:
        InputError: there is no such file.
        FormatError: the header is damaged, or bytes are missing or left over.
    """
    size = require_file(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise FormatError(f"{path} is not a safetensors file, or it is truncated")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path} is not a safetensors file: its header is damaged") from error
    if size != expected:
        raise FormatError(f"{path} has {size} bytes, its header says {expected}: it is truncated or damaged")
    return header, 8 + length


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """Name -> array, memory-mapped read-only, of the tensors whose type numpy knows; others are left out.

    Raises:
        InputError: there is no such file.
        FormatError: it is not a whole safetensors file.
    """
    header, start = check_safetensors(path)
    size = Path(path).stat().st_size - start
    data = np.memmap(path, np.uint8, "r", start, (size,)) if size else np.zeros(0, np.uint8)
    arrays = {}
    for name, entry in header.items():
        try:
            dtype = entry["dtype"]
            shape = tuple(entry["shape"])
            low, high = entry["data_offsets"]
            if not all(isinstance(n, int) and n >= 0 for n in (*shape, low, high)) or high > size:
                raise ValueError
            if dtype not in _DTYPES:
                continue
            arrays[name] = np.asarray(data[low:high]).view(_DTYPES[dtype]).reshape(shape)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise FormatError(f"{path} is not a safetensors file: tensor {name[:60]!r} is damaged") from error
    return arrays
