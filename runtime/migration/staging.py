"""Staging: where experts arrive while their rank serves: rows that all layers share, and rows of empty slots.

    slots   0 1 2 3 --> rows 0 1 2 3          during: expert 9 arrives in the staging row
    staging             row  s                commit: rows 2 and s change places, slot 2 serves expert 9
                                              failed check: they change places again

An expert that changes its slot inside a rank is not copied: the slot gets its row.

Shape letters: L MoE layers, C slots per rank, S slots per layer.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from moeplace.placement.migration.copies import CHECKPOINT
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.runtime.comm.group import PendingExchange, RankGroup
from moeplace.runtime.experts.row_contents import NOTHING
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.migration.pieces import Arrival, Piece


class Staging:
    """Where experts arrive on one rank, and the pieces on their way.

    Attributes:
        store: the expert weights of this rank.
    """

    def __init__(self, store: ExpertStore, group: RankGroup) -> None:
        """`group`: the ranks; pieces travel on its background group, made here: all ranks must do this together."""
        self.store = store
        self._rank, self._size = group.rank, group.size
        self._group = group.background() if group.size > 1 else group
        self._rows: dict[tuple[int, int], int] = {}  # (layer, expert) -> row, from its reservation to its commit
        self._pieces: Sequence[Piece] = ()
        self._incoming: list[Piece] = []
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._exchange: PendingExchange | None = None

    def reserve(self, arrivals: Sequence[Arrival]) -> None:
        """Choose a row for each expert that this rank gets: one without an expert in its layer, else of staging."""
        for arrival in arrivals:
            if arrival.receiver == self._rank:
                row = next(self._free_rows(arrival.layer))
                self._rows[arrival.layer, arrival.expert] = row
                self.store.make_room(arrival.layer, row, arrival.expert)

    def _free_rows(self, layer: int) -> Iterator[int]:
        store, contents = self.store, self.store.contents.expert_of_row
        taken, first = self._reserved(layer), store.num_rows(layer)
        for row in range(first):
            if contents[layer][row] == NOTHING and row not in taken:
                yield row
        staged = {row - store.num_rows(of_layer) for (of_layer, _), row in self._rows.items()}
        for index in range(store.staging_rows):
            if index not in staged:
                yield first + index

    def row_of(self, arrival: Arrival) -> int:
        """The row reserved for an expert."""
        return self._rows[arrival.layer, arrival.expert]

    def start(self, pieces: Sequence[Piece]) -> None:
        """Put pieces on their way; every rank names all of them, those of other ranks too."""
        self._pieces = pieces
        remote = [piece for piece in pieces if piece.arrival.sender != CHECKPOINT]
        if not remote:
            return
        outgoing = sorted((p for p in remote if p.arrival.sender == self._rank), key=lambda p: p.arrival.receiver)
        self._incoming = sorted((p for p in remote if p.arrival.receiver == self._rank), key=lambda p: p.arrival.sender)
        device = self._group.device
        blocks = [block for piece in outgoing for block in self._views(piece, self._held_row(piece.arrival))]
        sent = torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.uint8, device=device)
        outgoing_R, incoming_R = [0] * self._size, [0] * self._size
        for piece in outgoing:
            outgoing_R[piece.arrival.receiver] += piece.stop - piece.start
        for piece in self._incoming:
            incoming_R[piece.arrival.sender] += piece.stop - piece.start
        self._buffer = torch.empty(sum(incoming_R), dtype=torch.uint8, device=device)
        self._exchange = self._group.start_all_to_all(self._buffer, sent, incoming_R, outgoing_R, kind="migration")

    def finish(self) -> Sequence[Piece]:
        """Wait for the pieces of `start` and put them into their rows; all of them, those of other ranks too."""
        pieces, self._pieces = self._pieces, ()
        if self._exchange is None:
            return pieces
        self._exchange.wait()
        left = self._buffer
        for piece in self._incoming:
            layer, expert, row = piece.arrival.layer, piece.arrival.expert, self.row_of(piece.arrival)
            for view in self._views(piece, row):
                view.copy_(left[: len(view)])
                left = left[len(view) :]
            if piece.stop == piece.arrival.size:
                self.store.note(layer, row, expert)
        self._exchange, self._incoming = None, []
        return pieces

    def slot_table(self, before: Placement, after: Placement) -> torch.Tensor:
        """(L, C) int64 row of each slot under `after`; a slot whose expert is not here gets an unused row."""
        table = self.store.row_of_slot.clone()
        for layer in np.flatnonzero((self._here(before) != self._here(after)).any(axis=1)).tolist():
            rows = [self._held(layer, int(expert)) for expert in self._here(after)[layer]]
            taken = self._reserved(layer) | set(rows)
            # Nobody looks at the row of an empty slot, but no two slots may have the same.
            candidates = dict.fromkeys([*table[layer].tolist(), *range(len(self.store.contents.expert_of_row[layer]))])
            spare = (row for row in candidates if row not in taken)
            table[layer] = torch.tensor([next(spare) if row is None else row for row in rows])
        return table

    def exchanges(self, table: torch.Tensor, after: Placement) -> list[tuple[int, int, int]]:
        """(layer, staging row, row) that must change places so that no slot with an expert is served from staging.

        Adapts `table` and the reserved rows to it; `ExpertStore.exchange` carries them out, in any order.
        """
        found = []
        filled_LC = self._here(after) != EMPTY_SLOT
        for layer, slots in enumerate(table.tolist()):
            first, reserved = self.store.num_rows(layer), self._reserved(layer)
            serving = {row for row, is_filled in zip(slots, filled_LC[layer], strict=True) if is_filled}
            spare = sorted(set(range(first)) - serving, key=lambda row: (row in reserved, row))
            for staged in sorted(row for row in serving if row >= first):
                row = spare.pop(0)
                found.append((layer, staged, row))
                self._swap(table[layer], layer, staged, row)
        return found

    def undo(self, exchanges: Sequence[tuple[int, int, int]]) -> None:
        """Take the reserved rows back to where they were before `exchanges`."""
        for layer, staged, row in exchanges:
            self._swap(torch.empty(0, dtype=torch.int64), layer, staged, row)

    def _swap(self, rows: torch.Tensor, layer: int, one: int, other: int) -> None:
        is_one, is_other = rows == one, rows == other
        rows[is_one], rows[is_other] = other, one
        for key, row in self._rows.items():
            if key[0] == layer and row in (one, other):
                self._rows[key] = one + other - row

    def first_damaged(self, before: Placement, after: Placement) -> tuple[int, int] | None:
        """(layer, expert) of the first slot that changed and does not hold what `after` says, None = all do."""
        after_LC, contents = self._here(after), self.store.contents
        for layer, slot in np.argwhere((self._here(before) != after_LC) & (after_LC != EMPTY_SLOT)).tolist():
            expert = int(after_LC[layer, slot])
            if not contents.is_intact(layer, int(self.store.row_of_slot[layer, slot]), expert):
                return layer, expert
        return None

    def settle(self, placement: Placement) -> None:
        """After a commit: rows that are in force are no longer reserved, rows without a use are empty."""
        contents, here_LC = self.store.contents, self._here(placement)
        for layer, rows in enumerate(self.store.row_of_slot.tolist()):
            used = {row for row, expert in zip(rows, here_LC[layer], strict=True) if expert != EMPTY_SLOT}
            self._rows = {key: row for key, row in self._rows.items() if key[0] != layer or row not in used}
            for row in set(range(len(contents.expert_of_row[layer]))) - used - self._reserved(layer):
                self.store.vacate(layer, row)
        self._leave_staging()

    def _leave_staging(self) -> None:
        """Experts that have arrived and land later make room in staging, where their layer has a row to spare."""
        for (layer, expert), row in list(self._rows.items()):
            first = self.store.num_rows(layer)
            free = next(self._free_rows(layer), first)
            if row >= first > free:
                self.store.exchange(layer, row, free)
                self._rows[layer, expert] = free

    def release(self) -> None:
        """Give all reserved rows back."""
        for (layer, _), row in self._rows.items():
            self.store.vacate(layer, row)
        self._rows = {}

    def _here(self, placement: Placement) -> np.ndarray:
        """(L, C) experts of this rank."""
        return placement.slot_to_expert[:, placement.slots_on(self._rank)]

    def _reserved(self, layer: int) -> set[int]:
        return {row for (of_layer, _), row in self._rows.items() if of_layer == layer}

    def _held(self, layer: int, expert: int) -> int | None:
        return None if expert == EMPTY_SLOT else self.store.contents.row_of(layer, expert)

    def _held_row(self, arrival: Arrival) -> int:
        row = self.store.contents.row_of(arrival.layer, arrival.expert)
        assert row is not None, f"rank {self._rank} does not hold expert {arrival.expert} of MoE layer {arrival.layer}"
        return row

    def _views(self, piece: Piece, row: int) -> list[torch.Tensor]:
        """The bytes of a piece in a row, as views."""
        views, first = [], 0
        for part in self.store.row_bytes(piece.arrival.layer, row):
            start, stop = max(piece.start - first, 0), min(piece.stop - first, len(part))
            if start < stop:
                views.append(part[start:stop])
            first += len(part)
        return views
