"""ExpertStore: the expert weights of this rank.

    slot of this rank  --row_of_slot-->  storage row  -->  gate_up[row], down[row], biases[row]
                                                           (of quantised experts what these are stored in)

Slots are what a placement talks about; storage rows hold weights. Behind the rows of each layer come staging rows,
which all layers share: weights are written there while the old ones serve. What is to serve is exchanged with the row
of what it replaces, and `commit` changes the slot table.

Shape letters: L MoE layers, C slots per rank.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError
from moeplace.runtime.experts.row_contents import RowContents, checksums
from moeplace.runtime.experts.weights import LayerWeights


class ExpertStore:
    """All experts of this rank.

    Attributes:
        weights: per MoE layer.
        row_of_slot: (L, C) int64, storage row of each slot.
        contents: which expert each row holds, as far as `load` and migrations put it there.
        is_migrating: whether a migration is under way.
        staging: rows for experts of any layer; row number s has the index `rows of the layer + s` in each.
    """

    def __init__(self, weights: Sequence[LayerWeights], *, slots: int, staging: LayerWeights | None = None) -> None:
        self.weights = list(weights)
        rows_of_layer = [self.num_rows(layer) for layer in range(len(weights))]
        for layer, rows in enumerate(rows_of_layer):
            if rows < slots:
                raise InputError(f"MoE layer {layer} has {rows} expert rows, which must be at least its {slots} slots")
        self.staging = weights[0].select_rows([], room=0) if staging is None else staging
        self.contents = RowContents([rows + self.staging_rows for rows in rows_of_layer], weights[0].part_names)
        self.is_migrating = False
        self._staged_of: dict[int, int] = {}  # staging row -> the layer whose expert is there, or is to come
        device = weights[0].device
        self._install_rows(torch.arange(slots, device=device).repeat(len(weights), 1))

    def write(self, layer: int, row: int, part: str, value: torch.Tensor) -> None:
        """Copy one part of one expert into a storage row (of a slot while loading, of staging while serving)."""
        target = self._row(layer, row)[part]
        if target.shape != value.shape:
            raise InputError(f"{part} of an expert has shape {tuple(value.shape)}, not {tuple(target.shape)}")
        target.copy_(value)

    def load(self, layer: int, row: int, expert: int, parts: Mapping[str, torch.Tensor]) -> None:
        """Copy all parts of an expert, as a checkpoint has them, into a storage row, and note its checksums."""
        self.make_room(layer, row, expert)
        for part, value in self.weights[layer].fitted(expert, parts).items():
            self.write(layer, row, part, value)
        self.note(layer, row, expert)

    def note(self, layer: int, row: int, expert: int) -> None:
        """Take the checksums of a row that holds all of an expert now."""
        self.contents.fill(layer, row, expert, checksums(self._row(layer, row).values()))

    def make_room(self, layer: int, row: int, expert: int) -> None:
        """Let a storage row, from which nothing is served, have room for the bytes of an expert that is to come."""
        weights, index = self._place(layer, row)
        if weights is self.staging:
            self._staged_of[index] = layer
        weights.make_room(index, expert, self.weights[layer])

    def vacate(self, layer: int, row: int) -> None:
        """Note that a row holds no expert any more."""
        self.contents.clear(layer, row)
        weights, index = self._place(layer, row)
        if weights is not self.staging or self._staged_of.get(index) == layer:
            weights.free(index)

    def row_bytes(self, layer: int, row: int) -> list[torch.Tensor]:
        """The bytes of a storage row, uint8 views of its parts one after the other."""
        return [tensor.view(-1).view(torch.uint8) for tensor in self._row(layer, row).values()]

    def expert_bytes(self, layer: int, expert: int | None = None) -> int:
        """Bytes of an expert of a layer; of its largest one where none is named."""
        return self.weights[layer].row_size if expert is None else self.weights[layer].size_of(expert)

    def bytes_in_row(self, layer: int, row: int) -> int:
        """Bytes of the expert that a row holds."""
        return self.expert_bytes(layer, self.contents.expert_of_row[layer][row])

    @property
    def held_bytes(self) -> int:
        """Bytes of all storage rows, those of staging included."""
        return sum(weights.held_bytes for weights in (*self.weights, self.staging))

    def read(self, layer: int, slot: int) -> dict[str, torch.Tensor]:
        """Views of the parts of the expert in a slot."""
        return self._row(layer, int(self.row_of_slot[layer, slot]))

    @property
    def staging_rows(self) -> int:
        """How many experts, of whatever layers, staging holds."""
        return self.staging.rows

    def rows_of(self, layer: int) -> torch.Tensor:
        """(C + 1,) int64, storage row of each slot of a layer; that of slot -1 lies beyond all others."""
        return self._rows[layer]

    def row_table(self, layer: int) -> np.ndarray:
        """`rows_of` on the host."""
        return self._tables[layer]

    def num_rows(self, layer: int) -> int:
        """Storage rows of a layer, without staging."""
        return self.weights[layer].rows

    def exchange(self, layer: int, one: int, other: int) -> None:
        """Let the experts in two rows of a layer, of which one may be staging, change places; the slots stay."""
        (ours, row), (theirs, other_row) = self._place(layer, one), self._place(layer, other)
        ours.exchange(row, theirs, other_row)
        self.contents.exchange(layer, one, other)

    def _row(self, layer: int, row: int) -> dict[str, torch.Tensor]:
        """Views of the parts in a storage row."""
        weights, index = self._place(layer, row)
        return weights.row(index)

    def _place(self, layer: int, row: int) -> tuple[LayerWeights, int]:
        """Where a storage row is: of its layer, or of staging."""
        rows = self.num_rows(layer)
        return (self.weights[layer], row) if row < rows else (self.staging, row - rows)

    def commit(self, layer: int, rows: dict[int, int]) -> None:
        """Let slots of a layer use other storage rows: slot -> row. Takes effect with the next computation."""
        table = self.row_of_slot.clone()
        for slot, row in rows.items():
            table[layer, slot] = row
        self.commit_table(table)

    def commit_table(self, row_of_slot: torch.Tensor) -> None:
        """Let all slots of all layers use other storage rows, (L, C) int64. Takes effect with the next computation.

        The table is kept, not copied: a computation in flight keeps the one before.
        """
        for layer, used in enumerate(row_of_slot.tolist()):
            if len(set(used)) != len(used):
                raise InputError(f"two slots of MoE layer {layer} would share a storage row: {used}")
        self._install_rows(row_of_slot)

    def _install_rows(self, row_of_slot: torch.Tensor) -> None:
        """Derive the tables that `rows_of` and `row_table` give."""
        self.row_of_slot = row_of_slot
        beyond = [self.num_rows(layer) for layer in range(len(self.weights))]
        self._rows = [
            torch.cat([table, table.new_tensor([row])]) for table, row in zip(row_of_slot, beyond, strict=True)
        ]
        self._tables = [rows.cpu().numpy() for rows in self._rows]

    def placed(self, placement: Placement, rank: int) -> None:
        """What the slots of this rank hold from now on, for stores that keep experts in several memories."""

    def serving(self, layer: int) -> LayerWeights | None:
        """The weights that experts of a layer are computed with, by storage row; None = they are in several places."""
        return self.weights[layer]

    def resize(self, slots: int) -> None:
        """Hold more or fewer slots per layer, layer by layer; what is beyond the new number, or staged, is dropped.

        Beyond the rows themselves this takes the memory of one layer, while its rows are copied.
        """
        kept = min(slots, self.row_of_slot.shape[1])
        before, contents = self.row_of_slot[:, :kept].tolist(), self.contents
        self.contents = RowContents([slots + self.staging_rows] * len(self.weights), contents.parts)
        self.contents.reference = contents.reference
        for layer, rows in enumerate(before):
            self.weights[layer] = self.weights[layer].select_rows(rows, room=slots)
            for row, old in enumerate(rows):
                if (layer, old) in contents.sums:
                    expert = contents.expert_of_row[layer][old]
                    self.contents.fill(layer, row, expert, contents.sums[layer, old])
        self._install_rows(torch.arange(slots, device=self.row_of_slot.device).repeat(len(self.weights), 1))
