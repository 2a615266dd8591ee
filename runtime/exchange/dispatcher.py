"""The MoE layer as the exchange modes see it, and what a mode is: a `TokenDispatcher`.

A dispatcher takes the tokens of one rank after attention through one MoE layer. It knows where experts are and moves
rows; norm, router and shared experts are a `MoeBlock`, the routed experts an `ExpertComputation`: no model is needed.

Shape letters: M tokens on this rank, D hidden size, K top-k, R ranks.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from moeplace.runtime.counters import Counters
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.exchange.replica_choice import choose_slots
from moeplace.runtime.exchange.running_load import RunningLoad
from moeplace.runtime.exchange.slot_tables import SlotTables
from moeplace.runtime.experts.computation import ExpertComputation
from moeplace.runtime.experts.store import ExpertStore


class RoutingSink(Protocol):
    """Takes note of where tokens are routed."""

    @property
    def names_tokens(self) -> bool:
        """Whether the tokens' numbers are wanted beside their expert ids."""

    def record(self, layer: int, ids: np.ndarray, token: np.ndarray | None = None) -> None:
        """Note the ids (T, K), -1 = none, of tokens routed in `layer`, and their numbers (T,) in the batch."""


class MoeBlock(Protocol):
    """An MoE layer without its routed experts and without communication."""

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """(M, D) residual stream -> (M, D) input of router and experts."""

    def route(self, hidden: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids (M, K) int64, -1 = none, and gate weights (M, K) of normalised rows; `token` (M,) names them."""

    def shared(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """(M, D) output of the shared experts, None where there are none."""


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Tokens that are on this rank.

    Attributes:
        x: (M, D) residual stream.
        token: (M,) int64 index of each token in the step's batch.
        names: the same on the host, where it is known there.
    """

    x: torch.Tensor
    token: torch.Tensor
    names: np.ndarray | None = None

    def names_on_host(self) -> np.ndarray:
        """(M,) int64 `token`; on a GPU that is not known yet the host waits for it."""
        return self.token.cpu().numpy() if self.names is None else self.names

    def __len__(self) -> int:
        return len(self.token)


@dataclass(frozen=True, eq=False)
class Step:
    """One forward pass, as all ranks know it before it starts.

    Attributes:
        tokens_of_rank: tokens whose home each rank is; they start there.
        ledger: where K/V rows of this step are noted, if they are to be shared.
    """

    tokens_of_rank: tuple[int, ...]
    ledger: KvLedger | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens_of_rank)


@dataclass(frozen=True, eq=False)
class MoeRuntime:
    """What all dispatchers of a rank share.

    Attributes:
        tables: the placement.
        experts: the weights of this rank.
        computation: with those.
        counters: what is counted.
        window: routing seen; None = not recorded.
        running: load so far, by which replicas are chosen (rule `balanced`); None = by the rule `moeplace`.
    """

    tables: SlotTables
    experts: ExpertStore
    computation: ExpertComputation
    counters: Counters
    window: RoutingSink | None = None
    running: RunningLoad | None = None

    def choose(
        self, layer: int, block: MoeBlock, hidden: torch.Tensor, token: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Serving slots (M, K) and gate weights (M, K) of this rank's tokens; absent experts weigh nothing."""
        ids, weights = block.route(hidden, token)
        return self.slots_for(layer, ids, token), weights

    def choose_on_host(
        self, layer: int, block: MoeBlock, hidden: torch.Tensor, token: torch.Tensor
    ) -> tuple[np.ndarray, torch.Tensor]:
        """`choose`, with the slots as numbers of this process: a GPU is waited for once."""
        ids, weights = block.route(hidden, token)
        return self.host_slots_for(layer, ids, token), weights

    def host_slots_for(self, layer: int, ids: torch.Tensor, token: torch.Tensor) -> np.ndarray:
        """`slots_for` as numbers of this process."""
        if self.tables.replicated[layer]:
            return self.slots_for(layer, ids, token).cpu().numpy()
        return self.slots_on_host(layer, ids.cpu(), token)

    def compute(self, layer: int, x: torch.Tensor, slots: np.ndarray, weights: torch.Tensor) -> torch.Tensor:
        """Partial sums (N, D) of this rank's experts for rows whose global slots (N, K) are known on the host."""
        tables = self.tables
        own = slots - tables.slots_start
        here = np.where((own >= 0) & (own < tables.slots_here), own, -1)
        if x.device.type == "cpu":
            return self.computation.compute_on_host(layer, x, here, weights)
        return self.computation.compute(layer, x, torch.from_numpy(here).to(x.device), weights)

    def slots_on_host(self, layer: int, ids: torch.Tensor, token: torch.Tensor) -> np.ndarray:
        """`slots_for` ids on the CPU, in a layer without replicas."""
        ids_MK = ids.numpy()
        if self.window is not None:
            self.window.record(layer, ids_MK, token.cpu().numpy() if self.window.names_tokens else None)
        slots: np.ndarray = self.tables.first_slot_host[layer][ids_MK]
        return slots

    def slots_for(self, layer: int, ids: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Serving slots (M, K) of experts (M, K), -1 = none; the window takes note of them."""
        if self.window is not None:
            names = token.cpu().numpy() if self.window.names_tokens else None  # on a GPU a copy waits for the layer
            self.window.record(layer, ids.cpu().numpy(), names)
        return choose_slots(self.tables, layer, ids, near=self.tables.rank, rotation=token, running=self.running)


class TokenDispatcher(Protocol):
    """One execution mode."""

    def forward(self, layer: int, block: MoeBlock, rows: TokenRows, step: Step) -> TokenRows:
        """The tokens of this rank after MoE layer `layer`; possibly other tokens than before.

        All ranks of the group call it together, also those without tokens.
        """


@dataclass(frozen=True, eq=False)
class RoutedTokens:
    """Tokens of this rank at the experts of one layer, as the model's own block hands them over.

    Attributes:
        hidden: (M, D) rows, as experts take them.
        ids: (M, K) int64 experts, -1 = none.
        weights: (M, K) gate weights.
        token: (M,) int64 index of each token in the step's batch.
    """

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    token: torch.Tensor


class ExpertSums(Protocol):
    """An execution mode in which tokens stay where they are: it can serve the experts of any model."""

    def sum_experts(self, layer: int, tokens: RoutedTokens, step: Step) -> torch.Tensor:
        """(M, D) weighted sums of the experts of MoE layer `layer`; all ranks call it together, also without tokens."""


def add_outputs(x: torch.Tensor, routed: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
    """Residual stream after the layer; the sum of expert outputs comes first, as in the models."""
    return x + (routed if shared is None else routed + shared)
