"""Grouped products: one matrix per group of consecutive rows, by the form that is fastest for the sizes at hand.

Shape letters: M rows, grouped.
"""

import torch

PADDED_ROWS_PER_GROUP = 16
"""Mean rows per group from which the call of a product no longer dominates it."""
PADDED_ELEMENTS = 2**19
"""Size of a group's matrix from which reading it dominates."""
PADDING_ROWS = 12
"""Rows above the mean up to which padding costs less than the calls that it saves."""


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """One matrix product per group of consecutive rows.

    On a CPU a 16-bit product of few rows with a small matrix costs mostly its call: where nearly all groups have rows
    and none has many, one batched product over padded groups takes 0.6 of the time of a loop (see benchmarks/results).
    Elsewhere `torch._grouped_mm` and a loop over groups that have rows are equally fast; the loop also takes the types
    and sizes that the grouped kernel does not: float64, and rows that are no multiple of 16 bytes.

    Args:
        x: (M, in) rows, grouped.
        weight: (groups, out, in).
        ends: (groups,) int32, index after the last row of each group.
    """
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    on_cpu = x.device.type == "cpu"
    small = x.element_size() == 2 and weight[0].numel() <= PADDED_ELEMENTS
    if on_cpu and small and len(x) < PADDED_ROWS_PER_GROUP * len(weight):
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        longest, empty = int(counts.max()), int((counts == 0).sum())
        if longest <= len(x) / len(weight) + PADDING_ROWS and empty <= len(weight) // 4:
            return padded_linear(x, weight, counts, longest)
    if aligned and x.dtype != torch.float64 and (not on_cpu or len(x) >= 2 * len(weight)):
        return torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    return looped_linear(x, weight, ends)


def padded_linear(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, longest: int) -> torch.Tensor:
    """`grouped_linear` as one batched product; `counts` (groups,) rows of each group, at most `longest`."""
    groups = torch.arange(len(weight), device=x.device)
    group_M = torch.repeat_interleave(groups, counts)
    row_M = torch.arange(len(x), device=x.device) + (groups * longest - counts.cumsum(0) + counts)[group_M]
    padded = x.new_zeros(len(weight) * longest, x.shape[1]).index_copy_(0, row_M, x)
    out = torch.bmm(padded.view(len(weight), longest, -1), weight.transpose(-2, -1))
    return out.view(len(padded), -1).index_select(0, row_M)


def looped_linear(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`grouped_linear` as a loop: the reference, and the faster form for few rows on a CPU."""
    out = x.new_empty(len(x), weight.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[group].t(), out=out[start:end])
            start = end
    return out
