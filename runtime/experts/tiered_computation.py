"""TieredComputation: what this rank's experts make of token rows where fast memory does not hold them all.

In a layer: what waits for it is cancelled; missing experts are asked for, most rows first; the next layers' gates are
asked who comes next; experts that are there are computed, then each as it comes, and while nothing has come the host
computes those that it ends sooner than their load would. All of them are exact: the same weights, wherever they were.

Shape letters: D hidden size, N token rows, K top-k, M assignments (token row, slot) of this rank.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from moeplace.runtime.counters import Counters
from moeplace.runtime.experts.computation import ExpertComputation
from moeplace.runtime.experts.grouped import Groups
from moeplace.runtime.experts.loader import Load
from moeplace.runtime.experts.tiered_store import TieredStore
from moeplace.runtime.experts.weights import Activation, LayerWeights, gated_silu

Foresee = Callable[[int, torch.Tensor], torch.Tensor]
"""(MoE layer, (N, D) input of an earlier layer's experts) -> (N, K) expert ids that its gate chooses for them."""

_NEWEST = 0.1
"""Weight of the newest measurement in the running means of what loads and hosts take."""


class Segment(NamedTuple):
    """The assignments of one expert."""

    row: int
    """Storage row."""
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Pace:
    """Running means of what was measured: seconds of a row on the host, of an expert on the device."""

    def __init__(self) -> None:
        self.host_row, self.device = 0.0, 0.0

    def note(self, name: str, seconds: float) -> None:
        before = getattr(self, name)
        setattr(self, name, seconds if not before else before + _NEWEST * (seconds - before))


class TieredComputation(ExpertComputation):
    """See the module.

    Attributes:
        foresee: None = nothing is fetched ahead.
    """

    def __init__(self, store: TieredStore, *, counters: Counters, activation: Activation = gated_silu) -> None:
        super().__init__(store, counters=counters, activation=activation)
        self._tiered, self._pace = store, _Pace()
        self._last_layer = -1
        if store.pool.device.type == "cuda":  # for passes with everything in fast memory
            self._pending = torch.zeros(len(store.weights), 2, dtype=torch.int64, device=store.pool.device)
        self.foresee: Foresee | None = None
        self._named: dict[int, set[int]] = {}  # layer -> storage rows that its gate named ahead, in this pass

    @property
    def device_seconds(self) -> float:
        """Running mean of the seconds of one expert in fast memory."""
        return self._pace.device

    @property
    def looks_ahead(self) -> bool:
        """Whether the limits ask for a predictor."""
        return self._tiered.limits.look_ahead > 0

    def compute(self, layer: int, x: torch.Tensor, slots: torch.Tensor, gate_weights: torch.Tensor) -> torch.Tensor:
        """See `ExpertComputation`."""
        if self._tiered.serving(layer) is not None:
            return super().compute(layer, x, slots, gate_weights)
        with self._counters.timed("experts"):
            return self._compute_tiered(layer, x, slots.cpu().numpy(), gate_weights)

    def compute_on_host(
        self, layer: int, x: torch.Tensor, slots: np.ndarray, gate_weights: torch.Tensor
    ) -> torch.Tensor:
        """See `ExpertComputation`."""
        if self._tiered.serving(layer) is not None:
            return super().compute_on_host(layer, x, slots, gate_weights)
        with self._counters.timed("experts"):
            return self._compute_tiered(layer, x, slots, gate_weights)

    def _compute_tiered(
        self, layer: int, x_ND: torch.Tensor, slots_NK: np.ndarray, weights_NK: torch.Tensor
    ) -> torch.Tensor:
        self._begin(layer)
        rows, top_k = slots_NK.shape
        segments, order_M = self._segments(layer, slots_NK)
        source_M = torch.from_numpy(order_M).to(x_ND.device)
        x_MD = x_ND.index_select(0, source_M if top_k == 1 else source_M // top_k)
        gate_M = weights_NK.reshape(-1).index_select(0, source_M)
        out_MD = torch.empty_like(x_MD)
        self._run(layer, segments, x_ND, x_MD, out_MD, gate_M)
        out_MD = out_MD * gate_M[:, None]
        sum_ND = torch.zeros(rows * top_k, x_ND.shape[1], dtype=out_MD.dtype, device=x_ND.device)
        sum_ND.index_copy_(0, source_M, out_MD)
        return sum_ND.view(rows, top_k, x_ND.shape[1]).sum(1).to(x_ND.dtype)

    def _begin(self, layer: int) -> None:
        if layer <= self._last_layer:  # another pass
            self._named.clear()
            self._tiered.fast.step += 1
            with self._tiered.loader.lock:
                self._tiered.fast.sweep()
        self._last_layer = layer

    def _segments(self, layer: int, slots_NK: np.ndarray) -> tuple[list[Segment], np.ndarray]:
        """The experts that are asked for, and (M,) where their assignments stand in (N, K), expert by expert."""
        storage = self._tiered.row_table(layer)[slots_NK.reshape(-1)]
        groups = Groups.of(storage, self._tiered.num_rows(layer))
        segments, start = [], 0
        for row in np.flatnonzero(groups.sizes).tolist():
            segments.append(Segment(row, start, start + int(groups.sizes[row])))
            start = segments[-1].stop
        self._counters.tokens[layer] += start
        self._counters.activated[layer] += len(segments)
        return segments, groups.order[:start]

    def _run(
        self,
        layer: int,
        segments: list[Segment],
        x_ND: torch.Tensor,
        x_MD: torch.Tensor,
        out_MD: torch.Tensor,
        gate_M: torch.Tensor,
    ) -> None:
        """Fill `out_MD`, expert by expert, each as soon as its weights are at hand."""
        fast, loader = self._tiered.fast, self._tiered.loader
        needed = {segment.row for segment in segments}
        computed: list[int] = []

        def finish(segment: Segment, target: int) -> None:
            piece = slice(segment.start, segment.stop)
            began = time.perf_counter()
            out_MD[piece] = self._one_expert(x_MD[piece], self._tiered.pool, target)
            self._pace.note("device", time.perf_counter() - began)
            computed.append(segment.row)
            with loader.lock:
                held = fast.held[layer].get(segment.row)
                if held is not None and held.in_transit:  # its row is free for the next one
                    fast.give_up(layer, segment.row)

        named = self._named.pop(layer, None)
        if named is not None:
            self._counters.experts_foreseen["asked"] += len(needed)
            self._counters.experts_foreseen["named"] += len(needed & named)
        with loader.lock:
            loader.cancel(layer)
            loader.drop(fast.learn_truth(layer, needed - self._sooner_on_host(layer, segments)))
            there, late, missing = self._sort_out(layer, segments)
        missing.sort(key=lambda segment: (-segment.size, segment.row))
        on_host = self._choose_for_host(layer, missing, [segment for segment, _ in late])
        waiting = deque(missing[: len(missing) - len(on_host)])
        coming = deque(late)
        self._count("loaded", len(waiting))
        self._ask(layer, waiting, coming, needed, computed)
        self._look_ahead(layer, x_ND)
        for segment, target in there:
            finish(segment, target)
        self._ask(layer, waiting, coming, needed, computed)
        while coming or waiting or on_host:
            if coming and (not on_host or coming[0][1].done.is_set()):
                segment, load = coming.popleft()
                load.done.wait()
                self._check(load)
                assert load.target is not None
                finish(segment, load.target)
                self._ask(layer, waiting, coming, needed, computed)
            elif on_host:
                self._on_host(layer, on_host.pop(), x_MD, out_MD)
            else:
                with loader.lock:
                    blocking = fast.on_its_way(layer)  # fetched in vain, into the row that is wanted
                if blocking is not None:
                    blocking.done.wait()
                self._ask(layer, waiting, coming, needed, computed)
                assert coming, "no row for an expert that is asked for"
        self._leave(layer, segments, gate_M)

    def _sort_out(
        self, layer: int, segments: list[Segment]
    ) -> tuple[list[tuple[Segment, int]], list[tuple[Segment, Load]], list[Segment]]:
        """What is there, what is on its way, what is missing; the loader's lock is held."""
        fast = self._tiered.fast
        there: list[tuple[Segment, int]] = []
        late: list[tuple[Segment, Load]] = []
        missing = []
        for segment in segments:
            held = fast.held[layer].get(segment.row)
            if held is None:
                missing.append(segment)
            elif held.load is not None and not held.has_come:
                held.fresh = True  # nobody takes its row before it is used
                late.append((segment, held.load))
                self._count("late", 1)
            else:
                if held.load is not None:
                    self._check(held.load)
                there.append((segment, held.target))
                pinned = segment.row in fast.pinned[layer]
                self._count("resident" if pinned else "prefetched" if held.fresh else "cached", 1)
        return there, late, missing

    def _sooner_on_host(self, layer: int, segments: list[Segment]) -> set[int]:
        """Storage rows on their way that the host would have computed before they come; the loader's lock is held."""
        if not self._tiered.limits.host_computes:
            return set()
        fast, now = self._tiered.fast, time.perf_counter()
        sooner = set()
        for segment in segments:
            held = fast.held[layer].get(segment.row)
            if held is None or held.has_come or segment.row >= self._tiered.host_rows(layer):
                continue
            began = now if held.load is None or held.load.began is None else held.load.began
            if now + self._pace.host_row * segment.size < began + self._load_seconds(layer, segment.row):
                sooner.add(segment.row)
        return sooner

    def _choose_for_host(self, layer: int, missing: list[Segment], late: list[Segment]) -> list[Segment]:
        """Of the missing ones, from the fewest rows on, those that the host ends before their load would (HybriMoE)."""
        pace = self._pace
        if not self._tiered.limits.host_computes:
            return []
        chosen: list[Segment] = []
        host_end, load_end = 0.0, sum(self._load_seconds(layer, segment.row) for segment in (*late, *missing))
        for segment in reversed(missing):
            if segment.row >= self._tiered.host_rows(layer):
                break
            host_end += pace.host_row * segment.size
            if host_end >= load_end + pace.device:
                break
            chosen.append(segment)
            load_end -= self._load_seconds(layer, segment.row)
        return chosen[::-1]

    def _load_seconds(self, layer: int, row: int) -> float:
        """What a load takes: by the mean so far of a byte, at least what the emulated link takes."""
        loader, size = self._tiered.loader, self._tiered.bytes_in_row(layer, row)
        measured = loader.seconds / loader.bytes * size if loader.bytes else 0.0
        return max(measured, self._tiered.limits.least_seconds(size))

    def _ask(
        self,
        layer: int,
        waiting: "deque[Segment]",
        coming: "deque[tuple[Segment, Load]]",
        needed: set[int],
        computed: list[int],
    ) -> None:
        """Ask for what waits, as far as there are rows."""
        loader = self._tiered.loader
        while waiting:
            load = Load(layer, waiting[0].row)
            with loader.lock:
                if not self._tiered.fast.take(load, needed=needed, computed=computed):
                    return
                loader.ask(load)
            coming.append((waiting.popleft(), load))
            self._counters.bytes_loaded += self._tiered.bytes_in_row(layer, load.row)

    def _look_ahead(self, layer: int, x_ND: torch.Tensor) -> None:
        """Let the next layers' gates say whom they will choose, and have those fetched, most rows first."""
        if self.foresee is None or not len(x_ND):
            return
        store = self._tiered
        layers = len(store.weights)
        for ahead in range(layer + 1, min(layer + 1 + store.limits.look_ahead, layers)):
            ids = self.foresee(ahead, x_ND).reshape(-1)
            counts = torch.bincount(ids[ids >= 0])
            order = counts.argsort(descending=True, stable=True)
            named = order[counts[order] > 0].tolist()
            rows = [row for expert in named if (row := store.row_of_expert(ahead, expert)) is not None]
            self._named[ahead] = set(rows)
            with store.loader.lock:
                store.loader.cancel(ahead)  # what gates farther away had said
                for row in rows:
                    if row not in store.fast.held[ahead]:
                        store.loader.ask_ahead(Load(ahead, row))

    def _on_host(self, layer: int, segment: Segment, x_MD: torch.Tensor, out_MD: torch.Tensor) -> None:
        piece = slice(segment.start, segment.stop)
        began = time.perf_counter()
        out = self._one_expert(x_MD[piece].cpu(), self._tiered.weights[layer], segment.row)
        out_MD[piece] = out.to(out_MD.device)
        self._pace.note("host_row", (time.perf_counter() - began) / segment.size)
        self._count("host", 1)

    def _one_expert(self, x: torch.Tensor, weights: LayerWeights, row: int) -> torch.Tensor:
        hidden = F.linear(x, *weights.matrix("gate_up", row, x.dtype))
        return F.linear(self._activation(hidden), *weights.matrix("down", row, x.dtype))

    def _leave(self, layer: int, segments: list[Segment], gate_M: torch.Tensor) -> None:
        """Let the policy know who was used, and free what the layer had for transit."""
        store = self._tiered
        # Sums of gate weights are read only where they count: on a GPU that waits for the layer.
        weigh = store.limits.policy in ("score", "lookahead")
        with store.loader.lock:
            for segment in segments:
                weight = float(gate_M[segment.start : segment.stop].sum()) if weigh else float(segment.size)
                store.fast.note_use(layer, segment.row, weight)
            store.fast.leave(layer)
            store.loader.retry()

    def _count(self, found: str, number: int) -> None:
        if number:
            self._counters.experts_found[found] += number

    @staticmethod
    def _check(load: Load) -> None:
        if load.error is not None:
            raise load.error
