"""PlacedExperts: what every executor has, however its model runs between the experts: experts under a placement."""

from collections.abc import Sequence
from typing import Generic, TypeVar
from zlib import crc32

import numpy as np
import torch

from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.windows.load import LoadWindow
from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime
from moeplace.runtime.exchange.factory import Dispatcher, make_dispatcher
from moeplace.runtime.exchange.fixed.factory import make_fixed_shapes
from moeplace.runtime.exchange.fixed.step import FixedShapes
from moeplace.runtime.exchange.running_load import RunningLoad
from moeplace.runtime.exchange.slot_tables import SlotTables
from moeplace.runtime.experts.computation import ExpertComputation
from moeplace.runtime.experts.store import ExpertStore
from moeplace.runtime.experts.tiered_computation import TieredComputation
from moeplace.runtime.experts.tiered_store import TieredStore
from moeplace.runtime.experts.weights import Activation

ModelT = TypeVar("ModelT")
CacheT = TypeVar("CacheT")


class PlacedExperts(Generic[ModelT, CacheT]):
    """A model, the state of its sequences, and its experts.

    Attributes:
        decoder: the model without routed experts.
        cache: what it keeps of sequences.
        runtime: placement, experts and counters as dispatchers see them.
        group: the ranks.
        placement: what is where.
        version: how often the placement has changed.
        window: routing seen by this rank.
    """

    def __init__(
        self,
        decoder: ModelT,
        experts: ExpertStore,
        cache: CacheT,
        group: RankGroup,
        placement: Placement,
        *,
        activation: Activation,
        window: LoadWindow,
        node_aware: bool,
        replica_rule: str = "moeplace",
    ) -> None:
        self.decoder, self.cache, self.group = decoder, cache, group
        self._node_aware, self._replica_rule, self.window, self._experts = node_aware, replica_rule, window, experts
        make = TieredComputation if isinstance(experts, TieredStore) else ExpertComputation
        self._computation: ExpertComputation = make(experts, counters=group.counters, activation=activation)  # type: ignore[arg-type]
        self.version = 0
        self.install(placement, version=0)

    def install(self, placement: Placement, *, version: int | None = None) -> None:
        """Serve under `placement` from the next pass on; its experts must be in their slots.

        Args:
            version: None = the next one.
        """
        self.placement = placement
        self.version = self.version + 1 if version is None else version
        self._experts.placed(placement, self.group.rank)
        tables = SlotTables.from_placement(placement, rank=self.group.rank, device=self.group.device)
        running = RunningLoad.of_rule(self._replica_rule, tables)
        self.runtime = MoeRuntime(tables, self._experts, self._computation, self.group.counters, self.window, running)
        self._dispatchers: dict[Mode, Dispatcher] = {}
        self._fixed: dict[Mode, FixedShapes | None] = {}

    def regroup(self, group: RankGroup, placement: Placement, *, version: int) -> None:
        """Serve with the ranks of another group from the next pass on; see `Engine.regroup`."""
        self.group = group
        self._computation.count_in(group.counters)
        self.install(placement, version=version)

    def dispatcher(self, mode: Mode) -> Dispatcher:
        """What carries a mode out under the placement in force."""
        if mode not in self._dispatchers:
            self._dispatchers[mode] = make_dispatcher(mode, self.runtime, self.group, node_aware=self._node_aware)
        return self._dispatchers[mode]

    def fixed_shapes(self, mode: Mode) -> FixedShapes | None:
        """What carries a mode out in fixed shapes, None = it has none here."""
        if isinstance(self._computation, TieredComputation):
            return None
        if mode not in self._fixed:
            self._fixed[mode] = make_fixed_shapes(self.dispatcher(mode), self.runtime, self.group)
        return self._fixed[mode]

    def look_ahead_with(self, blocks: Sequence[MoeBlock]) -> None:
        """Let gates of later layers say, from an earlier layer's input, which experts are to be fetched (Fate)."""
        computation = self._computation
        if not isinstance(computation, TieredComputation) or not computation.looks_ahead:
            return

        def foresee(layer: int, x: torch.Tensor) -> torch.Tensor:
            return blocks[layer].route(x, torch.arange(len(x), device=x.device))[0]

        computation.foresee = foresee

    def note_pass(self, batch: Batch) -> None:
        """Tell the window whose tokens a pass serves, in their order."""
        if self.window.recent is not None:
            names = [crc32(sequence.request.request_id.encode()) for sequence in batch.sequences]  # on all ranks alike
            self.window.recent.begin_pass(np.repeat(np.array(names, np.int64), batch.lengths))
