"""Routing traces on disk: one uncompressed `.npz`, written as a stream and read by memory map.

The file is the trace interchange format (arrays `experts`, `weights`, `sequence_ids`, `positions`) with three more
arrays (`is_decode`, `workload`, `adapter`) and `meta`, the bytes of a JSON object. Anything that reads `.npz` reads it.
Members are stored, not deflated, so that a trace larger than memory can be mapped; nothing in it is ever unpickled.
"""

import io
import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from moeplace.profiling.containers.npz import read_npz
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import atomic_write
from moeplace.profiling.traces.loads import is_load
from moeplace.profiling.traces.trace import RoutingTrace

FORMAT = "moeplace.trace/1"

_ARRAYS = {  # name in the file -> field of RoutingTrace
    "experts": "topk_ids",
    "weights": "topk_weights",
    "sequence_ids": "sequence_ids",
    "positions": "positions",
    "is_decode": "is_decode",
    "workload": "workload",
    "adapter": "adapter",
}
_DTYPES = {
    "weights": "<f2",
    "sequence_ids": "<i4",
    "positions": "<i4",
    "is_decode": "|b1",
    "workload": "<i2",
    "adapter": "<i2",
}
_COPY_BYTES = 1 << 24


class TraceWriter:
    """Writes a trace in pieces, in memory bounded by one piece. Use as a context manager.

    Pieces are appended to temporary files; a good end of the block joins them into `path`, any exception leaves
    neither `path` nor the temporary files behind. Which optional arrays exist is fixed by the first piece.

    Args:
        path: the trace file to write.
        experts_per_layer: (L,) real experts of each MoE layer.
        top_k: K.
        **metadata: the other metadata fields of `RoutingTrace`.
    """

    def __init__(self, path: str | Path, *, experts_per_layer: np.ndarray, top_k: int, **metadata: Any) -> None:
        self._path = Path(path)
        self._experts_per_layer = np.asarray(experts_per_layer, dtype=np.int64)
        self._top_k = top_k
        self._metadata = metadata
        limit = int(self._experts_per_layer.max()) + int(metadata.get("null_experts", 0))
        self._id_dtype = "<i2" if limit < 2**15 else "<i4"
        self._tokens = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        if not self._path.parent.is_dir():
            raise InputError(f"cannot write {self._path}: the folder {self._path.parent} does not exist")
        try:
            self._folder = tempfile.TemporaryDirectory(prefix=f".{self._path.name}.", dir=self._path.parent)
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}") from error
        return self

    def append(
        self,
        topk_ids: np.ndarray,
        *,
        topk_weights: np.ndarray | None = None,
        sequence_ids: np.ndarray | None = None,
        positions: np.ndarray | None = None,
        is_decode: np.ndarray | None = None,
        workload: np.ndarray | None = None,
        adapter: np.ndarray | None = None,
    ) -> None:
        """Add the tokens of `topk_ids` (t, L, K) and, where given, their (t,) or (t, L, K) companions.

        Raises:
            InputError: a shape is wrong, an id is out of range, or an optional array comes and goes between pieces.
        """
        piece = RoutingTrace(
            topk_ids,
            self._experts_per_layer,
            topk_weights,
            sequence_ids,
            positions,
            is_decode,
            workload,
            adapter=adapter,
            **self._metadata,
        )
        if piece.top_k != self._top_k:
            raise InputError(f"a piece of top-k {piece.top_k} does not belong to a trace of top-k {self._top_k}")
        arrays = {name: getattr(piece, name_of) for name, name_of in _ARRAYS.items()}
        present = {name for name, array in arrays.items() if array is not None}
        if not self._files:
            assert self._folder is not None, "TraceWriter is a context manager"
            for name in present:
                self._files[name] = open(Path(self._folder.name) / name, "w+b")  # noqa: SIM115  closed in __exit__
        if present != set(self._files):
            odd = sorted(present ^ set(self._files))
            raise InputError(f"every piece of a trace needs the same arrays; {', '.join(odd)} is not in all of them")
        for name in present:
            self._check_range(name, arrays[name])
            np.ascontiguousarray(arrays[name], dtype=self._dtype(name)).tofile(self._files[name])
        self._tokens += piece.num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens appended so far."""
        return self._tokens

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers in all, as far as the metadata say or imply."""
        return _whole(self._experts_per_layer, self._metadata).num_hidden_layers

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._folder is not None
        try:
            if kind is None:
                if not self._tokens:
                    raise InputError(f"no token was recorded, so {self._path} is not written")
                self._join()
        finally:
            for file in self._files.values():
                file.close()
            self._folder.cleanup()

    def _check_range(self, name: str, array: np.ndarray) -> None:
        """Raise where storing would change a number."""
        stored = np.dtype(self._dtype(name))
        if stored.kind != "i" or name == "experts" or not array.size:
            return
        low, high = int(array.min()), int(array.max())
        if low < np.iinfo(stored).min or high > np.iinfo(stored).max:
            raise InputError(f"{name} {low if low < 0 else high} must fit into {8 * stored.itemsize} bits")

    def _dtype(self, name: str) -> str:
        return self._id_dtype if name == "experts" else _DTYPES[name]

    def _join(self) -> None:
        with atomic_write(self._path) as out, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("meta.npy", _meta_npy(self._experts_per_layer, self._metadata))
            for name, file in self._files.items():
                cube = (self._tokens, len(self._experts_per_layer), self._top_k)
                shape = cube if name in ("experts", "weights") else (self._tokens,)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {"descr": self._dtype(name), "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    file.seek(0)
                    shutil.copyfileobj(file, member, _COPY_BYTES)


def save_trace(path: str | Path, trace: RoutingTrace) -> None:
    """Write a trace, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    metadata = {name: getattr(trace, name) for name in _METADATA}
    with TraceWriter(path, experts_per_layer=trace.experts_per_layer, top_k=trace.top_k, **metadata) as writer:
        for start in range(0, max(trace.num_tokens, 1), 1 << 16):
            piece = trace.select(slice(start, start + (1 << 16)))
            writer.append(piece.topk_ids, **{_ARRAYS[n]: getattr(piece, _ARRAYS[n]) for n in _ARRAYS if n != "experts"})


def load_trace(path: str | Path) -> RoutingTrace:
    """Read a trace written by `TraceWriter`; arrays are memory-mapped, so opening costs no memory.

    Raises:
        InputError: there is no such file, or its ids are out of range.
        FormatError: it is not a trace of ours; `moeplace import` reads other formats.
    """
    arrays = dict(read_npz(path))
    if is_load(arrays):
        raise FormatError(
            f"{path} holds loads without tokens: `moeplace solve` takes it, to balance load, and `evaluate`; "
            "what judges where tokens go (stats, compare, report) needs a trace"
        )
    if "meta" not in arrays or "experts" not in arrays:
        raise FormatError(f"{path} is not a moeplace trace: use `moeplace import` for other formats")
    try:
        meta = json.loads(arrays.pop("meta").tobytes())
        if meta.pop("format") != FORMAT:
            raise ValueError
        fields: dict[str, Any] = {_ARRAYS[name]: array for name, array in arrays.items() if name in _ARRAYS}
        for name in ("workload_names", "adapter_names", "notes"):
            meta[name] = tuple(meta.get(name, ()))
        return RoutingTrace(**fields, **meta)
    except InputError as error:
        raise type(error)(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise FormatError(f"{path} is not a moeplace trace: its metadata is damaged") from error


_METADATA = (
    "workload_names",
    "adapter_names",
    "model",
    "layer_ids",
    "num_hidden_layers",
    "expert_bytes",
    "hidden_size",
    "kv_dim",
    "shared_experts",
    "null_experts",
    "notes",
)


def _meta_npy(experts_per_layer: np.ndarray, metadata: dict[str, Any]) -> bytes:
    whole = _whole(experts_per_layer, metadata)
    document: dict[str, Any] = {"format": FORMAT, "experts_per_layer": whole.experts_per_layer.tolist()}
    for name in _METADATA:
        value = getattr(whole, name)
        document[name] = value.tolist() if isinstance(value, np.ndarray) else value
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.frombuffer(json.dumps(document).encode(), dtype=np.uint8))
    return buffer.getvalue()


def _whole(experts_per_layer: np.ndarray, metadata: dict[str, Any]) -> RoutingTrace:
    """A trace without tokens, whose metadata are complete."""
    return RoutingTrace(np.zeros((0, len(experts_per_layer), 1), np.int16), experts_per_layer, **metadata)
