"""StoredTensors: the tensors of a checkpoint by the names that a plain one has, opened lazily, quantised or not.

stored.slice_of("model.layers.3.mlp.experts.7.up_proj.weight")[...]     the numbers, whatever they are stored as
stored.parts_of(...)                                                    the tensors that they are stored in
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from moeplace.profiling.errors import FormatError
from moeplace.profiling.recording.checkpoint_files import weight_files
from moeplace.profiling.recording.quantised.forms import StoredForm
from moeplace.profiling.recording.quantised.quantisation import Quantisation, StoredMatrix

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Number types by the names that safetensors give them."""


class PartKind(NamedTuple):
    """What a stored tensor is."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class StoredTensors:
    """See the module.

    Attributes:
        files: the weight files.
        quantisation: how matrices may be stored.
        names: of the plain tensors.
    """

    def __init__(self, folder: Path, quantisation: Quantisation) -> None:
        """Read the headers of all files.

        Raises:
            FormatError: a file is damaged.
        """
        self._folder, self.files, self.quantisation = folder, weight_files(folder), quantisation
        self._open: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            self._file_of.update(dict.fromkeys(self._opened(file).keys(), file))
        self._matrices = quantisation.group(self._file_of, lambda name: str(self._raw(name).get_dtype()))
        self.names = frozenset(self._matrices)

    def form_of(self, name: str) -> StoredForm:
        """How a plain tensor is stored."""
        return self._matrix(name).form

    def slice_of(self, name: str) -> Any:
        """A plain tensor as a lazy slice, as safetensors have them.

        Raises:
            FormatError: the checkpoint has no such tensor.
        """
        matrix = self._matrix(name)
        if set(matrix.names) == {"weight"}:
            return self._raw(matrix.names["weight"])
        return _MatrixSlice(name, matrix.form, {part: self._raw(stored) for part, stored in matrix.names.items()})

    def shape_of(self, name: str) -> list[int]:
        """The shape of a plain tensor."""
        return list(self.slice_of(name).get_shape())

    def parts_of(self, name: str, index: Any = ...) -> dict[str, torch.Tensor]:
        """The tensors that a plain one is stored in, by part; `index`: an expert where all are in one tensor."""
        return {part: self._raw(stored)[index] for part, stored in self._matrix(name).names.items()}

    def kinds_of(self, name: str) -> dict[str, PartKind]:
        """What the tensors are that a plain one is stored in, by part, as their headers say."""
        slices = {part: self._raw(stored) for part, stored in self._matrix(name).names.items()}
        return {part: PartKind(_DTYPES[one.get_dtype()], tuple(one.get_shape())) for part, one in slices.items()}

    def bytes_of(self, name: str) -> int:
        """Bytes of a plain tensor as it is stored."""
        return sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in self.kinds_of(name).values())

    def _matrix(self, name: str) -> StoredMatrix:
        matrix = self._matrices.get(name)
        if matrix is None:
            raise FormatError(f"{self._folder} lacks the tensor {name}")
        return matrix

    def _raw(self, name: str) -> Any:
        """A tensor on disk as a lazy slice."""
        file = self._file_of.get(name)
        if file is None:
            raise FormatError(f"{self._folder} lacks the tensor {name}")
        return self._opened(file).get_slice(name)

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{file} is not a safetensors file: {error}") from error
        return self._open[file]


class _MatrixSlice:
    """A quantised matrix, or one per expert, that is read and unpacked when it is asked for."""

    def __init__(self, name: str, form: StoredForm, slices: Mapping[str, Any]) -> None:
        self._name, self._form, self._slices = name, form, slices

    def get_shape(self) -> list[int]:
        """Of the plain tensor."""
        shape = self._form.shape({part: one.get_shape() for part, one in self._slices.items()})
        return [*shape[:-2], shape[-1], shape[-2]] if self._form.is_transposed else shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The whole (`...`), or experts of it by an index of the first dimension."""
        inner, outer = (index, ...) if len(self.get_shape()) > 2 else (..., index)
        parts = {part: one[inner if len(one.get_shape()) else ...] for part, one in self._slices.items()}
        try:
            matrix = self._form.unpack(parts)[outer]
        except (RuntimeError, ValueError, IndexError, KeyError, ZeroDivisionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FormatError(f"the quantised tensor {self._name} cannot be unpacked: {reason}") from error
        return matrix.transpose(-2, -1) if self._form.is_transposed else matrix
