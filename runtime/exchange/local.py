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
        routed = self.sum_experts(layer, RoutedTokens(hidden, *block.route(hidden, rows.token), rows.token), step)
        return TokenRows(add_outputs(rows.x, routed, block.shared(hidden)), rows.token)

    def sum_experts(self, layer: int, tokens: RoutedTokens, step: Step) -> torch.Tensor:
        """See `ExpertSums`."""
        runtime = self.runtime
        runtime.counters.layer_passes["local"] += 1
        if tokens.hidden.device.type == "cpu" and not runtime.tables.replicated[layer]:
            here = runtime.slots_on_host(layer, tokens.ids, tokens.token)
            return runtime.computation.compute_on_host(layer, tokens.hidden, here, tokens.weights)
        slots = runtime.tables.local_slots(runtime.slots_for(layer, tokens.ids, tokens.token))
        return runtime.computation.compute(layer, tokens.hidden, slots, tokens.weights)
