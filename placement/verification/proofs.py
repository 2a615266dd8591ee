"""What a file's certificate proves: ranks and stayed tokens by layer, then traffic, imbalance and seconds.

Closed forms are computed here; a certificate can only raise what they say.

Shape letters: L MoE layers, R ranks, N nodes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.placement.verification.closed_forms import Parts, least_imbalance, least_ranks, most_stay
from moeplace.placement.verification.relaxed import (
    Frame,
    certified,
    connectivity_pieces,
    held_loads,
    stay_pieces,
    unpack,
)
from moeplace.placement.verification.replicated import certified_copies
from moeplace.placement.verification.statement import UNREADABLE, Statement, what_is_wrong
from moeplace.placement.verification.subsets import subset_pieces
from moeplace.profiling.errors import FormatError
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class Parted:
    """Bounds under one kind of parts: (L,) least parts per token, (L - 1,) most stayed tokens as a share of all."""

    d_L: np.ndarray
    stay_L: np.ndarray


class Prover:
    """Bounds of one statement on one trace.

    Args:
        statement: the problem.
        trace: the tokens that were fitted to.
        slots_R: (R,) slots of each rank in a layer (those of the placement, where layers share redundant slots).
    """

    def __init__(self, statement: Statement, trace: RoutingTrace, slots_R: np.ndarray) -> None:
        self.statement, self.trace = statement, trace
        self.layers = len(statement.experts_L)
        self.ids = [trace.layer(layer).astype(np.int64) for layer in range(self.layers)]
        self.slots_R = slots_R
        self.spare_L = int(self.slots_R.sum()) - statement.experts_L
        self.chained = statement.mode == "coherent" and trace.top_k == 1
        self.load_LE = np.zeros((self.layers, int(statement.experts_L.max())))
        for layer, ids_TK in enumerate(self.ids):
            self.load_LE[layer] = np.bincount(ids_TK[ids_TK >= 0], minlength=self.load_LE.shape[1])

    def imbalance(self) -> float:
        """Least mean imbalance."""
        return float(np.mean([self.layer_imbalance(layer) for layer in range(self.layers)]))

    def layer_imbalance(self, layer: int, work_E: np.ndarray | None = None) -> float:
        """Least busiest rank over the mean in a layer, of its loads or of other work per expert."""
        experts = int(self.statement.experts_L[layer])
        load_E = self.load_LE[layer, :experts] if work_E is None else work_E
        return least_imbalance(load_E, self.slots_R, self.statement.speed_R, whole=work_E is None)

    def parted(self, proofs: list[Any], *, nodes: bool) -> Parted:
        """The bounds under ranks or nodes; raised by the certificates of that kind.

        Raises:
            FormatError: a certificate cannot be read, or is for layers that do not exist.
        """
        used_L = np.array([(ids_TK >= 0).any(axis=1).mean() for ids_TK in self.ids])
        weights = [self.weight(layer) for layer in range(self.layers - 1)]
        stay_L = np.array([w.sum() for w in weights])
        parts = Parts.of(self.statement, self.slots_R, nodes=nodes)
        if self.statement.mode == "allgather" or parts.count == 1:
            return Parted(used_L, stay_L)
        if self.chained:
            for layer, weight in enumerate(weights):
                cap = self._cap(parts, layer, layer + 2, counted=True)
                stay_L[layer] = min(stay_L[layer], most_stay(weight, parts, self._spare(layer, 2), cap))
            d_L = used_L
        else:
            d_L = np.array([
                max(used_L[x], least_ranks(ids, int(self.statement.experts_L[x]), parts, int(self.spare_L[x]),
                                           self._cap(parts, x, x + 1)))
                for x, ids in enumerate(self.ids)
            ])  # fmt: skip
        for document in proofs:
            if not isinstance(document, dict):
                raise FormatError("a certificate must be a table")
            if bool(document.get("nodes")) == nodes:
                self._apply(document, parts, d_L, stay_L)
        return Parted(d_L, stay_L)

    def _spare(self, first: int, layers: int) -> int:
        return int(self.spare_L[first : first + layers].sum())

    def _cap(self, parts: Parts, first: int, end: int, *, counted: bool = False) -> float | None:
        """Most load of a part over the mean in these layers; None if any may be, or (`counted`) tokens are missing."""
        if self.statement.caps_L is None or self._spare(first, end - first):
            return None
        pairs = self.weight(first).sum() if counted else 0.0
        if counted and any(
            abs(self.load_LE[x].sum() / self.trace.num_tokens - pairs) > 1e-12 for x in range(first, end)
        ):
            return None
        return min(float(self.statement.caps_L[first:end].max()) * parts.fastest, parts.count)

    def weight(self, layer: int) -> np.ndarray:
        """(E, E) share of tokens by primary expert before and after the boundary behind a layer."""
        before, after = (int(e) for e in self.statement.experts_L[layer : layer + 2])
        one_T, two_T = self.ids[layer][:, 0], self.ids[layer + 1][:, 0]
        both = (one_T >= 0) & (two_T >= 0)
        pairs = np.bincount(one_T[both] * after + two_T[both], minlength=before * after)
        return pairs.reshape(before, after) / self.trace.num_tokens

    def _apply(self, document: Any, parts: Parts, d_L: np.ndarray, stay_L: np.ndarray) -> None:
        """Raise the bounds by one certificate."""
        try:
            first, width, kind = int(document["first"]), int(document["layers"]), str(document["kind"])
            if first < 0 or width < 1 or first + width > self.layers or (kind == "connectivity") == (width > 1):
                raise ValueError(f"layers {first} to {first + width - 1}")
        except UNREADABLE as error:
            raise FormatError(f"a certificate cannot be read: {what_is_wrong(error)}") from error
        span = slice(first, first + width)
        experts = int(self.statement.experts_L[first])
        if (self.statement.experts_L[span] != experts).any():
            raise FormatError("a certificate joins layers of different size")
        spare = self._spare(first, width)
        exact = parts.even and not spare
        caps = None if self.statement.caps_L is None or spare else self.statement.caps_L[span]
        scale = max(float(self.load_LE[first].sum()), 1.0)
        loads = held_loads(self.load_LE[span, :experts], caps, parts, exact, scale)
        frame = Frame(parts, experts, width, spare, loads)
        if kind == "connectivity":
            pieces = self._pieces(document, first, parts)
            if "seats" in document:
                found = certified_copies(document, parts, experts, spare, pieces)
            else:
                found = certified(document, frame, pieces)
            d_L[first] = max(d_L[first], found)
            return
        stayed = -certified(document, frame, stay_pieces([self.weight(first + x) for x in range(width - 1)]))
        boundaries = slice(first, first + width - 1)
        if stayed < stay_L[boundaries].sum():
            stay_L[boundaries] *= max(stayed, 0.0) / stay_L[boundaries].sum()

    def _pieces(self, document: Any, layer: int, parts: Parts) -> tuple[float, np.ndarray]:
        experts = int(self.statement.experts_L[layer])
        rows_UK, count_U = np.unique(np.sort(self.ids[layer], axis=1), axis=0, return_counts=True)
        share_U = count_U / self.trace.num_tokens
        try:
            kind = str(document.get("pieces", "inverse"))
            if kind not in ("inverse", "subsets"):
                raise ValueError(f"pieces {kind!r} are none of inverse, subsets")
            matrices = [unpack(text, experts, "u1") for text in document["z"]]
            if not matrices:
                raise ValueError("no matrix picks a minorant")
            if kind == "subsets":
                pieces = [subset_pieces(rows_UK, share_U, z, parts.capacity) for z in matrices]
            else:
                pieces = [connectivity_pieces(rows_UK, share_U, (z + 1 / 64) / 255.0, parts.capacity) for z in matrices]
        except UNREADABLE as error:
            raise FormatError(f"a certificate cannot be read: {what_is_wrong(error)}") from error
        return float(np.mean([a for a, _ in pieces])), np.mean([gain for _, gain in pieces], axis=0)
