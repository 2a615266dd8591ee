"""ExpertComputation: what this rank's experts make of token rows.

Shape letters: D hidden size, N token rows, K top-k, M assignments (token row, slot) of this rank.
"""

import torch

from moeplace.runtime.counters import Counters
from moeplace.runtime.experts.grouped import grouped_linear
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.weights import Activation, gated_silu


class ExpertComputation:
    """Computes with the experts of a store, and counts.

    Args:
        counters: where assignments, activated experts and seconds are counted.
        activation: from the first product of an expert to the input of the second.
    """

    def __init__(self, store: ExpertStore, *, counters: Counters, activation: Activation = gated_silu) -> None:
        self._store, self._counters, self._activation = store, counters, activation
        device = store.weights[0].gate_up.device
        # On a GPU the counts stay there until they are read: a copy to the host per layer would stop the pipeline.
        self._pending = (
            torch.zeros(len(store.weights), 2, dtype=torch.int64, device=device) if device.type == "cuda" else None
        )

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
        total = len(self._store.weights[layer].gate_up)
        storage, source = self._store.rows_of(layer)[slots_NK.reshape(-1)].sort(
            stable=True
        )  # absent ones sort to the end
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
        total = len(self._store.weights[layer].gate_up)
        storage_M, source_M = self._store.rows_of(layer)[slots_NK.reshape(-1)].sort(stable=True)
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
        weights = self._store.weights[layer]
        ends = counts.cumsum(0).to(torch.int32)
        hidden = grouped_linear(x_MD, weights.gate_up, ends)
        if weights.gate_up_bias is not None:
            hidden += weights.gate_up_bias[storage_M]
        out_MD = grouped_linear(self._activation(hidden), weights.down, ends)
        if weights.down_bias is not None:
            out_MD += weights.down_bias[storage_M]
        return out_MD
