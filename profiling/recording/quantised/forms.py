"""Forms: ways of storing a matrix in few bits, each with the rule that gives the numbers back.

    scaled      one number of 8 bits per weight, times a scale per block, row or tensor    fp8, int8
    fp4         two numbers of 4 bits per byte (E2M1), times a scale per block             MXFP4, DeepSeek-V4's experts
    grouped     integers packed into words of 32 bits: (code - zero) * scale per group     AWQ, GPTQ, compressed-tensors

The rules are those of the programs that write the forms, rounding included: 8 and 4 bit floats are scaled in float32
(Micikevicius et al. 2022; OCP Microscaling 1.0), integers in the number type of their scales (Frantar et al. 2023;
Lin et al. 2024). What activations would be rounded to plays no role here.

A stored matrix is a dictionary from part ("weight", "scale", ...) to tensor. Shapes: out x in, leading dimensions
stay (experts that are stored in one tensor).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Parts = Mapping[str, torch.Tensor]
Shapes = Mapping[str, Sequence[int]]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits of a 4-bit float mean; the highest is the sign."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Field of a word in which AWQ keeps each of eight columns."""
_WORD = 32


class StoredForm(Protocol):
    """One way of storing a matrix.

    Attributes:
        is_transposed: whether the plain tensor is (in, out), the other way round than `unpack` gives it.
    """

    @property
    def is_transposed(self) -> bool: ...

    def shape(self, shapes: Shapes) -> list[int]:
        """Of the matrix, (..., out, in), by the shapes of its parts."""

    def unpack(self, parts: Parts) -> torch.Tensor:
        """The matrix, (..., out, in)."""


@dataclass(frozen=True)
class Plain:
    """A tensor as it is."""

    is_transposed = False

    def shape(self, shapes: Shapes) -> list[int]:
        """See `StoredForm`."""
        return list(shapes["weight"])

    def unpack(self, parts: Parts) -> torch.Tensor:
        """See `StoredForm`."""
        return parts["weight"]


@dataclass(frozen=True)
class Scaled:
    """weight (..., out, in) of 8 bits, scale () or (out,) or (..., blocks of out, blocks of in), maybe zero_point.

    Attributes:
        block: rows and columns of a block as the configuration states them; () = the scales' shape says it.
    """

    block: tuple[int, ...] = ()
    is_transposed = False

    def shape(self, shapes: Shapes) -> list[int]:
        """See `StoredForm`."""
        return list(shapes["weight"])

    def unpack(self, parts: Parts) -> torch.Tensor:
        """See `StoredForm`."""
        weight, scale = parts["weight"], parts["scale"]
        values = weight.float()
        if "zero_point" in parts:
            values = values - _spread(parts["zero_point"].float(), weight.shape, self.block)
        values = values * _spread(read_scale(scale), weight.shape, self.block)
        return values if weight.is_floating_point() else values.to(scale.dtype)


@dataclass(frozen=True)
class Fp4:
    """weight (..., out, in / 2) bytes or (..., out, groups, bytes), the lower half first; scale per block.

    Attributes:
        is_transposed: see `StoredForm`; gpt-oss.
    """

    is_transposed: bool = False

    def shape(self, shapes: Shapes) -> list[int]:
        """See `StoredForm`."""
        size = list(shapes["weight"])
        if len(size) > len(shapes["scale"]):
            size = [*size[:-2], size[-2] * size[-1]]
        return [*size[:-1], 2 * size[-1]]

    def unpack(self, parts: Parts) -> torch.Tensor:
        """See `StoredForm`."""
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=parts["weight"].device)
        packed = parts["weight"].contiguous().view(torch.uint8)
        size = self.shape({name: tensor.shape for name, tensor in parts.items()})
        values = table[torch.stack([packed & 15, packed >> 4], dim=-1).int()].reshape(size)
        groups = packed.shape[-2] if packed.ndim > parts["scale"].ndim else parts["scale"].shape[-1]
        if list(parts["scale"].shape) != [*size[:-1], groups]:
            raise ValueError(f"scales of shape {list(parts['scale'].shape)} for rows of shape {size[:-1]}")
        return values * _spread(read_scale(parts["scale"]), values.shape, ())


@dataclass(frozen=True)
class Awq:
    """weight (in, out * bits / 32) and zeros (groups, out * bits / 32) words along out; scale (groups, out)."""

    is_transposed = False

    def shape(self, shapes: Shapes) -> list[int]:
        """See `StoredForm`."""
        return [shapes["scale"][1], shapes["weight"][0]]

    def unpack(self, parts: Parts) -> torch.Tensor:
        """See `StoredForm`."""
        weight, scale = parts["weight"], parts["scale"]
        bits = _WORD * weight.shape[1] // scale.shape[1]
        codes_io, zeros_go = _fields(weight, bits), _fields(parts["zeros"], bits)
        if bits == _WORD // len(_AWQ_ORDER):
            codes_io, zeros_go = _unshuffle(codes_io), _unshuffle(zeros_go)
        group_i = torch.arange(len(weight), device=weight.device) // (len(weight) // len(scale))
        return _dequantise(codes_io, zeros_go, scale, group_i).t()


@dataclass(frozen=True)
class Gptq:
    """weight (in * bits / 32, out) words along in, zeros (groups, out * bits / 32), scale (groups, out), maybe g_idx.

    Attributes:
        bits: of a weight.
        zero_offset: what is added to stored zeros: 1 in the first version of the format, 0 in the second.
    """

    bits: int = 4
    zero_offset: int = 1
    is_transposed = False

    def shape(self, shapes: Shapes) -> list[int]:
        """See `StoredForm`."""
        return [shapes["weight"][1], shapes["weight"][0] * _WORD // self.bits]

    def unpack(self, parts: Parts) -> torch.Tensor:
        """See `StoredForm`."""
        weight, scale = parts["weight"], parts["scale"]
        codes_io = _fields(weight.t(), self.bits).t()
        zeros_go = _fields(parts["zeros"], self.bits)[:, : scale.shape[1]] + self.zero_offset
        group_i = parts.get("g_idx")
        if group_i is None:
            group_i = torch.arange(len(codes_io), device=weight.device) // (len(codes_io) // len(scale))
        return _dequantise(codes_io, zeros_go, scale, group_i.long()).t()


@dataclass(frozen=True)
class PackedInt:
    """weight (out, in * bits / 32) words along in of code + 2^(bits - 1); scale (out, groups); maybe zeros, g_idx.

    Words of zeros run along out: (out * bits / 32, groups). Without them zero is zero.

    Attributes:
        bits: of a weight.
    """

    bits: int = 4
    is_transposed = False

    def shape(self, shapes: Shapes) -> list[int]:
        """See `StoredForm`."""
        return [shapes["weight"][0], shapes["weight"][1] * _WORD // self.bits]

    def unpack(self, parts: Parts) -> torch.Tensor:
        """See `StoredForm`."""
        weight, scale = parts["weight"], parts["scale"].reshape(len(parts["weight"]), -1)
        codes_oi = _fields(weight, self.bits)
        zero = 1 << (self.bits - 1)
        zeros_go = torch.full_like(scale.t(), zero, dtype=torch.int32)
        if "zeros" in parts:
            zeros_go = _fields(parts["zeros"].t(), self.bits)[:, : len(weight)]
        group_i = parts.get("g_idx")
        if group_i is None:
            group_i = torch.arange(codes_oi.shape[1], device=weight.device) // (codes_oi.shape[1] // scale.shape[1])
        return _dequantise(codes_oi.t(), zeros_go, scale.t(), group_i.long()).t()


def read_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32; bytes are exponents (E8M0)."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127)
    return scale.float()


def _spread(scale: torch.Tensor, shape: Sequence[int], block: tuple[int, ...]) -> torch.Tensor:
    """Scales of blocks, rows or the whole, so that they fit (..., out, in)."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == len(shape) - 1:
        scale, block = scale[..., None], ()
    if list(scale.shape[:-2]) != list(shape[:-2]):  # or those of one matrix would be taken for all
        raise ValueError(f"scales of shape {list(scale.shape)} for weights of shape {list(shape)}")
    for axis, stated in ((-2, block[0] if block else 0), (-1, block[1] if block else 0)):
        length, blocks = shape[axis], scale.shape[axis]
        if blocks == 1 and (not stated or length <= stated):
            continue
        size = stated if stated and -(-length // stated) == blocks else length // blocks
        if size * blocks < length or size * (blocks - 1) >= length:
            raise ValueError(f"{blocks} scales do not divide {length} weights")
        scale = scale.repeat_interleave(size, dim=axis).narrow(axis, 0, length)
    return scale


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, m) words of 32 bits -> (n, m * 32 / bits) int32, the lowest bits first."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _unshuffle(fields: torch.Tensor) -> torch.Tensor:
    """Columns of AWQ words in their order."""
    return fields.unflatten(-1, (-1, len(_AWQ_ORDER)))[..., list(_AWQ_ORDER)].flatten(-2)


def _dequantise(
    codes_io: torch.Tensor, zeros_go: torch.Tensor, scale_go: torch.Tensor, group_i: torch.Tensor
) -> torch.Tensor:
    """(in, out) numbers, rounded to the type of the scales."""
    return ((codes_io - zeros_go[group_i]).float() * scale_go.float()[group_i]).to(scale_go.dtype)
