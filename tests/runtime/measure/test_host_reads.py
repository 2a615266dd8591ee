"""HostReads counts every way to ask for values, and nothing that works without them."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moeplace.runtime.measure.host_reads import HostReads

X, COUNTS = torch.tensor([1, 2, 0, 3]), torch.tensor([1, 2, 1, 1])
MASK = X > 0
WAITING: dict[str, Callable[[], object]] = {
    "item": lambda: X[0].item(),
    "tolist": X.tolist,
    "numpy": X.numpy,
    "array": lambda: np.asarray(X),
    "bool": lambda: bool(X[0]),
    "int": lambda: int(X[0]),
    "float": lambda: float(X[0]),
    "index": lambda: range(X[0]),  # type: ignore[call-overload]
    "format": lambda: f"{X[0]}",
    "repr": lambda: repr(X),
    "in": lambda: 1 in X,
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "nonzero": X.nonzero,
    "argwhere": lambda: torch.argwhere(X),
    "where of a mask alone": lambda: torch.where(MASK),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": X.unique,
    "unique_consecutive": X.unique_consecutive,
    "bincount": X.bincount,
    "repeat by a tensor": lambda: X.repeat_interleave(COUNTS),
    "repeat by a named tensor": lambda: torch.repeat_interleave(X, repeats=COUNTS),
    "places repeated": lambda: torch.repeat_interleave(COUNTS),
    "masked": lambda: X[MASK],
    "masked in a tuple": lambda: torch.ones(4, 2)[MASK, 0],
    "set by a mask": lambda: X.clone().__setitem__(MASK, 1),
    "set by a mask in a tuple": lambda: torch.ones(4, 4).__setitem__((0, MASK), 1.0),
}
QUICK: dict[str, Callable[[], object]] = {
    "where": lambda: torch.where(MASK, X, 0),
    "repeat to a known size": lambda: X.repeat_interleave(COUNTS, output_size=5),
    "repeat by a number": lambda: X.repeat_interleave(3),
    "repeat by a named number": lambda: torch.repeat_interleave(X, repeats=3),
    "gathered": lambda: X[COUNTS],
    "set by places": lambda: X.clone().__setitem__(COUNTS, 0),
    "set to a mask": lambda: MASK.clone().__setitem__(0, MASK[1]),
    "sliced": lambda: X[None, ..., 1:],
    "masked_fill": lambda: X.masked_fill(MASK, 0),
    "size": lambda: (len(X), X.shape, X.numel()),
    "sum": lambda: (X + COUNTS).sum(),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_needs_values_is_counted(name: str) -> None:
    """Once, each time, and only while it is entered."""
    with HostReads() as reads:
        WAITING[name]()
        WAITING[name]()
    WAITING[name]()
    assert reads.total == 2, reads.calls


@pytest.mark.parametrize("name", QUICK)
def test_what_needs_no_values_is_not(name: str) -> None:
    """Sizes follow from sizes."""
    with HostReads() as reads:
        QUICK[name]()
    assert reads.total == 0, reads.calls
