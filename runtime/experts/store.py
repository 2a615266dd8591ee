"""ExpertStore: the expert weights of this rank and their computation.

    slot of this rank  --row_of_slot-->  storage row  -->  gate_up[row], down[row], biases[row]

Slots are what a placement talks about; storage rows hold weights. Behind the rows of each layer come staging rows,
which all layers share: weights are written there while the old ones serve. What is to serve is exchanged with the row
of what it replaces, and `commit` changes the slot table.

Shape letters: L MoE layers, C slots per rank, D hidden size, H expert hidden size, N token rows, K top-k, M
assignments (token row, slot) of this rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from moeplace.profiling.errors import InputError
from moeplace.runtime.counters import Counters
from moeplace.runtime.experts.row_contents import RowContents, checksums

Part = Literal["gate_up", "down", "gate_up_bias", "down_bias"]
Activation = Callable[[torch.Tensor], torch.Tensor]


_CHUNK = 1 << 20
"""Bytes that an exchange of rows copies at a time."""


def gated_silu(gate_up: torch.Tensor) -> torch.Tensor:
    """(M, 2H) gate then up -> (M, H): the activation of most MoE models."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """Weights of one MoE layer on one rank, by storage row.

    Attributes:
        gate_up: (rows, 2H, D), the gate first.
        down: (rows, D, H).
        gate_up_bias: (rows, 2H) or None.
        down_bias: (rows, D) or None.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, rows: int, hidden: int, expert_hidden: int, *, bias: bool, dtype: torch.dtype, device: str | torch.device
    ) -> "ExpertWeights":
        """Room for `rows` experts, uninitialised."""

        def room(*shape: int) -> torch.Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        biases = (room(2 * expert_hidden), room(hidden)) if bias else (None, None)
        return cls(room(2 * expert_hidden, hidden), room(hidden, expert_hidden), *biases)

    def select_rows(self, rows: list[int], *, room: int) -> "ExpertWeights":
        """New room for `room` experts, the first of which are those of `rows`."""

        def select(tensor: torch.Tensor) -> torch.Tensor:
            selected = tensor.new_empty(room, *tensor.shape[1:])
            selected[: len(rows)] = tensor[rows]
            return selected

        parts = {name: select(tensor) for name, tensor in self.parts().items()}
        return ExpertWeights(**parts)

    def parts(self) -> dict[Part, torch.Tensor]:
        """The tensors that exist, by name."""
        named = {
            "gate_up": self.gate_up,
            "down": self.down,
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}  # type: ignore[misc]


class ExpertStore:
    """All experts of this rank.

    Attributes:
        weights: per MoE layer.
        row_of_slot: (L, C) int64, storage row of each slot.
        contents: which expert each row holds, as far as `load` and migrations put it there.
        is_migrating: whether a migration is under way.
        staging: rows for experts of any layer; row number s has the index `rows of the layer + s` in each.
        activation: from gate_up to the input of down.
    """

    def __init__(
        self,
        weights: list[ExpertWeights],
        *,
        slots: int,
        counters: Counters,
        activation: Activation = gated_silu,
        staging: ExpertWeights | None = None,
    ) -> None:
        for layer, layer_weights in enumerate(weights):
            if len(layer_weights.gate_up) < slots:
                raise InputError(
                    f"MoE layer {layer} has {len(layer_weights.gate_up)} expert rows, which must be at least its "
                    f"{slots} slots"
                )
        self.weights = weights
        self.activation = activation
        self.staging = weights[0].select_rows([], room=0) if staging is None else staging
        self.contents = RowContents([len(layer_weights.gate_up) + self.staging_rows for layer_weights in weights])
        self.is_migrating = False
        device = weights[0].gate_up.device
        self._install_rows(torch.arange(slots, device=device).repeat(len(weights), 1))
        self._counters = counters
        # On a GPU the counts stay there until they are read: a copy to the host per layer would stop the pipeline.
        self._pending = (
            torch.zeros(len(weights), 2, dtype=torch.int64, device=device) if device.type == "cuda" else None
        )

    def write(self, layer: int, row: int, part: Part, value: torch.Tensor) -> None:
        """Copy one part of one expert into a storage row (of a slot while loading, of staging while serving)."""
        target = self._row(layer, row)[part]
        if target.shape != value.shape:
            raise InputError(f"{part} of an expert has shape {tuple(value.shape)}, not {tuple(target.shape)}")
        target.copy_(value)

    def load(self, layer: int, row: int, expert: int, parts: Mapping[Part, torch.Tensor]) -> None:
        """Copy all parts of an expert into a storage row, and note its checksums."""
        for part, value in parts.items():
            self.write(layer, row, part, value)
        self.note(layer, row, expert)

    def note(self, layer: int, row: int, expert: int) -> None:
        """Take the checksums of a row that holds all of an expert now."""
        self.contents.fill(layer, row, expert, checksums(self._row(layer, row)))

    def row_bytes(self, layer: int, row: int) -> list[torch.Tensor]:
        """The bytes of a storage row, uint8 views of its parts one after the other."""
        return [tensor.view(-1).view(torch.uint8) for tensor in self._row(layer, row).values()]

    def expert_bytes(self, layer: int) -> int:
        """Bytes of an expert of a layer."""
        return sum(tensor[0].numel() * tensor.element_size() for tensor in self.weights[layer].parts().values())

    def read(self, layer: int, slot: int) -> dict[Part, torch.Tensor]:
        """Views of the parts of the expert in a slot."""
        return self._row(layer, int(self.row_of_slot[layer, slot]))

    @property
    def staging_rows(self) -> int:
        """How many experts, of whatever layers, staging holds."""
        return len(self.staging.gate_up)

    def num_rows(self, layer: int) -> int:
        """Storage rows of a layer, without staging."""
        return len(self.weights[layer].gate_up)

    def exchange(self, layer: int, one: int, other: int) -> None:
        """Let the experts in two rows of a layer, of which one may be staging, change places; the slots stay."""
        pairs = zip(self.row_bytes(layer, one), self.row_bytes(layer, other), strict=True)
        for ours, theirs in pairs:
            for start in range(0, len(ours), _CHUNK):
                piece = slice(start, start + _CHUNK)
                kept = ours[piece].clone()
                ours[piece] = theirs[piece]
                theirs[piece] = kept
        self.contents.exchange(layer, one, other)

    def _row(self, layer: int, row: int) -> dict[Part, torch.Tensor]:
        """Views of the parts in a storage row."""
        rows = self.num_rows(layer)
        weights, index = (self.weights[layer], row) if row < rows else (self.staging, row - rows)
        return {part: tensor[index] for part, tensor in weights.parts().items()}

    def free_rows(self, layer: int) -> list[int]:
        """Storage rows of a layer that no slot uses."""
        used = set(self.row_of_slot[layer].tolist())
        return [row for row in range(self.num_rows(layer)) if row not in used]

    def commit(self, layer: int, rows: dict[int, int]) -> None:
        """Let slots of a layer use other storage rows: slot -> row. Takes effect with the next `compute`."""
        table = self.row_of_slot.clone()
        for slot, row in rows.items():
            table[layer, slot] = row
        self.commit_table(table)

    def commit_table(self, row_of_slot: torch.Tensor) -> None:
        """Let all slots of all layers use other storage rows, (L, C) int64. Takes effect with the next `compute`.

        The table is kept, not copied: a computation in flight keeps the one before.
        """
        for layer, used in enumerate(row_of_slot.tolist()):
            if len(set(used)) != len(used):
                raise InputError(f"two slots of MoE layer {layer} would share a storage row: {used}")
        self._install_rows(row_of_slot)

    def _install_rows(self, row_of_slot: torch.Tensor) -> None:
        """Derive per layer the table for look-ups: its last entry, that of slot -1, is a row beyond all others."""
        self.row_of_slot = row_of_slot
        beyond = [len(layer_weights.gate_up) for layer_weights in self.weights]
        self._rows = [
            torch.cat([table, table.new_tensor([row])]) for table, row in zip(row_of_slot, beyond, strict=True)
        ]

    def resize(self, slots: int) -> None:
        """Hold more or fewer slots per layer, layer by layer; what is beyond the new number, or staged, is dropped.

        Beyond the rows themselves this takes the memory of one layer, while its rows are copied.
        """
        kept = min(slots, self.row_of_slot.shape[1])
        before, contents = self.row_of_slot[:, :kept].tolist(), self.contents
        self.contents = RowContents([slots + self.staging_rows] * len(self.weights))
        self.contents.reference = contents.reference
        for layer, rows in enumerate(before):
            self.weights[layer] = self.weights[layer].select_rows(rows, room=slots)
            for row, old in enumerate(rows):
                if (layer, old) in contents.sums:
                    expert = contents.expert_of_row[layer][old]
                    self.contents.fill(layer, row, expert, contents.sums[layer, old])
        self._install_rows(torch.arange(slots, device=self.row_of_slot.device).repeat(len(self.weights), 1))

    def compute(self, layer: int, x: torch.Tensor, slots: torch.Tensor, gate_weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum over this rank's experts, for every row.

        Args:
            layer: MoE layer.
            x: (N, D) normalised hidden rows.
            slots: (N, K) int64 slots of this rank, -1 = not here.
            gate_weights: (N, K) weights of the sum.

        Returns:
            (N, D) of x's type: partial sums; zero rows where no slot is here.
        """
        compute = self._compute_present if x.device.type == "cpu" else self._compute_all
        with self._counters.timed("experts"):
            return compute(layer, x, slots, gate_weights)

    def flush_counts(self) -> None:
        """Bring counts that wait on the GPU to the counters."""
        if self._pending is not None:
            for layer, (tokens, activated) in enumerate(self._pending.tolist()):
                self._counters.tokens[layer] += tokens
                self._counters.activated[layer] += activated
            self._pending.zero_()

    def _compute_present(
        self, layer: int, x_ND: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        """On the CPU, where sizes are free to read: only the assignments that exist are touched."""
        rows, top_k = slots_NK.shape
        total = len(self.weights[layer].gate_up)
        storage, source = self._rows[layer][slots_NK.reshape(-1)].sort(stable=True)  # absent ones sort to the end
        counts = torch.bincount(storage, minlength=total + 1)
        sizes: list[int] = counts.tolist()
        present = rows * top_k - sizes[total]
        if not present:
            return torch.zeros_like(x_ND)
        self._counters.tokens[layer] += present
        self._counters.activated[layer] += sum(map(bool, sizes[:total]))
        source_M = source[:present]  # index into (N, K), grouped by storage row
        x_MD = x_ND.index_select(0, source_M if top_k == 1 else source_M // top_k)
        out_MD = self._apply(layer, x_MD, storage[:present], counts[:total])
        out_MD = out_MD * weights_NK.reshape(-1, 1).index_select(0, source_M)
        room = torch.empty if present == rows * top_k else torch.zeros
        sum_ND = room(rows * top_k, x_ND.shape[1], dtype=out_MD.dtype).index_copy_(0, source_M, out_MD)
        if top_k > 1:
            sum_ND = sum_ND.view(rows, top_k, x_ND.shape[1]).sum(1)
        return sum_ND.to(x_ND.dtype)

    def _compute_all(
        self, layer: int, x_ND: torch.Tensor, slots_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        """On a GPU: fixed shapes and no copy to the host; absent assignments sort to the end and are masked."""
        rows, top_k = slots_NK.shape
        total = len(self.weights[layer].gate_up)
        storage_M, source_M = self._rows[layer][slots_NK.reshape(-1)].sort(stable=True)
        ones = torch.ones_like(storage_M)
        counts = torch.zeros(total + 1, dtype=torch.int64, device=x_ND.device).scatter_add_(0, storage_M, ones)[:total]
        if self._pending is not None:
            self._pending[layer] += torch.stack([counts.sum(), counts.count_nonzero()])
        absent_M = (storage_M == total)[:, None]
        x_MD = x_ND[source_M // top_k].masked_fill(absent_M, 0)
        out_MD = self._apply(layer, x_MD, storage_M.clamp(max=total - 1), counts)
        out_MD = (out_MD * weights_NK.reshape(-1)[source_M, None]).masked_fill(absent_M, 0)
        sum_ND = torch.empty_like(out_MD)
        sum_ND[source_M] = out_MD
        return sum_ND.view(rows, top_k, x_ND.shape[1]).sum(1).to(x_ND.dtype)

    def _apply(self, layer: int, x_MD: torch.Tensor, storage_M: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        weights = self.weights[layer]
        ends = counts.cumsum(0).to(torch.int32)
        hidden = grouped_linear(x_MD, weights.gate_up, ends)
        if weights.gate_up_bias is not None:
            hidden += weights.gate_up_bias[storage_M]
        out_MD = grouped_linear(self.activation(hidden), weights.down, ends)
        if weights.down_bias is not None:
            out_MD += weights.down_bias[storage_M]
        return out_MD


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
