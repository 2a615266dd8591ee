"""BitForm: the bytes of one expert in one precision, and the numbers that they stand for; see `rounding`.

    exact, bfloat16    gate_up | down | biases                          numbers
    int8, int4         biases | scale of gate_up, of down | codes       number = code x scale of its row

Codes of four bits are two to a byte, 8 being zero, the earlier one in the lower half. What takes more bytes a number
comes first, so that every field begins where its number type may.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from moeplace.profiling.errors import FormatError
from moeplace.runtime.experts.rounding import EXACT, HALF, LEVELS, MATRICES
from moeplace.runtime.experts.weights import Matrix, Part

_SCALE = torch.bfloat16
_ZERO = 8
"""Code 0 of four bits."""


class PlainPart(NamedTuple):
    """A part of an expert as the checkpoint has it.

    Attributes:
        shape: of one expert.
        dtype: on disk: what numbers are rounded to when they are given back.
        kept: in which it is kept where it is exact: that of the engine, where that is narrower.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kept: torch.dtype


class _Field(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class BitForm:
    """See the module.

    Attributes:
        precision: its name.
        plain: part -> as the checkpoint has it.
        fields: name -> where it lies: a part, or `codes` and `scale` of a matrix.
        size: bytes of an expert.
    """

    precision: str
    plain: Mapping[Part, PlainPart]
    fields: Mapping[str, _Field]
    size: int

    @classmethod
    def of(cls, precision: str, plain: Mapping[Part, PlainPart]) -> Self:
        """The form of experts whose parts are these."""
        kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for part, (shape, _, kept) in plain.items():
            if precision in LEVELS and part in MATRICES:
                count = math.prod(shape)
                codes = (shape, torch.int8) if precision == "int8" else ((-(-count // 2),), torch.uint8)
                kinds |= {f"{part}.codes": codes, f"{part}.scale": ((*shape[:-1], 1), _SCALE)}
            else:
                kinds[part] = (shape, torch.bfloat16 if precision == HALF else kept)
        fields, start = {}, 0
        for name, (shape, dtype) in sorted(kinds.items(), key=lambda item: -item[1][1].itemsize):
            stop = start + math.prod(shape) * dtype.itemsize
            fields[name] = _Field(shape, dtype, start, stop)
            start = stop
        return cls(precision, dict(plain), fields, start)

    def pack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(size,) uint8: the bytes of an expert.

        Raises:
            FormatError: a part has another number type or shape than others of its layer.
        """
        stored = torch.empty(self.size, dtype=torch.uint8)
        for part, (shape, dtype, _) in self.plain.items():
            value = parts[part]
            if value.dtype != dtype or tuple(value.shape) != shape:
                raise FormatError(
                    f"{part} of an expert is {value.dtype} {tuple(value.shape)}, of others {dtype} {shape}"
                )
            if part in self.fields:
                self._field(stored, part).copy_(value)
                continue
            codes, scale = _coded(value, LEVELS[self.precision])
            self._field(stored, f"{part}.scale").copy_(scale)
            self._field(stored, f"{part}.codes").copy_(codes if self.precision == "int8" else _paired(codes))
        return stored

    def part(self, stored: torch.Tensor, part: Part, dtype: torch.dtype) -> torch.Tensor:
        """A part of an expert of these bytes, in a number type."""
        if part in self.fields:
            value = self._field(stored, part)
            return value.to(dtype) if self.precision == EXACT else value.to(self.plain[part].dtype).to(dtype)
        shape, plain, _ = self.plain[part]
        codes, scale = self._field(stored, f"{part}.codes"), self._field(stored, f"{part}.scale")
        numbers = (codes if self.precision == "int8" else _parted(codes, shape)).float()
        return numbers.mul_(scale.float()).to(plain).to(dtype)

    def has(self, part: str) -> bool:
        """Whether experts have a part."""
        return part in self.plain

    def width(self, matrix: Matrix) -> int:
        """Rows of a matrix."""
        return self.plain[matrix].shape[0]

    def _field(self, stored: torch.Tensor, name: str) -> torch.Tensor:
        shape, dtype, start, stop = self.fields[name]
        return stored[start:stop].view(dtype).view(shape)


def _coded(weight: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, in) int8 codes up to `most`, and (out, 1) scales."""
    wide = weight.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / most).to(_SCALE)
    codes = (wide / scale.float().clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-most, most)
    return codes.to(torch.int8), scale


def _paired(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits, two to a byte."""
    flat = torch.nn.functional.pad(codes.reshape(-1) + _ZERO, (0, codes.numel() % 2)).to(torch.uint8)
    return flat[::2] | (flat[1::2] << 4)


def _parted(pairs: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Codes of four bits, one to a byte."""
    halves = torch.stack([pairs & 15, pairs >> 4], dim=-1).view(-1)[: math.prod(shape)]
    return (halves.to(torch.int8) - _ZERO).view(shape)
