"""dispatch-combine in fixed shapes; see `moeplace.runtime.exchange.dispatch_combine`, of which it is the same.

Shape letters: M tokens at home, N rows here and received, K top-k, R ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.dispatch_combine import DispatchCombineDispatcher
from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime, Step, TokenRows, add_outputs
from moeplace.runtime.exchange.fixed.counts import count_by_rank, gateways_of
from moeplace.runtime.exchange.fixed.rows import NOBODY, FixedReceived, FixedRowExchange, Rooms
from moeplace.runtime.exchange.fixed.slots import FixedSlots
from moeplace.runtime.exchange.fixed.step import StepNotes
from moeplace.runtime.exchange.row_layout import RowLayout


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of some tokens; slots of nobody are -1."""

    slots: torch.Tensor
    values: Mapping[str, torch.Tensor]  # weights (N, K), x (N, D)

    def alone(self, received: FixedReceived) -> "_Rows":
        """The rows that came."""
        slots = torch.where(received.token[:, None] == NOBODY, -1, received.values["slots"].long())
        return _Rows(slots, {name: received.values[name] for name in self.values})

    def followed_by(self, received: FixedReceived) -> "_Rows":
        others = self.alone(received)
        values = {name: torch.cat([value, others.values[name]]) for name, value in self.values.items()}
        return _Rows(torch.cat([self.slots, others.slots]), values)


class FixedDispatchCombine:
    """As many collectives as the exact form; see `FixedDispatcher`."""

    def __init__(self, exact: DispatchCombineDispatcher) -> None:
        """`exact` runs steps again that did not have room; its rules say how much there is."""
        self._exact = exact
        self.runtime: MoeRuntime = exact.runtime
        self.group: RankGroup = exact.group
        self.notes = StepNotes()
        self._node = exact.node
        self._slots = FixedSlots(self.runtime)
        self._exchange = FixedRowExchange(self.group, kind="dispatch", back="combine")
        self._inside = (
            []
            if self._node is None
            else [FixedRowExchange(self._node, kind="dispatch", back="combine") for _ in range(2)]
        )
        mates = self.group.node_ranks
        self._own_node = slice(mates[0], mates[-1] + 1)
        starts = [int(rank) for rank in (self.group.node_of_rank[:-1] != self.group.node_of_rank[1:]).nonzero()[0] + 1]
        self._nodes = tuple(slice(a, b) for a, b in zip([0, *starts], [*starts, self.group.size], strict=True))

    def forward(self, layer: int, block: MoeBlock, rows: TokenRows, step: Step) -> TokenRows:
        """See `TokenDispatcher`."""
        if not step.num_tokens:
            return rows
        hidden = block.normalise(rows.x)
        slots, weights = self._slots.choose(layer, block, hidden, rows.token, self.notes)
        home = _Rows(slots, {"weights": weights, "x": hidden})
        with self.group.layer(layer, mode="dispatch-combine"):
            routed = self._direct(layer, home, step) if self._node is None else self._through(layer, home, step)
        return TokenRows(add_outputs(rows.x, routed, block.shared(hidden)), rows.token)

    def _direct(self, layer: int, home: _Rows, step: Step) -> torch.Tensor:
        wanted_MR = self._count(home.slots) > 0
        wanted_MR[:, self.group.rank] = False
        rooms = self._rooms(layer, step, home, None)
        sent = self._send(self._exchange, home, wanted_MR, rooms)
        sums = self._compute(layer, home.followed_by(sent))
        return self._exchange.send_back(sums[len(home.slots) :], sums[: len(home.slots)], sent, rooms)

    def _through(self, layer: int, home: _Rows, step: Step) -> torch.Tensor:
        gateway_MR = gateways_of(self._count(home.slots), self._nodes)
        gateway_MR[:, self._own_node] = False
        far = self._rooms(layer, step, home, None)
        across = self._send(self._exchange, home, gateway_MR, far)
        own = self._inside_node(layer, step, home, 0)
        foreign = self._inside_node(layer, step, home.alone(across), 1)
        return self._exchange.send_back(foreign, own, across, far)

    def _inside_node(self, layer: int, step: Step, rows: _Rows, turn: int) -> torch.Tensor:
        """Sums of the node's experts for rows of this rank, own ones or those that came through it."""
        wanted_Nn = self._count(rows.slots)[:, self._own_node] > 0
        wanted_Nn[:, self.group.node_ranks.index(self.group.rank)] = False
        rooms, exchange = self._rooms(layer, step, rows, turn), self._inside[turn]
        inside = self._send(exchange, rows, wanted_Nn, rooms)
        sums = self._compute(layer, rows.followed_by(inside))
        return exchange.send_back(sums[len(rows.slots) :], sums[: len(rows.slots)], inside, rooms)

    def _send(self, exchange: FixedRowExchange, rows: _Rows, wanted: torch.Tensor, rooms: Rooms) -> FixedReceived:
        values = {"slots": rows.slots, **rows.values}
        layout = RowLayout.of_tokens(rows.slots.shape[1], weights=values["weights"], x=values["x"])
        token = torch.zeros(len(rows.slots), dtype=torch.int64, device=rows.slots.device)  # it has no need of a name
        received = exchange.send(layout, token, values, wanted, rooms)
        self.notes.exceeded.append(received.exceeded)
        return received

    def _count(self, slots: torch.Tensor) -> torch.Tensor:
        return count_by_rank(self.runtime.tables.rank_of_slot[slots], self.group.size)

    def _compute(self, layer: int, rows: _Rows) -> torch.Tensor:
        local = self.runtime.tables.local_slots(rows.slots)
        return self.runtime.computation.compute_fixed(layer, rows.values["x"], local, rows.values["weights"])

    def _rooms(self, layer: int, step: Step, rows: _Rows, turn: int | None) -> Rooms:
        """Between all ranks, or in one of the turns inside the node."""
        rules, group, rule = self._exact.rules_for(rows.slots.shape[1]), self.group, None
        if turn is None:
            rule = rules.all
        elif self._node is not None and rules.node is not None:
            group, rule = self._node, rules.node[turn]
        assert rule is not None
        return self._slots.rooms(rule.capacity(layer, step), group.rank, self.group.device)
