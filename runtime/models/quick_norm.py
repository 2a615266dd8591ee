"""QuickNorm: root-mean-square norms in six operator calls instead of twenty, where they give the same.

`transformers` writes these norms out in elementary operations, each a call with casts. A decode step has four per layer
and few rows, so that the calls are what it costs.

Shape letters: M rows, D hidden size.
"""

from typing import Any

import torch
from torch import nn

_PROBE_ROWS = 5
_TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative to the largest number of a row: a few units in the last place. Types not named keep their modules."""


class QuickNorm:
    """`weight * (x / rms(x)).to(type of x)`, the mean of squares in float32."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self._weight = weight
        self._share = 1.0 / weight.numel()
        self._epsilon = torch.tensor([epsilon], dtype=torch.float32, device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, scale, scale, value=self._share).rsqrt_()
        scaled = x * scale
        return self._weight * (scaled if scaled.dtype == x.dtype else scaled.to(x.dtype))


@torch.inference_mode()
def quicken_norms(model: nn.Module, dtype: torch.dtype) -> int:
    """Let the norms of a model that such a norm equals be computed by it; how many."""
    found = 0
    for module in model.modules():
        quick = _find_equal(module, dtype)
        if quick is not None:
            module.forward = quick  # type: ignore[method-assign, assignment]  # hooks and parameters stay the module's
            found += 1
    return found


def _find_equal(module: Any, dtype: torch.dtype) -> QuickNorm | None:
    own = dict(module.named_parameters(recurse=False))
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_plain = set(own) == {"weight"} and own["weight"].ndim == 1 and not list(module.children())
    if not is_plain or not isinstance(epsilon, float) or dtype not in _TOLERANCES:
        return None
    quick = QuickNorm(own["weight"].data, epsilon)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBE_ROWS, own["weight"].numel(), generator=generator)
    rows *= torch.tensor([1e-6, 1e-3, 1.0, 30.0, 0.0])[:, None]  # where epsilon counts, and where it does not
    x = rows.to(own["weight"].device, dtype)
    try:
        expected, given = module(x), quick(x)
    except Exception:  # whatever a foreign module wants, it is not rows alone
        return None
    return quick if _is_same(given, expected, _TOLERANCES[dtype]) else None


def _is_same(given: Any, expected: Any, tolerance: float) -> bool:
    if not isinstance(expected, torch.Tensor) or expected.shape != given.shape or expected.dtype != given.dtype:
        return False
    scale_M1 = expected.double().abs().amax(1, keepdim=True)
    return bool(((given.double() - expected.double()).abs() <= tolerance * scale_M1).all())
