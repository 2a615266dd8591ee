"""Reads files of `torch.save` without torch and without executing anything they contain.

Such a file is a zip: `<root>/data.pkl` is a pickle, `<root>/data/<key>` are raw little-endian storages. The pickle is
first scanned for operations: only those that plain containers, numbers, strings and tensors need are allowed, and
their number is bounded. Then it is read by an unpickler that knows the names of tensors, parameters,
storages, number types and `OrderedDict`. Tensors come out as `StoredTensor`, mapped into memory when read.
"""

import io
import pickle
import pickletools
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeplace.profiling.containers.npz import DAMAGE
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import require_file

_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "BFloat16Storage": "<u2",  # numpy has no such type: read as the upper halves of float32
}
_HALVES = "BFloat16Storage"
_UNTYPED = "UntypedStorage"
_TYPES = {"uint16": "<u2", "uint32": "<u4", "uint64": "<u8"}
"""Types that came after the storage classes: tensors of these name them beside an untyped storage."""
_CONTAINERS = {"EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE"}
_PLAIN = {
    "PROTO", "FRAME", "STOP", "MARK", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BININT", "BININT1", "BININT2",
    "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE", "BINUNICODE", "SHORT_BINUNICODE", "BINPUT", "LONG_BINPUT",
    "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "BINPERSID",
}  # fmt: skip
_MOST_PICKLE_BYTES = 1 << 26
_MOST_CONTAINERS = 1 << 20
_LOCAL_HEADER = 30


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an archive; `read` maps it.

    Attributes:
        path: the archive.
        position: first byte of its values.
        dtype: type of its values.
        shape: its shape.
        stride: values from one index to the next, by axis; None = contiguous.
        halves: values are the upper halves of float32 (bfloat16).
    """

    path: Path
    position: int
    dtype: np.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    halves: bool = False

    def read(self) -> np.ndarray:
        """The values: memory-mapped read-only where contiguous, else copied; bfloat16 as float32."""
        if 0 in self.shape:
            return np.zeros(self.shape, np.float32 if self.halves else self.dtype)
        array = self._map()
        return (array.astype(np.uint32) << 16).view(np.float32) if self.halves else array

    def _map(self) -> np.ndarray:
        if self.stride is None:
            mapped = np.memmap(self.path, self.dtype, "r", self.position, self.shape or (1,))
            return np.asarray(mapped).reshape(self.shape)
        span = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        flat = np.asarray(np.memmap(self.path, self.dtype, "r", self.position, (span,)))
        steps = [step * self.dtype.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False).copy()


@dataclass(frozen=True)
class _Storage:
    path: Path
    position: int
    dtype: np.dtype
    numel: int
    halves: bool


def read_torch_archive(path: str | Path) -> Any:
    """The object in a `.pt` file: containers, numbers and strings, with `StoredTensor` for tensors.

    Raises:
        InputError: there is no such file.
        FormatError: it is not such an archive, it is damaged or too complex, or it holds anything but plain data.
    """
    found = require_file(path)
    try:
        with zipfile.ZipFile(found) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in damaged names
            return _read(found, archive)
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise FormatError(f"{path} is not a torch archive (a zip since torch 1.6), or it is truncated") from error
    except (*DAMAGE, pickle.UnpicklingError, IndexError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise FormatError(f"{path} is not a readable torch archive: {text}") from error


def _read(path: Path, archive: zipfile.ZipFile) -> Any:
    names = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError("it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = names.get(f"{root}byteorder")
    if order is not None and order.file_size < 16 and archive.read(order) != b"little":
        raise ValueError("it was written on a big-endian machine")
    info = names[pickles[0]]
    if info.file_size > _MOST_PICKLE_BYTES:
        raise ValueError(f"its pickle of {info.file_size} bytes must not exceed {_MOST_PICKLE_BYTES}")
    with archive.open(info) as member:
        data = member.read(_MOST_PICKLE_BYTES + 1)
    _check_operations(data)
    return _Unpickler(data, path, {name.removeprefix(f"{root}data/"): names[name] for name in names}).load()


def _check_operations(data: bytes) -> None:
    """Raise unless the pickle is made of allowed operations with memo numbers that a pickle of its size can have."""
    containers = 0
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name in _CONTAINERS:
            containers += 1
            if containers > _MOST_CONTAINERS:
                raise ValueError(f"it has more than {_MOST_CONTAINERS} containers")
        elif name not in _PLAIN:
            raise ValueError(f"its pickle uses {name}, which plain data does not need")
        if name in ("LONG_BINPUT", "LONG_BINGET") and int(str(argument)) > len(data):
            raise ValueError(f"memo number {argument} is impossible")


class _Unpickler(pickle.Unpickler):
    """Unpickles plain containers; every name it does not know is an error."""

    def __init__(self, data: bytes, path: Path, members: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        self._members = members

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return _rebuild_typed
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _data_of_parameter
        if (module, name) == ("collections", "OrderedDict"):
            return _empty_dict
        if (module == "torch" and (name in _STORAGES or name in _TYPES)) or name == _UNTYPED:
            return name
        raise pickle.UnpicklingError(f"it holds {module[:60]}.{name[:60]}, which is never loaded")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or pid[1] not in (*_STORAGES, _UNTYPED):
            raise pickle.UnpicklingError("a storage reference is damaged")
        kind, key, numel = pid[1], pid[2], pid[4]
        dtype = np.dtype(_STORAGES.get(kind, "u1"))
        info = self._members.get(key) if isinstance(key, str) else None
        if info is None or info.compress_type != zipfile.ZIP_STORED or type(numel) is not int:
            raise pickle.UnpicklingError("a storage is missing or compressed")
        if numel < 0 or numel * dtype.itemsize > info.file_size:
            raise pickle.UnpicklingError(f"storage {key[:20]} has {info.file_size} bytes, {numel} values announced")
        return _Storage(self._path, _data_offset(self._path, info), dtype, numel, kind == _HALVES)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Position of a stored member's bytes in the file, which must hold all of them."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER)
        if len(local) < _LOCAL_HEADER or local[:4] != b"PK\x03\x04":
            raise pickle.UnpicklingError("a storage is missing")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    start = info.header_offset + _LOCAL_HEADER + name_length + extra_length
    if start + info.file_size > path.stat().st_size:
        raise pickle.UnpicklingError("a storage is truncated")
    return start


def _rebuild_tensor(storage: Any = None, offset: Any = None, shape: Any = None, stride: Any = None, *_: Any) -> Any:
    """Stands for `torch._utils._rebuild_tensor_v2`: a tensor inside its storage, in which no value stands twice."""
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        raise pickle.UnpicklingError("a tensor is damaged")
    for sizes in (shape, stride):
        if not isinstance(sizes, tuple) or len(sizes) > 32 or not all(type(n) is int and n >= 0 for n in sizes):
            raise pickle.UnpicklingError("a tensor has an impossible shape")
    count, span, contiguous = 1, 1, True
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        contiguous = contiguous and (size <= 1 or step == count)
        count, span = count * size, span + (size - 1) * step
    if count and (offset + max(count, span) > storage.numel):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} does not fit into its storage of {storage.numel}")
    position = storage.position + offset * storage.dtype.itemsize
    return StoredTensor(storage.path, position, storage.dtype, shape, None if contiguous else stride, storage.halves)


def _rebuild_typed(storage: Any = None, offset: Any = None, shape: Any = None, stride: Any = None, *others: Any) -> Any:
    """Stands for `torch._utils._rebuild_tensor_v3`: an untyped storage, its type last but one or last."""
    name = next((other for other in others if isinstance(other, str) and other in _TYPES), None)
    if not isinstance(storage, _Storage) or name is None:
        raise pickle.UnpicklingError("a tensor has a type that is not supported")
    dtype = np.dtype(_TYPES[name])
    typed = _Storage(
        storage.path, storage.position, dtype, storage.numel * storage.dtype.itemsize // dtype.itemsize, False
    )
    return _rebuild_tensor(typed, offset, shape, stride)


def _data_of_parameter(data: Any = None, *_: Any) -> Any:
    """Stands for `torch._utils._rebuild_parameter`."""
    if not isinstance(data, StoredTensor):
        raise pickle.UnpicklingError("a parameter is damaged")
    return data


def _empty_dict(*_: Any) -> dict[Any, Any]:
    """Stands for `OrderedDict`: torch stores an empty one (backward hooks) with every tensor."""
    return {}
