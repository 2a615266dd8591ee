"""One rank: no communication, and the oracle of the modes of several."""

import torch

from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime, RoutedTokens, Step, TokenRows, add_outputs


class LocalDispatcher:
    """All experts on one rank: no communication."""

    def __init__(self, runtime: MoeRuntime) -> None:
        self.runtime = runtime

    def forward(self, layer: int, block: MoeBlock, rows: TokenRows, step: Step) -> TokenRows:
        """See `TokenDispatcher`."""
        hidden = block.normalise(rows.x)
        slots, weights = self.runtime.choose(layer, block, hidden, rows.token)
        routed = self._sum(layer, hidden, slots, weights)
        return TokenRows(add_outputs(rows.x, routed, block.shared(hidden)), rows.token)

    def sum_experts(self, layer: int, tokens: RoutedTokens, step: Step) -> torch.Tensor:
        """See `ExpertSums`."""
        slots = self.runtime.slots_for(layer, tokens.ids, tokens.token)
        return self._sum(layer, tokens.hidden, slots, tokens.weights)

    def _sum(self, layer: int, hidden: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        runtime = self.runtime
        runtime.counters.layer_passes["local"] += 1
        return runtime.computation.compute(layer, hidden, runtime.tables.local_slots(slots), weights)
