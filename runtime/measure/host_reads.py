"""HostReads: how often a program asks a tensor for its values, or makes a tensor whose size depends on values.

On a GPU the host waits each time until everything before is done, and a graph that is captured cannot contain it. On a
CPU nothing waits, so the calls can be counted there.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__format__"}
_READS |= {"__repr__", "__contains__", "equal", "allclose"}
_SIZED_BY_VALUES = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"}
_INDEXED = {"__getitem__", "__setitem__"}


class HostReads(TorchFunctionMode):
    """Counts while it is entered.

    Attributes:
        calls: name of the function -> how often it was one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.calls.total()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Look at one call, then make it."""
        name = getattr(func, "__name__", "")
        if _waits(name, args, kwargs or {}):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _waits(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if name in _READS or name in _SIZED_BY_VALUES:
        return True
    if name == "where":
        return len(args) + len(kwargs) == 1  # as nonzero does
    if name == "repeat_interleave":
        counts = (*args[1:], *kwargs.values()) if len(args) + len(kwargs) > 1 else args
        return kwargs.get("output_size") is None and any(isinstance(each, torch.Tensor) for each in counts)
    return name in _INDEXED and any(_is_mask(part) for part in (args[1] if isinstance(args[1], tuple) else args[1:2]))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
