"""Replay: recorded routing on a running system. Tokens are real tensors and travel through the runtime's dispatchers.

A step is one decode pass of a batch: per MoE layer each token's K/V (elements of its hidden state) are stored, then it
goes through the dispatcher to the experts that the trace names. Attention and the dense layers are left out, in every
mode alike.
In coherent mode K/V go to all ranks and the chosen tokens' names home. All layers share
one set of experts, which every rank holds whole: outputs of different placements and modes can be compared.

Shape letters: S steps, L MoE layers, B tokens per step, K top-k, D hidden size, H expert hidden size, c K/V elements
per token and layer, R ranks, E experts.
"""

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
import torch

from moeplace.placement.cost.steps import step_of_token
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.dispatcher import MoeRuntime, Step, TokenRows
from moeplace.runtime.exchange.factory import make_dispatcher
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.exchange.row_layout import RowLayout
from moeplace.runtime.exchange.running_load import RunningLoad
from moeplace.runtime.exchange.slot_tables import SlotTables
from moeplace.runtime.experts.computation import ExpertComputation
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.weights import ExpertWeights
from moeplace.runtime.kv.exchange import SharedKv
from moeplace.runtime.kv.stream import KvStream
from moeplace.runtime.measure.traffic import WireSizes, even_homes


@dataclass(frozen=True)
class ReplayShape:
    """Sizes of a replay.

    Attributes:
        batch: B.
        hidden: D.
        expert_hidden: H.
        kv_dim: c.
        dtype: of everything that travels or is computed.
    """

    batch: int = 256
    hidden: int = 2048
    expert_hidden: int = 64
    kv_dim: int = 576
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("batch", "hidden", "expert_hidden", "kv_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} ({getattr(self, name)}) must be at least 1")

    @property
    def expert_bytes(self) -> int:
        """Of one expert's three matrices."""
        return 3 * self.hidden * self.expert_hidden * self.dtype.itemsize

    def wire_sizes(self, top_k: int) -> WireSizes:
        """Bytes of what travels."""
        row = RowLayout.of(slots=(torch.int32, top_k), weights=(self.dtype, top_k), x=(self.dtype, self.hidden))
        kv_row = RowLayout.of(kv=(self.dtype, self.kv_dim))
        return WireSizes(row.row_bytes, self.hidden * self.dtype.itemsize, kv_row.row_bytes)


@dataclass(frozen=True, eq=False)
class RecordedSteps:
    """Routing of steps.

    Attributes:
        ids_SLBK: (S, L, B, K) int64 expert ids, -1 = none.
        num_experts: E.
    """

    ids_SLBK: np.ndarray
    num_experts: int

    @classmethod
    def from_trace(cls, trace: RoutingTrace, batch: int) -> Self:
        """Full steps of `batch` tokens, formed from lanes as `evaluate` forms them.

        Raises:
            InputError: the trace has fewer tokens than a batch.
        """
        if trace.num_tokens < batch:
            raise InputError(f"a step takes {batch} tokens, but the trace has {trace.num_tokens} on this side")
        step_T = step_of_token(trace.num_tokens, batch)
        index = np.argsort(step_T, kind="stable")[(step_T < 0).sum() :].reshape(-1, batch)  # (S, B): lanes in order
        layers = [trace.layer(layer)[index] for layer in range(trace.num_layers)]
        return cls(np.stack(layers, axis=1).astype(np.int64), trace.num_experts)

    @property
    def num_steps(self) -> int:
        return self.ids_SLBK.shape[0]

    @property
    def num_layers(self) -> int:
        return self.ids_SLBK.shape[1]

    @property
    def top_k(self) -> int:
        return self.ids_SLBK.shape[3]


@dataclass(frozen=True, eq=False)
class TableBlock:
    """An MoE layer that routes as recorded; all gate weights are 1 / K.

    Attributes:
        ids_BK: (B, K) int64.
        weights_BK: (B, K).
    """

    ids_BK: torch.Tensor
    weights_BK: torch.Tensor

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """See `MoeBlock`."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * (x.shape[-1] ** 0.5 / norm)

    def route(self, hidden: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `MoeBlock`."""
        return self.ids_BK[token], self.weights_BK[token]

    def shared(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """See `MoeBlock`."""
        return None


@dataclass(frozen=True, eq=False)
class ReplayTensors:
    """Tensors that all runs of a rank share; the same on every rank.

    Attributes:
        weights: E experts.
        x_BD: tokens at the start of a step.
    """

    weights: ExpertWeights
    x_BD: torch.Tensor

    @classmethod
    def random(cls, shape: ReplayShape, num_experts: int, *, seed: int, device: torch.device) -> Self:
        """Seeded normal numbers, scaled so that hidden states keep their size."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> torch.Tensor:
            values = torch.randn(*size, generator=generator) / size[-1] ** 0.5
            return values.to(device, shape.dtype)

        gate_up = draw(num_experts, 2 * shape.expert_hidden, shape.hidden)
        weights = ExpertWeights(gate_up, draw(num_experts, shape.hidden, shape.expert_hidden))
        return cls(weights, draw(shape.batch, shape.hidden) * shape.hidden**0.5)


class Replay:
    """One run: a placement in a mode.

    Attributes:
        steps: recorded routing.
        placement: what is where.
        mode: how tokens travel.
        node_aware: dispatch-combine sends one copy per node.
        kv_pieces: pieces of the K/V exchange in coherent mode, 0 = K/V stay where they are (to time the rest).
        replica_rule: who serves an expert with several slots, `moeplace` or `balanced`.
        cache: (L, B, c) K/V that this rank holds.
    """

    def __init__(
        self,
        steps: RecordedSteps,
        placement: Placement,
        mode: Mode,
        *,
        shape: ReplayShape,
        tensors: ReplayTensors,
        group: RankGroup,
        node_aware: bool = False,
        kv_pieces: int = 2,
        replica_rule: str = "moeplace",
    ) -> None:
        """Make this rank's part; `group` must have the placement's nodes."""
        self.placement, self.mode, self.replica_rule = placement, mode, replica_rule
        self.node_aware = node_aware and mode == "dispatch-combine" and group.num_nodes > 1
        self.kv_pieces = min(kv_pieces, steps.num_layers)
        self.steps, self._tensors = steps, tensors
        self._group = group
        device = group.device
        runtime = _make_runtime(placement, group, tensors, steps.num_layers, replica_rule)
        self._dispatcher = make_dispatcher(mode, runtime, group, node_aware=self.node_aware)
        self._homes = even_homes(shape.batch, group.size)
        start = sum(self._homes[: group.rank])
        self._home_token = torch.arange(start, start + self._homes[group.rank], device=device)
        self._weights_BK = torch.full((shape.batch, steps.top_k), 1 / steps.top_k, dtype=shape.dtype, device=device)
        self._kv_columns: slice | torch.Tensor = slice(shape.kv_dim)
        if shape.kv_dim > shape.hidden:
            self._kv_columns = torch.arange(shape.kv_dim, device=device) % shape.hidden
        self.cache = torch.zeros(steps.num_layers, shape.batch, shape.kv_dim, dtype=shape.dtype, device=device)
        self._stream = (
            KvStream(
                group,
                range(steps.num_layers),
                num_layers=steps.num_layers,
                pieces=self.kv_pieces,
                keep=self._keep,
            )
            if mode == "coherent" and group.size > 1 and self.kv_pieces
            else None
        )

    @torch.inference_mode()
    def step(self, index: int) -> TokenRows:
        """One step, the `index`-th modulo the number of recorded ones; returns this rank's tokens at its end."""
        ids_LBK = self._ids(index)
        rows = TokenRows(self._tensors.x_BD[self._home_token], self._home_token)
        ledger: KvLedger | None = None
        for layer in range(self.steps.num_layers):
            if self._stream is not None:
                ledger = self._stream.ledger(index, layer, ledger)
            kv = rows.x[:, self._kv_columns]
            self.cache[layer, rows.token] = kv
            if ledger is not None:
                ledger.add(layer, rows.token, kv)
            block = TableBlock(ids_LBK[layer], self._weights_BK)
            rows = self._dispatcher.forward(layer, block, rows, Step(self._homes, ledger))
        if self.mode == "coherent" and self._group.size > 1:
            self._send_names_home(rows)
        return rows

    def drain(self) -> None:
        """Wait for K/V that are on their way."""
        if self._stream is not None:
            self._stream.drain()

    @torch.inference_mode()
    def time_steps(self, first: int, count: int) -> list[float]:
        """Seconds of `count` steps from step `first`; a step before them, not timed, fills the pipeline."""
        self.step(first - 1)
        marks = [self._now()]
        for index in range(first, first + count):
            self.step(index)
            marks.append(self._now())
        self.drain()
        return [end - start for start, end in pairwise(marks)]

    @torch.inference_mode()
    def outputs(self, index: int) -> torch.Tensor:
        """(B, D) float32 hidden states of all tokens at the end of a step, on every rank."""
        rows = self.step(index)
        self.drain()
        all_BD = torch.zeros(self._tensors.x_BD.shape, device=self._group.device)
        all_BD[rows.token] = rows.x.float()
        self._group.all_reduce(all_BD, kind="outputs")
        return all_BD

    def _ids(self, index: int) -> torch.Tensor:
        """(L, B, K) ids of a step on the device."""
        return torch.as_tensor(self.steps.ids_SLBK[index % self.steps.num_steps], device=self._group.device)

    def _keep(self, _step: int, shared: SharedKv) -> None:
        self.cache[shared.layer, shared.token] = shared.kv

    def _send_names_home(self, rows: TokenRows) -> None:
        """The next token of each sequence is chosen where the last layer left it; its id goes to all ranks."""
        chosen = torch.zeros(len(self._weights_BK), dtype=torch.int64, device=self._group.device)
        chosen[rows.token] = rows.x[:, 0].to(torch.int64)
        self._group.all_reduce(chosen, kind="chosen tokens")

    def _now(self) -> float:
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)
        return time.perf_counter()


def _make_runtime(
    placement: Placement, group: RankGroup, tensors: ReplayTensors, num_layers: int, replica_rule: str
) -> MoeRuntime:
    """This rank's part of a placement; its slots point to the experts that all layers share."""
    here = placement.slots_on(group.rank)
    slots = here.stop - here.start
    store = ExpertStore([tensors.weights] * num_layers, slots=slots)
    for layer, row in enumerate(placement.slot_to_expert[:, here].tolist()):
        spare = iter(sorted(set(range(len(tensors.weights.gate_up))) - set(row)))  # for empty slots, never used
        store.commit(layer, {slot: expert if expert >= 0 else next(spare) for slot, expert in enumerate(row)})
    tables = SlotTables.from_placement(placement, rank=group.rank, device=group.device)
    computation = ExpertComputation(store, counters=group.counters)
    running = RunningLoad.of_rule(replica_rule, tables)
    return MoeRuntime(tables, store, computation, group.counters, running=running)
