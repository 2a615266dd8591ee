"""MoE layers without a model: routing from a table, random experts, float64. For tests of the exchange modes."""

from dataclasses import dataclass

import numpy as np
import torch

from moeplace.placement.placement import Placement
from moeplace.runtime.counters import Counters
from moeplace.runtime.exchange.dispatcher import MoeRuntime, Step, TokenDispatcher, TokenRows
from moeplace.runtime.exchange.running_load import RunningLoad
from moeplace.runtime.exchange.slot_tables import SlotTables
from moeplace.runtime.experts.computation import ExpertComputation
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.weights import ExpertWeights

HIDDEN, EXPERT_HIDDEN = 6, 5


@dataclass(frozen=True, eq=False)
class ToyBlock:
    """Routes by table: `ids` (T, K), `weights` (T, K); the norm scales, the shared expert negates."""

    ids: torch.Tensor
    weights: torch.Tensor
    has_shared: bool = True

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return x / (1 + x.square().mean(-1, keepdim=True)).sqrt()

    def route(self, hidden: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids[token], self.weights[token]

    def shared(self, hidden: torch.Tensor) -> torch.Tensor | None:
        return -hidden / 2 if self.has_shared else None


@dataclass(frozen=True, eq=False)
class ToyModel:
    """Routing and tokens of a whole step.

    Attributes:
        ids: (L, T, K) expert ids.
        weights: (L, T, K).
        x: (T, D) tokens before the first layer.
        experts: per layer.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    x: torch.Tensor
    num_experts: int

    @classmethod
    def random(
        cls, tokens: int, *, layers: int, experts: int, top_k: int, seed: int, absent: float = 0.0, single: bool = False
    ) -> "ToyModel":
        """Seeded; `absent` = share of ids that are -1; `single` = all tokens on expert 0."""
        rng = np.random.default_rng(seed)
        ids = np.argsort(rng.random((layers, tokens, experts)), axis=2)[..., :top_k]
        if single:
            ids[:] = np.arange(top_k)
        ids[rng.random(ids.shape) < absent] = -1
        weights = torch.as_tensor(rng.random((layers, tokens, top_k)))
        return cls(torch.as_tensor(ids), weights, torch.as_tensor(rng.normal(size=(tokens, HIDDEN))), experts)

    @property
    def num_layers(self) -> int:
        return len(self.ids)

    def expert_parts(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights by (layer, expert): every rank makes the same."""
        rng = np.random.default_rng([layer, expert])
        gate_up = rng.normal(size=(2 * EXPERT_HIDDEN, HIDDEN))
        return torch.as_tensor(gate_up), torch.as_tensor(rng.normal(size=(HIDDEN, EXPERT_HIDDEN)))

    def runtime(
        self,
        placement: Placement,
        rank: int,
        counters: Counters,
        *,
        device: str | torch.device = "cpu",
        replica_rule: str = "moeplace",
    ) -> MoeRuntime:
        """The part of a rank under a placement."""
        tables = SlotTables.from_placement(placement, rank=rank, device=device)
        slots = tables.slots_here
        weights = [
            ExpertWeights.empty(slots, HIDDEN, EXPERT_HIDDEN, bias=False, dtype=torch.float64, device=device)
            for _ in range(self.num_layers)
        ]
        store = ExpertStore(weights, slots=slots)
        for layer in range(self.num_layers):
            for slot, expert in enumerate(placement.slot_to_expert[layer, placement.slots_on(rank)]):
                if expert >= 0:
                    gate_up, down = self.expert_parts(layer, int(expert))
                    store.write(layer, slot, "gate_up", gate_up)
                    store.write(layer, slot, "down", down)
        running = RunningLoad.of_rule(replica_rule, tables)
        return MoeRuntime(tables, store, ExpertComputation(store, counters=counters), counters, running=running)

    def block(self, layer: int) -> ToyBlock:
        """One MoE layer; every other one has shared experts."""
        return ToyBlock(self.ids[layer], self.weights[layer], has_shared=layer % 2 == 0)

    def reference(self) -> torch.Tensor:
        """(T, D) after all layers, token by token and expert by expert."""
        x = self.x.clone()
        for layer in range(self.num_layers):
            block = self.block(layer)
            hidden = block.normalise(x)
            out = torch.zeros_like(x) if block.shared(hidden) is None else block.shared(hidden).clone()
            for token in range(len(x)):
                for expert, weight in zip(self.ids[layer, token].tolist(), self.weights[layer, token], strict=True):
                    if expert >= 0:
                        gate_up, down = self.expert_parts(layer, expert)
                        gate, up = (gate_up @ hidden[token]).chunk(2)
                        out[token] += weight * (down @ (torch.nn.functional.silu(gate) * up))
            x = x + out
        return x

    def run(self, dispatcher: TokenDispatcher, rank: int, step: Step) -> TokenRows:
        """All layers, from the home rows of a rank (consecutive blocks of tokens) to what it has at the end."""
        start = sum(step.tokens_of_rank[:rank])
        token = torch.arange(start, start + step.tokens_of_rank[rank])
        rows = TokenRows(self.x[token], token)
        for layer in range(self.num_layers):
            rows = dispatcher.forward(layer, self.block(layer), rows, step)
        return rows
