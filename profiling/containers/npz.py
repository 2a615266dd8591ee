"""Reads `.npy` and `.npz` files without unpickling: mapped where stored, unpacked to disk where deflated and large."""

import os
import shutil
import struct
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import require_file

DAMAGE = (
    ValueError,
    EOFError,
    OSError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    tokenize.TokenError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    RecursionError,
    KeyError,
    TypeError,
    AttributeError,
)
"""What the standard library and numpy raise on damaged archives and array headers."""

_IN_MEMORY = 1 << 26
_LOCAL_HEADER = 30


def read_npz(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every member of an `.npz`, read-only; see `read_array_member` for what is held in memory.

    Raises:
        InputError: there is no such file.
        FormatError: it is not an `.npz`, is truncated, or holds Python objects.
    """
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    yield info.filename.removesuffix(".npy"), _read_member(path, archive, info)
    except InputError:
        raise
    except DAMAGE as error:
        raise FormatError(f"{path} is not a readable .npz file: {_reason(error)}") from error


def read_npy(path: str | Path) -> np.ndarray:
    """The array of an `.npy` file, memory-mapped read-only.

    Raises:
        InputError: there is no such file.
        FormatError: it is not an `.npy`, is truncated, or holds Python objects.
    """
    require_file(path)
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = read_array_header(file)
            return _map(path, file.tell(), shape, fortran, dtype)
    except InputError:
        raise
    except DAMAGE as error:
        raise FormatError(f"{path} is not a readable .npy file: {_reason(error)}") from error


def read_array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of the `.npy` data that starts here; the file is left at the first value.

    Raises:
        ValueError: the header is damaged, or announces Python objects.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"array format {version[0]}.{version[1]} is not 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old spellings of types, headers of Python 2: read all the same
        shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are never loaded")
    if any(size < 0 for size in shape) or dtype.itemsize == 0:
        raise ValueError(f"shape {shape} of {dtype} is impossible")
    return shape, fortran, dtype


def _read_member(path: str | Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.flag_bits & 1:
        raise ValueError(f"{info.filename} is encrypted")
    if info.compress_type != zipfile.ZIP_STORED:
        return _inflate(archive, info)
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER)
        if len(local) < _LOCAL_HEADER or local[:4] != b"PK\x03\x04":
            raise ValueError("it is truncated")
        name_length, extra_length = struct.unpack("<HH", local[26:30])
        file.seek(info.header_offset + _LOCAL_HEADER + name_length + extra_length)
        shape, fortran, dtype = read_array_header(file)
        return _map(path, file.tell(), shape, fortran, dtype)


def _map(source: Any, offset: int, shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> np.ndarray:
    """The values at `offset` of a path or an open file, memory-mapped."""
    count = _count(shape)
    if not count:
        return np.empty(shape, dtype)
    held = os.stat(source if isinstance(source, str | Path) else source.fileno()).st_size - offset
    if count * dtype.itemsize > held:
        raise ValueError(f"shape {shape} of {dtype} needs more than the {held} bytes that are there")
    order: Literal["C", "F"] = "F" if fortran else "C"
    return np.asarray(np.memmap(source, dtype, "r", offset, shape or (1,), order)).reshape(shape, order=order)


def _inflate(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """A deflated member: small ones in memory, others in an unnamed temporary file that is mapped."""
    with archive.open(info) as member:
        shape, fortran, dtype = read_array_header(member)
        size = _count(shape) * dtype.itemsize
        if size > info.file_size:
            raise ValueError(f"{info.filename} announces {size} bytes, the archive {info.file_size}")
        if size <= _IN_MEMORY:
            data = member.read(size)
            if len(data) < size:
                raise EOFError(f"{info.filename} is truncated")
            array = np.frombuffer(data, dtype)
            return array.reshape(shape, order="F" if fortran else "C")
        if size > shutil.disk_usage(tempfile.gettempdir()).free // 2:
            raise InputError(
                f"{archive.filename}: {info.filename} of {size} bytes does not fit into the temporary folder"
            )
        with tempfile.TemporaryFile() as file:
            left = size
            while left:
                block = member.read(min(left, 1 << 24))
                if not block:
                    raise EOFError(f"{info.filename} is truncated")
                file.write(block)
                left -= len(block)
            file.flush()
            return _map(file, 0, shape, fortran, dtype)


def _count(shape: tuple[int, ...]) -> int:
    """Number of values, in Python integers: numpy's product would wrap."""
    count = 1
    for size in shape:
        count *= size
    return count


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:200]
