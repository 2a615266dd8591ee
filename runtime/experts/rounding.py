"""Experts in fewer bits, given back as the numbers that the bits mean: integers are symmetric, with one scale per row
of a matrix.

    bfloat16    the nearest one
    int8    round(w / s) in -127..127,  s = max |w| of the row / 127
    int4    round(w / s) in -7..7,      s = max |w| of the row / 7

Scales are stored in 16 bits (bfloat16). Biases stay as they are.
"""

from collections.abc import Mapping

import torch

EXACT, HALF = "exact", "bfloat16"
LEVELS = {"int8": 127, "int4": 7}
"""Greatest integer of each precision."""
PRECISIONS = (EXACT, HALF, *LEVELS)
_BITS = {"int8": 8, "int4": 4}
_SCALE_BYTES = 2
MATRICES = ("gate_up", "down")


def precisions_below(dtype: torch.dtype) -> tuple[str, ...]:
    """Precisions that take fewer bytes than a number type, the exact one first."""
    return (EXACT, *((HALF,) if dtype.itemsize > 2 else ()), *LEVELS)


def rounded(parts: Mapping[str, torch.Tensor], precision: str) -> dict[str, torch.Tensor]:
    """The parts of an expert as a precision gives them back, in their own number types."""
    if precision == EXACT:
        return dict(parts)
    if precision == HALF:
        return {name: part.to(torch.bfloat16).to(part.dtype) for name, part in parts.items()}
    return {name: _rounded(part, LEVELS[precision]) if name in MATRICES else part for name, part in parts.items()}


def _rounded(weight: torch.Tensor, most: int) -> torch.Tensor:
    wide = weight.float()
    scale = (wide.abs().amax(dim=-1, keepdim=True) / most).to(torch.bfloat16).float()
    codes = (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-most, most)
    return (codes * scale).to(weight.dtype)


def stored_bytes(parts: Mapping[str, torch.Tensor], precision: str) -> int:
    """Bytes of an expert in a precision: integers packed, a scale per row, the rest as it is."""
    if precision == HALF:
        return sum(2 * part.numel() for part in parts.values())
    total = 0
    for name, part in parts.items():
        if precision == EXACT or name not in MATRICES:
            total += part.numel() * part.element_size()
        else:
            rows = part.numel() // part.shape[-1]
            total += -(-part.numel() * _BITS[precision] // 8) + rows * _SCALE_BYTES
    return total
