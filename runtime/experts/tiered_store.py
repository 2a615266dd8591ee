"""TieredStore: the experts of a rank where fast memory does not hold them all.

    slot  --row_of_slot-->  storage row (host memory, or "read it from the checkpoint")  --FastPart-->  fast row

The storage rows are an `ExpertStore` in host memory: migrations work on them and know nothing of what lies in front.
Rows beyond those that the host has room for hold no bytes: what they are said to hold is read from the checkpoint,
which is mapped into memory. What is written to them is dropped; it would be the same.

Shape letters: L MoE layers, C slots per rank.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from moeplace.placement.memory import HostTier, Memory
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.placement.tiers.policy import Policy, Predictor
from moeplace.placement.tiers.rows import FastRows, share_out
from moeplace.profiling.errors import InputError
from moeplace.runtime.experts.fast_part import FastPart
from moeplace.runtime.experts.loader import Loader
from moeplace.runtime.experts.row_contents import NOTHING, RowContents, checksums
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.tier_limits import TierLimits
from moeplace.runtime.experts.weights import LayerWeights

ReadExpert = Callable[[int, int], Mapping[str, torch.Tensor]]
"""(layer, expert) -> its parts, from the checkpoint."""


class TieredStore(ExpertStore):
    """See the module.

    Attributes:
        limits: how much is where.
        fast: who is in fast memory.
        loader: what brings experts there.
        pool: the fast rows, of all layers.
    """

    def __init__(
        self,
        weights: Sequence[LayerWeights],
        *,
        slots: int,
        staging: LayerWeights,
        pool: LayerWeights,
        limits: TierLimits,
        read: ReadExpert,
    ) -> None:
        """Take rooms for weights, uninitialised.

        Args:
            weights: host rows of each layer; fewer than slots where the rest is on disk.
            slots: C.
            staging: host rows of migrations.
            pool: `limits.fast_slots` rows for each layer, on the device that computes.
            limits: see `TierLimits`.
            read: experts from the checkpoint.
        """
        self._slots, self._read_expert = slots, read
        self.limits, self.pool = limits, pool
        self._row_of_expert: list[dict[int, int]] = []
        self._expected: dict[tuple[int, int], int] = {}  # rows on disk -> experts that are to come there
        super().__init__(weights, slots=slots, staging=staging)
        predictor = Predictor(1.0, limits.look_ahead) if limits.look_ahead else None
        self._policy = Policy(limits.policy, predictor)
        rows = limits.fast_slots * len(weights)
        if rows <= limits.transit:
            raise InputError(f"fast memory ({rows} experts in all) must hold more than its {limits.transit} in transit")
        self.fast = FastPart(
            len(weights), rows, transit=limits.transit, eviction=self._policy.eviction, release=pool.free
        )
        store, fast = weakref.ref(self), self.fast
        self._stream = torch.cuda.Stream(pool.device) if pool.device.type == "cuda" else None

        def copy(layer: int, row: int, target: int, pieces: int) -> Iterator[float]:
            here = store()
            if here is not None:
                yield from here.copy_in_pieces(layer, row, target, pieces)

        self.loader = Loader(
            copy,
            wanted=lambda load: load.row not in fast.held[load.layer],
            take_row=fast.take_ahead,
            size=lambda load: 0 if (here := store()) is None else here.bytes_in_row(load.layer, load.row),
            least_seconds=limits.least_seconds,
            pieces=limits.pieces,
        )
        weakref.finalize(self, self.loader.close)
        self._is_placed = self._is_whole = False
        self._views: list[LayerWeights] = []

    def num_rows(self, layer: int) -> int:
        """See `ExpertStore`: rows on disk are rows too."""
        return self._slots

    def host_rows(self, layer: int) -> int:
        """Storage rows of a layer that have bytes in host memory."""
        return self.weights[layer].rows

    def placed(self, placement: Placement, rank: int) -> None:
        """Follow a placement that is in force: pin what it calls resident, and fill fast memory at the start.

        Raises:
            InputError: at the start, more is resident than there is room for.
        """
        self.loader.drain()
        shares = self._shares(placement, rank)
        here_LC = placement.slot_to_expert[:, placement.slots_on(rank)]
        rows_LC = self.row_of_slot.tolist()
        row_of = [
            {int(e): rows_LC[layer][slot] for slot, e in enumerate(experts) if e != EMPTY_SLOT}
            for layer, experts in enumerate(here_LC)
        ]
        pinned = [
            [row for e, row in rows.items() if shares.pinned_LRE[layer, rank, e]] for layer, rows in enumerate(row_of)
        ]
        with self.loader.lock:
            self.fast.share_out(pinned, shares.free_LR[:, rank].tolist())
        if not self._is_placed or self.limits.fast_slots >= self._slots:
            for layer, rows in enumerate(row_of):
                for expert, row in sorted(rows.items(), key=lambda item: item[1]):
                    if shares.first_LRE[layer, rank, expert] and row not in self.fast.held[layer]:
                        self._fill(layer, row)
            self._is_placed = True
        self._row_of_expert = row_of
        self._look_whether_whole(row_of)

    def _shares(self, placement: Placement, rank: int) -> FastRows:
        """Rows of this rank by the rule of the walk; residents beyond the room are not pinned while experts move."""
        ranks, limits = placement.num_ranks, self.limits
        memory = Memory(HostTier(1.0), fast_slots=np.full(ranks, limits.fast_slots), transit=limits.transit)
        try:
            return share_out(placement, memory, self._policy, expert_bytes=1.0)
        except InputError:
            if not self._is_placed:
                raise
            return share_out(placement.replace(tier=None), memory, self._policy, expert_bytes=1.0)

    def _fill(self, layer: int, row: int) -> None:
        """Put an expert into fast memory at once: in the order of storage rows, where that has room for all of them."""
        ordered = self.limits.fast_slots >= self._slots
        with self.loader.lock:
            target = self.fast.put(layer, row, wanted=layer * self._slots + row if ordered else None)
        self.copy_to_fast(layer, row, target)

    def _look_whether_whole(self, row_of: list[dict[int, int]]) -> None:
        """Whether all experts are in fast memory for good, in the order of their storage rows."""
        first = 0
        views: list[LayerWeights] = []
        self._is_whole = False
        if self.pool.rows < self._slots * len(row_of):  # which may hold all there is: a rank may have no experts yet
            return
        for layer, rows in enumerate(row_of):
            held = self.fast.held[layer]
            if any(row not in held or not held[row].has_come for row in rows.values()):
                return
            if [held[row].target - first for row in sorted(rows.values())] != sorted(rows.values()):
                return
            views.append(self.pool.between(first, first + self._slots))
            first += self._slots
        self._views, self._is_whole = views, True

    def restart(self, placement: Placement, rank: int) -> None:
        """Fill fast memory as at the start, and forget who was used: to measure again what was measured."""
        self.loader.drain()
        with self.loader.lock:
            self.fast.clear()
        self._is_placed = False
        self.placed(placement, rank)

    def take_apart(self) -> None:
        """Let experts be computed one by one though all are in fast memory: to measure what that takes."""
        self._is_whole = False

    def serving(self, layer: int) -> LayerWeights | None:
        """Weights by storage row in fast memory where all of them are there; None = see `fast`."""
        return self._views[layer] if self._is_whole else None

    def row_of_expert(self, layer: int, expert: int) -> int | None:
        """The storage row of an expert that this rank serves."""
        return self._row_of_expert[layer].get(expert)

    def parts_of(self, layer: int, row: int) -> dict[str, torch.Tensor]:
        """The parts of an expert in host memory, read from the checkpoint where it has none there."""
        return self._row(layer, row)

    def copy_to_fast(self, layer: int, row: int, target: int) -> None:
        """Copy an expert into a fast row; returns when it is there."""
        for _ in self.copy_in_pieces(layer, row, target, 1):
            pass

    def copy_in_pieces(self, layer: int, row: int, target: int, pieces: int) -> Iterator[float]:
        """Copy an expert into a fast row, a piece of all parts per turn; yields the share that is there.

        On a CPU it is one piece whatever is asked: an emulated link is slow by itself, and every turn takes the
        interpreter from the thread that computes.
        """
        pieces = 1 if self._stream is None else pieces
        self.pool.make_room(target, self.contents.expert_of_row[layer][row], self.weights[layer])
        rooms = {part: room.view(-1) for part, room in self.pool.row(target).items()}
        parts = {part: value.reshape(-1) for part, value in self.parts_of(layer, row).items()}
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self.pool.device))  # whoever still reads that row
        for piece in range(pieces):
            with torch.cuda.stream(self._stream):
                for part, value in parts.items():
                    here = slice(len(value) * piece // pieces, len(value) * (piece + 1) // pieces)
                    rooms[part][here].copy_(value[here], non_blocking=self._stream is not None)
            if self._stream is not None:
                self._stream.synchronize()
            yield (piece + 1) / pieces

    # What changes storage rows: fast memory must not go on with what was there.

    def write(self, layer: int, row: int, part: str, value: torch.Tensor) -> None:
        """See `ExpertStore`."""
        super().write(layer, row, part, value)
        self._forget(layer, row)

    def load(self, layer: int, row: int, expert: int, parts: Mapping[str, torch.Tensor]) -> None:
        """See `ExpertStore`."""
        if self._is_on_disk(layer, row):
            self.note(layer, row, expert)
        else:
            super().load(layer, row, expert, parts)

    def make_room(self, layer: int, row: int, expert: int) -> None:
        """See `ExpertStore`."""
        if self._is_on_disk(layer, row):
            self._expected[layer, row] = expert
        else:
            super().make_room(layer, row, expert)

    def note(self, layer: int, row: int, expert: int) -> None:
        """See `ExpertStore`."""
        if self._is_on_disk(layer, row):
            self.contents.fill(layer, row, expert, checksums(self._from_checkpoint(layer, expert).values()))
        else:
            super().note(layer, row, expert)
        self._forget(layer, row)

    def vacate(self, layer: int, row: int) -> None:
        """See `ExpertStore`; its place in fast memory is free for others."""
        if row < self._slots and row in self.fast.held[layer]:
            self.loader.drain()
            with self.loader.lock:
                self.fast.give_up(layer, row)
        if self._is_on_disk(layer, row):
            self.contents.clear(layer, row)
        else:
            super().vacate(layer, row)

    def exchange(self, layer: int, one: int, other: int) -> None:
        """See `ExpertStore`."""
        on_disk = [self._is_on_disk(layer, row) for row in (one, other)]
        if not any(on_disk):
            super().exchange(layer, one, other)
        else:
            if not all(on_disk):
                disk, real = (one, other) if on_disk[0] else (other, one)
                expert = self.contents.expert_of_row[layer][disk]
                if expert != NOTHING:
                    value = self._from_checkpoint(layer, expert)
                    self.make_room(layer, real, expert)
                    for part, target in self._row(layer, real).items():
                        target.copy_(value[part])
            self.contents.exchange(layer, one, other)
        for row in (one, other):
            self._forget(layer, row)

    def commit_table(self, row_of_slot: torch.Tensor) -> None:
        """See `ExpertStore`."""
        super().commit_table(row_of_slot)
        self._is_whole = False

    def _install_rows(self, row_of_slot: torch.Tensor) -> None:
        super()._install_rows(row_of_slot)
        self._rows = [table.to(self.pool.device) for table in self._rows]

    def resize(self, slots: int) -> None:
        """See `ExpertStore`."""
        self.loader.drain()
        host = min(slots, self.limits.host_slots) if self.limits.host_slots is not None else slots
        before, contents = self.row_of_slot[:, : min(slots, self._slots)].tolist(), self.contents
        self.contents = RowContents([slots + self.staging_rows] * len(self.weights), contents.parts)
        self.contents.reference = contents.reference
        for layer, rows in enumerate(before):
            old_weights, kept = self.weights[layer], self.weights[layer].rows
            fresh = old_weights.select_rows([], room=host)
            for row, old in enumerate(rows):
                expert = contents.expert_of_row[layer][old]
                if row < host and expert != NOTHING:
                    source = old_weights.row(old) if old < kept else self._from_checkpoint(layer, expert)
                    fresh.make_room(row, expert, fresh)
                    for part, target in fresh.row(row).items():
                        target.copy_(source[part])
                if (layer, old) in contents.sums:
                    self.contents.fill(layer, row, expert, contents.sums[layer, old])
            self.weights[layer] = fresh
        self._slots, self._is_whole = slots, False
        with self.loader.lock:
            self.fast.clear()
        self._install_rows(torch.arange(slots, device=self.row_of_slot.device).repeat(len(self.weights), 1))

    def _forget(self, layer: int, row: int) -> None:
        if row >= self._slots:  # staging: nothing is served from there
            return
        self.loader.drain()
        with self.loader.lock:
            self.fast.give_up(layer, row)
        self._is_whole = False

    def _is_on_disk(self, layer: int, row: int) -> bool:
        return self.host_rows(layer) <= row < self._slots

    def _row(self, layer: int, row: int) -> dict[str, torch.Tensor]:
        """See `ExpertStore`; of a row on disk, a copy."""
        if not self._is_on_disk(layer, row):
            return super()._row(layer, row)
        expert = self.contents.expert_of_row[layer][row]
        if expert == NOTHING:
            return self.weights[layer].blank(self._expected.get((layer, row), 0))
        return self._from_checkpoint(layer, expert)

    def _from_checkpoint(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        fitted = self.weights[layer].fitted(expert, self._read_expert(layer, expert))
        return {part: value.contiguous() for part, value in fitted.items()}
