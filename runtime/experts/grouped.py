"""Grouped products: one matrix per group of consecutive rows, by the form that is fastest for the sizes at hand.

Shape letters: A assignments, M those that are present, grouped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

PADDED_ROWS_PER_GROUP = 16
"""Mean rows per group from which the call of a product no longer dominates it, of 16-bit types on a CPU."""
PADDED_ELEMENTS = 2**19
"""Size of a group's matrix from which reading it dominates, of those types."""
PADDING_ROWS = 12
"""Rows above the mean up to which padding costs less than the calls that it saves, of those types."""
CALL_ELEMENTS = 2**18
"""Elements of a matrix that one more row multiplies in the time of a call, of wider types: 5 us at 100 GFLOP/s."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Assignments grouped by the storage row of their expert, on the host.

    Attributes:
        storage: (A,) int64 storage row of each assignment; that of absent ones lies beyond all others.
        order: (A,) int64 assignments, group after group, absent ones last.
        sizes: (groups,) int64 assignments of each group.
        present: sum of sizes.
    """

    storage: np.ndarray
    order: np.ndarray
    sizes: np.ndarray
    present: int

    @classmethod
    def of(cls, storage: np.ndarray, count: int) -> Self:
        """From storage rows in 0..count, `count` = absent."""
        sizes = np.bincount(storage, minlength=count + 1)[:count]
        return cls(storage, storage.argsort(kind="stable"), sizes, int(sizes.sum()))

    @property
    def active(self) -> int:
        """Groups that have assignments."""
        return int(np.count_nonzero(self.sizes))

    def storage_of_order(self) -> np.ndarray:
        """(M,) storage row of each present assignment, in order."""
        return self.storage[self.order[: self.present]]

    def padding(self) -> tuple[np.ndarray, np.ndarray]:
        """Groups of equal size: (groups x longest,) the assignment in each place, some in places that nobody needs;
        and (A,) the place of each assignment, 0 for absent ones."""
        longest, order = int(self.sizes.max()), self.order[: self.present]
        storage = self.storage[order]
        starts = np.cumsum(self.sizes) - self.sizes
        place_M = storage * longest + np.arange(self.present) - starts[storage]
        source = np.full(len(self.sizes) * longest, order[0])
        source[place_M] = order
        place = np.zeros(len(self.storage), np.int64)
        place[order] = place_M
        return source, place


def suits_padding(groups: Groups, weight: torch.Tensor) -> bool:
    """Whether one batched product of padded groups takes less than one product per group.

    A product of few rows with a small matrix costs mostly its call: so it does where most groups have rows, none has
    many more than the others, and matrices are small (see benchmarks/results).

    Args:
        weight: (groups, out, in).
    """
    count, elements, longest = len(weight), weight.shape[1] * weight.shape[2], int(groups.sizes.max())
    if 2 * groups.active < count:
        return False
    if weight.element_size() > 2:
        return (count * longest - groups.present) * elements <= groups.active * CALL_ELEMENTS
    mean = groups.present / count
    return mean < PADDED_ROWS_PER_GROUP and elements <= PADDED_ELEMENTS and longest <= mean + PADDING_ROWS


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    groups: torch.Tensor | np.ndarray,
    *,
    matrices: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """One matrix product per group of consecutive rows; what rows behind them become is not said.

    `torch._grouped_mm` and a loop over groups that have rows are equally fast; the loop also takes the types and sizes
    that the grouped kernel does not: float64, and rows that are no multiple of 16 bytes.

    Args:
        x: (M, in) rows, grouped.
        weight: (groups, out, in).
        groups: (groups,) sizes as numbers on the host, or int32 ends of the groups on the device.
        matrices: (in, out) views of each group's matrix, made before; None = they are made here.
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    on_cpu = x.device.type == "cpu"
    if aligned and x.dtype != torch.float64 and (not on_cpu or len(x) >= 2 * len(weight)):
        ends = groups if isinstance(groups, torch.Tensor) else torch.from_numpy(groups.cumsum().astype(np.int32))
        return torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    sizes = np.diff(groups.cpu().numpy(), prepend=0) if isinstance(groups, torch.Tensor) else groups
    return looped_linear(x, weight.transpose(1, 2).unbind(0) if matrices is None else matrices, sizes)


def looped_linear(x: torch.Tensor, matrices: Sequence[torch.Tensor], sizes: np.ndarray) -> torch.Tensor:
    """`grouped_linear` as a loop: the reference, and the faster form for few rows on a CPU.

    Args:
        matrices: (in, out) of each group.
        sizes: (groups,).
    """
    out = x.new_empty(len(x), matrices[0].shape[1])
    used = np.flatnonzero(sizes).tolist()
    rows = [*sizes[used].tolist(), len(x) - int(sizes.sum())]
    for group, source, target in zip(used, x.split(rows), out.split(rows), strict=False):  # all but the last
        torch.mm(source, matrices[group], out=target)
    return out


def made_linear(
    x: torch.Tensor, make: Callable[[int], torch.Tensor], groups: torch.Tensor | np.ndarray, *, width: int
) -> torch.Tensor:
    """`looped_linear` of matrices that are made when they are used, one at a time; on a GPU it waits for the sizes.

    Args:
        x: (M, in) rows, grouped.
        make: group -> its (out, in) matrix.
        groups: as `grouped_linear` takes them.
        width: out.
    """
    sizes = np.diff(groups.cpu().numpy(), prepend=0) if isinstance(groups, torch.Tensor) else groups
    out, start = x.new_empty(len(x), width), 0
    for group in np.flatnonzero(sizes).tolist():
        end = start + int(sizes[group])
        torch.mm(x[start:end], make(group).t(), out=out[start:end])
        start = end
    return out
