"""One rank in fixed shapes: no communication, and nothing read on the host."""

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime, Step, TokenRows, add_outputs
from moeplace.runtime.exchange.fixed.slots import FixedSlots
from moeplace.runtime.exchange.fixed.step import StepNotes


class FixedLocal:
    """All experts on one rank; see `FixedDispatcher`."""

    def __init__(self, runtime: MoeRuntime, group: RankGroup) -> None:
        self.runtime, self.group = runtime, group
        self.notes = StepNotes()
        self._slots = FixedSlots(runtime)

    def forward(self, layer: int, block: MoeBlock, rows: TokenRows, step: Step) -> TokenRows:
        """See `TokenDispatcher`."""
        runtime = self.runtime
        runtime.counters.layer_passes["local"] += 1
        hidden = block.normalise(rows.x)
        slots, weights = self._slots.choose(layer, block, hidden, rows.token, self.notes)
        routed = runtime.computation.compute_fixed(layer, hidden, runtime.tables.local_slots(slots), weights)
        return TokenRows(add_outputs(rows.x, routed, block.shared(hidden)), rows.token)
