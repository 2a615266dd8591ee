"""allgather: every rank sees all tokens, computes its own experts, and one reduction gives each home its sums.

The traffic does not depend on the placement. For few ranks, or as the baseline that a tensor-parallel deployment
would be.

Shape letters: M tokens at home, R ranks.
"""

from typing import NamedTuple, Self

import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime, RoutedTokens, Step, TokenRows, add_outputs
from moeplace.runtime.exchange.row_layout import RowLayout


class Copies(NamedTuple):
    """Tokens as experts need them."""

    hidden: torch.Tensor  # (N, D) normalised rows
    slots: torch.Tensor  # (N, K) int64 global slots, -1 = none
    weights: torch.Tensor  # (N, K) gate weights

    @classmethod
    def of(cls, runtime: MoeRuntime, layer: int, tokens: RoutedTokens) -> Self:
        """Copies of tokens that know their experts."""
        return cls(tokens.hidden, runtime.slots_for(layer, tokens.ids, tokens.token), tokens.weights)

    @classmethod
    def unpack(cls, layout: RowLayout, rows: torch.Tensor) -> Self:
        """Copies from received rows."""
        return cls(layout.view(rows, "x"), layout.view(rows, "slots").long(), layout.view(rows, "weights"))


class AllGatherDispatcher:
    """Two dense collectives per MoE layer: all-gather and reduce-scatter, padded to the fullest rank."""

    def __init__(self, runtime: MoeRuntime, group: RankGroup) -> None:
        self.runtime, self.group = runtime, group

    def forward(self, layer: int, block: MoeBlock, rows: TokenRows, step: Step) -> TokenRows:
        """See `TokenDispatcher`."""
        hidden = block.normalise(rows.x)
        home = Copies(hidden, *self.runtime.choose(layer, block, hidden, rows.token))
        routed = self._sum(layer, home, step)
        return TokenRows(add_outputs(rows.x, routed, block.shared(hidden)), rows.token)

    def sum_experts(self, layer: int, tokens: RoutedTokens, step: Step) -> torch.Tensor:
        """See `ExpertSums`."""
        return self._sum(layer, Copies.of(self.runtime, layer, tokens), step)

    def _sum(self, layer: int, home: Copies, step: Step) -> torch.Tensor:
        runtime, tokens = self.runtime, len(home.slots)
        width = max(step.tokens_of_rank)
        with self.group.layer(layer, mode="allgather"):
            everyone = self._gather(home, width)
            local = runtime.tables.local_slots(everyone.slots)
            partial = runtime.computation.compute(layer, everyone.hidden, local, everyone.weights)
            routed = self._reduce(partial, width)[:tokens]
        runtime.counters.copies_sent += tokens * (self.group.size - 1)
        return routed

    def _gather(self, home: Copies, width: int) -> Copies:
        """(R * width) rows of all ranks; the padding of a rank has no experts."""
        layout = RowLayout.of_tokens(home.slots.shape[1], weights=home.weights, x=home.hidden)
        mine = torch.zeros(width, layout.row_bytes, dtype=torch.uint8, device=home.hidden.device)
        layout.view(mine, "slots").fill_(-1)
        tokens = len(home.slots)
        for name, value in (("slots", home.slots), ("weights", home.weights), ("x", home.hidden)):
            layout.view(mine, name)[:tokens] = value
        everyone = mine.new_empty(self.group.size * width, layout.row_bytes)
        self.group.all_gather(everyone, mine, kind="all-gather")
        return Copies.unpack(layout, everyone)

    def _reduce(self, partial: torch.Tensor, width: int) -> torch.Tensor:
        mine = partial.new_empty(width, partial.shape[1])
        self.group.reduce_scatter(mine, partial, kind="reduce-scatter")
        return mine
