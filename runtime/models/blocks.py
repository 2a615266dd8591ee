"""ModelBlock: the MoE layer of a `transformers` decoder layer, as the exchange modes want it.

Which of its modules is the router, which are shared experts, and which weighs them, is seen from what they return:

    router        a tuple with whole numbers (M, K) and weights of the same shape
    shared        (M, D)
    shared gate   (M, 1): Qwen2-MoE weighs its shared expert by the sigmoid of it

`splitting` compares what this makes of a layer with what the layer itself does.

Shape letters: M tokens, K top-k, D hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moeplace.runtime.models.tap import ExpertsTap


class NotSplitError(Exception):
    """A decoder layer does not fall into attention and MoE part; says why."""


class ModelBlock:
    """Norm, router and shared experts of one decoder layer; see `moeplace.runtime.exchange.dispatcher.MoeBlock`."""

    def __init__(self, norm: nn.Module, block: nn.Module, x: torch.Tensor) -> None:
        """Look at the modules of `block`; `x` (M, D) are hidden rows to try them on.

        Raises:
            NotSplitError: a module has another meaning, or there is no router.
        """
        self._norm = norm
        self._router: Any = None
        self._shared: Any = None
        self._shared_gate: Any = None
        for name, module in block.named_children():
            if isinstance(module, ExpertsTap) or not any(True for _ in module.parameters()):
                continue
            self._place(name, module, x)
        if self._router is None:
            raise NotSplitError(f"{type(block).__name__} has no router module that returns expert ids and weights")

    def _place(self, name: str, module: nn.Module, x: torch.Tensor) -> None:
        try:
            out = module(x)
        except Exception as error:  # whatever a foreign module wants, it is not hidden rows alone
            raise NotSplitError(f"its module {name} does not take hidden rows") from error
        if _read_routing(out) is not None and self._router is None:
            self._router = module
        elif _has_shape(out, x.shape) and self._shared is None:
            self._shared = module
        elif _has_shape(out, (len(x), 1)) and self._shared_gate is None:
            self._shared_gate = module
        else:
            raise NotSplitError(f"its module {name} ({type(module).__name__}) is neither router nor shared experts")

    def modules(self) -> list[nn.Module]:
        """What is used of the layer; parameters elsewhere in it would be left out."""
        used = [self._norm, self._router, self._shared, self._shared_gate]
        return [module for module in used if module is not None]

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """See `MoeBlock`."""
        return self._norm(x)

    def route(self, hidden: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `MoeBlock`."""
        routing = _read_routing(self._router(hidden))
        assert routing is not None
        return routing

    def shared(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """See `MoeBlock`."""
        if self._shared is None:
            return None
        out = self._shared(hidden)
        return out if self._shared_gate is None else F.sigmoid(self._shared_gate(hidden)) * out


def _read_routing(out: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Expert ids and weights (M, K) in what a router returns, None = it is none."""
    if not isinstance(out, tuple):
        return None
    tensors = [part for part in out if isinstance(part, torch.Tensor)]
    ids = next((part for part in tensors if not part.is_floating_point() and part.ndim == 2), None)
    if ids is None:
        return None
    weights = [part for part in tensors if part.is_floating_point() and part.shape == ids.shape]
    return (ids, weights[-1]) if weights else None


def _has_shape(out: Any, shape: tuple[int, ...] | torch.Size) -> bool:
    return isinstance(out, torch.Tensor) and out.shape == torch.Size(shape)
