"""RowContents: which expert each storage row of this rank holds, and the checksums of its bytes.

A slot is trusted only if the row it names holds, whole and undamaged, the expert that the placement names. Checksums of
what was read from the checkpoint are the reference; all ranks share them once.

Shape letters: L MoE layers, E experts per layer.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from moeplace.placement.placement import Placement
from moeplace.runtime.comm.group import RankGroup

NOTHING = -1
Sums = tuple[int, ...]
"""One checksum per part of an expert."""

_WORD, _BLOCK = 8, 512
"""Bytes of a word; words of a block."""


class RowContents:
    """What the storage rows of one rank hold.

    Attributes:
        expert_of_row: per layer, the expert in each row; NOTHING = none, or not all of it.
        sums: (layer, row) -> checksums of the expert there, taken when its last byte came.
        parts: names of what an expert consists of.
        reference: (L, E, parts) int64 checksums of every expert as read from the checkpoint; None = not shared yet.
    """

    def __init__(self, rows_of_layer: Sequence[int], parts: tuple[str, ...]) -> None:
        self.expert_of_row = [[NOTHING] * rows for rows in rows_of_layer]
        self.sums: dict[tuple[int, int], Sums] = {}
        self.parts = parts
        self.reference: np.ndarray | None = None

    def fill(self, layer: int, row: int, expert: int, sums: Sums) -> None:
        """Note that a row holds all of an expert."""
        self.expert_of_row[layer][row] = expert
        self.sums[layer, row] = sums

    def clear(self, layer: int, row: int) -> None:
        """Forget what a row holds."""
        self.expert_of_row[layer][row] = NOTHING
        self.sums.pop((layer, row), None)

    def exchange(self, layer: int, one: int, other: int) -> None:
        """Note that what two rows hold has changed places."""
        experts = self.expert_of_row[layer]
        experts[one], experts[other] = experts[other], experts[one]
        found = {row: self.sums.pop((layer, row), None) for row in (one, other)}
        for row, sums in ((one, found[other]), (other, found[one])):
            if sums is not None:
                self.sums[layer, row] = sums

    def row_of(self, layer: int, expert: int) -> int | None:
        """The row that holds an expert, None = this rank does not have it."""
        rows = self.expert_of_row[layer]
        return rows.index(expert) if expert in rows else None

    def is_intact(self, layer: int, row: int, expert: int) -> bool:
        """Whether the row holds this expert with the checkpoint's bytes; `share_reference` must have been called."""
        assert self.reference is not None
        sums = self.sums.get((layer, row))
        return self.expert_of_row[layer][row] == expert and sums == tuple(self.reference[layer, expert].tolist())

    def share_reference(self, group: RankGroup, placement: Placement) -> None:
        """Learn the checksums of all experts from the ranks that read them: a collective, the first time only."""
        if self.reference is not None:
            return
        reference = np.zeros((placement.num_layers, placement.num_experts, len(self.parts)), np.int64)
        for layer, expert in np.argwhere(placement.rank_of_expert == group.rank).tolist():
            row = self.row_of(layer, expert)
            if row is not None:
                reference[layer, expert] = self.sums[layer, row]
        if group.size > 1:
            shared = torch.as_tensor(reference, device=group.device)
            group.all_reduce(shared, kind="checksums")
            reference = shared.cpu().numpy()
            group.raise_if_lost()  # before anything is kept: who has numbers is not asked again
        self.reference = reference

    def receive_reference(self, group: RankGroup, placement: Placement, *, root: int) -> None:
        """Learn the checksums of all experts from a rank that knows them: a collective."""
        shape = (placement.num_layers, placement.num_experts, len(self.parts))
        known = np.zeros(shape, np.int64) if self.reference is None else self.reference
        shared = torch.as_tensor(known, device=group.device).clone()
        group.broadcast(shared, root=root, kind="checksums")
        reference = shared.cpu().numpy()
        group.raise_if_lost()
        self.reference = reference


def checksums(parts: Iterable[torch.Tensor]) -> Sums:
    """Checksums of the parts of an expert."""
    return tuple(torch.stack([checksum(part).cpu() for part in parts]).tolist())


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """() int64: sum modulo 2^64 of the words of all bytes, blocks weighted by odd numbers.

    Any single wrong bit shows, and so does a piece that was written to the place of another.
    """
    flat = tensor.reshape(-1).view(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % (_WORD * _BLOCK)))
    blocks = flat.view(torch.int64).view(-1, _BLOCK).sum(1)
    return (blocks * torch.arange(1, 2 * len(blocks), 2, device=blocks.device)).sum()
