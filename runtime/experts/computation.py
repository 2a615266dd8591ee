"""ExpertComputation: what this rank's experts make of token rows.

Shape letters: D hidden size, N token rows, K top-k, A = N K assignments (token row, slot), M those of this rank.
"""

from collections.abc import Callable

import numpy as np
import torch

from moeplace.runtime.counters import Counters
from moeplace.runtime.experts.grouped import Groups
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.weights import Activation, LayerWeights, gated_silu

Observer = Callable[[int, torch.Tensor, np.ndarray, torch.Tensor, Activation], None]
"""(layer, (N, D) rows, (N, K) slots, (N, K) gate weights, activation)."""


class ExpertComputation:
    """Computes with the experts of a store, and counts.

    Args:
        counters: where assignments, activated experts and seconds are counted.
        activation: from the first product of an expert to the input of the second.

    Attributes:
        observer: called with what experts on the CPU are given, before they compute; None = nobody.
    """

    def __init__(self, store: ExpertStore, *, counters: Counters, activation: Activation = gated_silu) -> None:
        self._store, self._counters, self._activation = store, counters, activation
        self.observer: Observer | None = None
        device = store.weights[0].device
        # On a GPU the counts stay there until they are read: a copy to the host per layer would stop the pipeline.
        self._pending = (
            torch.zeros(len(store.weights), 2, dtype=torch.int64, device=device) if device.type == "cuda" else None
        )
        self._tentative: torch.Tensor | None = None  # of a step in fixed shapes, which may be dropped

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
        with self._counters.timed("experts"):
            if x.device.type == "cpu":
                return self._compute_present(layer, x, slots.numpy(), gate_weights)
            return self._compute_all(layer, x, slots, gate_weights, self._pending)

    def compute_on_host(
        self, layer: int, x: torch.Tensor, slots: np.ndarray, gate_weights: torch.Tensor
    ) -> torch.Tensor:
        """`compute` for rows on the CPU, whose slots are numbers of this process already."""
        with self._counters.timed("experts"):
            return self._compute_present(layer, x, slots, gate_weights)

    def compute_fixed(
        self, layer: int, x: torch.Tensor, slots: torch.Tensor, gate_weights: torch.Tensor
    ) -> torch.Tensor:
        """`compute` that reads nothing on the host, on any device; what it counts waits for `keep_counts`."""
        with self._counters.timed("experts"):
            if self._tentative is None:
                with torch.inference_mode(False):  # else it could not be changed outside of it
                    self._tentative = torch.zeros(len(self._store.weights), 2, dtype=torch.int64, device=x.device)
            return self._compute_all(layer, x, slots, gate_weights, self._tentative)

    def keep_counts(self) -> None:
        """The step in fixed shapes stands."""
        if self._tentative is not None:
            if self._pending is None:
                with torch.inference_mode(False):
                    self._pending = torch.zeros_like(self._tentative)
            self._pending += self._tentative
            self._tentative.zero_()

    def drop_counts(self) -> None:
        """The step in fixed shapes is run again in another form."""
        if self._tentative is not None:
            self._tentative.zero_()

    def count_in(self, counters: Counters) -> None:
        """Count there from now on; what waits on a GPU is of before."""
        self.flush_counts()
        self._counters = counters

    def flush_counts(self) -> None:
        """Bring counts that wait on the GPU to the counters."""
        if self._pending is not None:
            for layer, (tokens, activated) in enumerate(self._pending.tolist()):
                self._counters.tokens[layer] += tokens
                self._counters.activated[layer] += activated
            self._pending.zero_()

    def _compute_present(
        self, layer: int, x_ND: torch.Tensor, slots_NK: np.ndarray, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        """On the CPU, where sizes are free to read: only the assignments that exist are touched. What is reckoned with
        slots is numpy's, which takes a fraction of the calls of small tensors."""
        if self.observer is not None:
            self.observer(layer, x_ND, slots_NK, weights_NK, self._activation)
        rows, top_k = slots_NK.shape
        weights = self._weights(layer)
        storage_A = self._store.row_table(layer)[slots_NK.reshape(-1)]  # A = N * K, row after row
        groups = Groups.of(storage_A, weights.rows)
        if not groups.present:
            return torch.zeros_like(x_ND)
        self._counters.tokens[layer] += groups.present
        self._counters.activated[layer] += groups.active
        form = self._apply_padded if weights.suits_padding(groups) else self._apply_in_order
        out_AD = form(layer, x_ND, top_k, groups)
        out_NKD = out_AD.view(rows, top_k, -1) * weights_NK.unsqueeze(-1)
        if groups.present < len(storage_A):
            out_NKD.masked_fill_(torch.from_numpy(slots_NK < 0).unsqueeze(-1), 0)
        return (out_NKD.squeeze(1) if top_k == 1 else out_NKD.sum(1)).to(x_ND.dtype)

    def _apply_in_order(self, layer: int, x_ND: torch.Tensor, top_k: int, groups: Groups) -> torch.Tensor:
        """(A, D) of each assignment, those of an expert one after the other; absent ones are zero."""
        order_M = groups.order[: groups.present]
        x_MD = x_ND.index_select(0, torch.from_numpy(order_M // top_k))
        out_MD = self._apply(layer, x_MD, torch.from_numpy(groups.storage_of_order()), groups.sizes)
        room = torch.empty if groups.present == len(groups.order) else torch.zeros
        out_AD = room(len(groups.order), x_ND.shape[1], dtype=out_MD.dtype)
        return out_AD.index_copy_(0, torch.from_numpy(order_M), out_MD)

    def _apply_padded(self, layer: int, x_ND: torch.Tensor, top_k: int, groups: Groups) -> torch.Tensor:
        """(A, D) of each assignment by two batched products, of as many rows for every expert; absent ones have those
        of another."""
        weights, (source, place) = self._weights(layer), groups.padding()
        x = x_ND.index_select(0, torch.from_numpy(source // top_k)).view(weights.rows, -1, x_ND.shape[1])
        out = weights.padded("down", self._activation(weights.padded("gate_up", x)))
        return out.flatten(0, 1).index_select(0, torch.from_numpy(place))

    def _compute_all(
        self,
        layer: int,
        x_ND: torch.Tensor,
        slots_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        counted: torch.Tensor | None,
    ) -> torch.Tensor:
        """On a GPU: fixed shapes and no copy to the host; absent assignments sort to the end and are masked."""
        rows, top_k = slots_NK.shape
        total = self._store.num_rows(layer)
        storage_M, source_M = self._store.rows_of(layer)[slots_NK.reshape(-1)].sort(stable=True)
        ones = torch.ones_like(storage_M)
        counts = torch.zeros(total + 1, dtype=torch.int64, device=x_ND.device).scatter_add_(0, storage_M, ones)[:total]
        if counted is not None:
            counted[layer] += torch.stack([counts.sum(), counts.count_nonzero()])
        absent_M = (storage_M == total)[:, None]
        x_MD = x_ND[source_M // top_k].masked_fill(absent_M, 0)
        out_MD = self._apply(layer, x_MD, storage_M.clamp(max=total - 1), counts.cumsum(0).to(torch.int32))
        out_MD = (out_MD * weights_NK.reshape(-1)[source_M, None]).masked_fill(absent_M, 0)
        sum_ND = torch.empty_like(out_MD)
        sum_ND[source_M] = out_MD
        return sum_ND.view(rows, top_k, x_ND.shape[1]).sum(1).to(x_ND.dtype)

    def _apply(
        self, layer: int, x_MD: torch.Tensor, storage_M: torch.Tensor, groups: torch.Tensor | np.ndarray
    ) -> torch.Tensor:
        """`groups`: sizes on the host, or ends on the device."""
        weights = self._weights(layer)
        hidden = weights.linear("gate_up", x_MD, storage_M, groups)
        return weights.linear("down", self._activation(hidden), storage_M, groups)

    def _weights(self, layer: int) -> LayerWeights:
        weights = self._store.serving(layer)
        assert weights is not None, "experts in several memories are computed one by one"
        return weights
