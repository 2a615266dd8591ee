"""One rank: no communication, and the oracle of the modes of several."""

from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime, Step, TokenRows, add_outputs


class LocalDispatcher:
    """All experts on one rank: no communication."""

    def __init__(self, runtime: MoeRuntime) -> None:
        self.runtime = runtime

    def forward(self, layer: int, block: MoeBlock, rows: TokenRows, step: Step) -> TokenRows:
        """See `TokenDispatcher`."""
        runtime = self.runtime
        hidden = block.normalise(rows.x)
        slots, weights = runtime.choose(layer, block, hidden, rows.token)
        routed = runtime.computation.compute(layer, hidden, runtime.tables.local_slots(slots), weights)
        runtime.counters.layer_passes["local"] += 1
        return TokenRows(add_outputs(rows.x, routed, block.shared(hidden)), rows.token)
