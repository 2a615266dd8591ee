"""dispatch-combine: tokens stay at home, copies travel to the experts and partial sums back.

    home   --- one copy per rank of A, with the slots and weights of its experts --->  ranks of A
    home  <--- one partial sum per copy ------------------------------------------------  ranks of A

The copies carry all slots of the token, and each rank computes those that are its own. Sums return in the order in
which copies arrived, so that the second all-to-all has exact sizes on both sides and no header.

Node-aware form: one copy per *node* of A goes to a gateway there (the rank of A on that node with most of the token's
experts, ties to the lowest), which forwards it inside the node and sums what comes back. What own tokens need of their
own node, and shared experts, are served while the first exchange travels: so there are four more, node-local,
collectives, for fewer bytes between nodes, and links that are busy while ranks compute.

Shape letters: M tokens at home, N rows here and received, D hidden size, K top-k, R ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.capacity import CapacityRule, HomeMeans, NodeMeans, make_rule, use_of_ranks
from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime, RoutedTokens, Step, TokenRows, add_outputs
from moeplace.runtime.exchange.host_counts import count_by_rank, gateways_of
from moeplace.runtime.exchange.moves import Moves, make_moves
from moeplace.runtime.exchange.rows import Outgoing, Received, RowExchange, TokenCopies

Meanwhile = Callable[[], None]
"""What is done while an exchange travels."""


@dataclass(frozen=True, eq=False)
class Dispatched:
    """What it takes to give sums back: what was sent, and what came from others."""

    outgoing: Outgoing
    received: Received


@dataclass(frozen=True, eq=False)
class DispatchRules:
    """Rooms of the messages between all ranks, and of those inside the node: of own and of foreign tokens."""

    all: CapacityRule
    node: tuple[CapacityRule, CapacityRule] | None


class DispatchCombineDispatcher:
    """Two all-to-alls per MoE layer; six in the node-aware form, four of them inside the nodes."""

    def __init__(self, runtime: MoeRuntime, group: RankGroup, *, node_aware: bool = False) -> None:
        self.runtime, self.group = runtime, group
        self.node = group.node_group() if node_aware and group.num_nodes > 1 else None
        self._rank_of_slot = runtime.tables.rank_of_slot.cpu().numpy()
        self._moves: Moves = make_moves(group.device)
        self._exchange = RowExchange(group, make_moves(group.device), kind="dispatch")
        # Inside the node: of own tokens, and of those that came through this gateway.
        self._inside = (
            []
            if self.node is None
            else [RowExchange(self.node, make_moves(group.device), kind="dispatch") for _ in range(2)]
        )
        self._rules: DispatchRules | None = None  # made when the first tokens tell how many experts they have

    def forward(self, layer: int, block: MoeBlock, rows: TokenRows, step: Step) -> TokenRows:
        """See `TokenDispatcher`."""
        hidden = block.normalise(rows.x)
        slots, weights = self.runtime.choose_on_host(layer, block, hidden, rows.token)
        shared: list[torch.Tensor | None] = []
        routed = self._sum(layer, hidden, slots, weights, step, lambda: shared.append(block.shared(hidden)))
        return TokenRows(add_outputs(rows.x, routed, shared[0]), rows.token, rows.names)

    def sum_experts(self, layer: int, tokens: RoutedTokens, step: Step) -> torch.Tensor:
        """See `ExpertSums`."""
        slots = self.runtime.host_slots_for(layer, tokens.ids, tokens.token)
        return self._sum(layer, tokens.hidden, slots, tokens.weights, step, _nothing)

    def _sum(
        self,
        layer: int,
        hidden: torch.Tensor,
        slots: np.ndarray,
        weights: torch.Tensor,
        step: Step,
        meanwhile: Meanwhile,
    ) -> torch.Tensor:
        home = TokenCopies(np.arange(len(slots)), slots, {"weights": weights, "x": hidden})
        with self.group.layer(layer, mode="dispatch-combine"):
            if self.node is None:
                return self._direct(layer, home, step, meanwhile)
            return self._through_nodes(layer, home, step, self.node, meanwhile)

    def _direct(self, layer: int, home: TokenCopies, step: Step, meanwhile: Meanwhile) -> torch.Tensor:
        wanted_MR = self._count(home.slots) > 0
        wanted_MR[:, self.group.rank] = False
        sent = self._dispatch(
            self._exchange, self.rules_for(home.slots.shape[1]).all, layer, step, home, wanted_MR, meanwhile
        )
        sums = self._compute(layer, self._with(home, sent.received))
        own, foreign = sums[: len(home.slots)], sums[len(home.slots) :]
        return self._combine(self.group, "combine", sent, foreign, own)

    def _through_nodes(
        self, layer: int, home: TokenCopies, step: Step, node: RankGroup, meanwhile: Meanwhile
    ) -> torch.Tensor:
        mates, served = self.group.node_ranks, []
        gateway_MR = gateways_of(self._count(home.slots), self.group.node_of_rank)
        gateway_MR[:, mates] = False  # the own node needs no gateway

        def serve_home() -> None:
            """What own tokens need of the own node, while links between nodes carry what they need of others."""
            meanwhile()
            served.append(self._inside_node(layer, home, step, node, 0))

        rule = self.rules_for(home.slots.shape[1]).all
        across = self._dispatch(self._exchange, rule, layer, step, home, gateway_MR, serve_home)
        foreign = self._inside_node(layer, self._those_of(across.received, home), step, node, 1)
        return self._combine(self.group, "combine", across, foreign, served[0])

    def _inside_node(self, layer: int, rows: TokenCopies, step: Step, node: RankGroup, turn: int) -> torch.Tensor:
        """Sums of the node's experts for rows of this rank: two collectives of the node, an exchange for each turn."""
        mates, rule = self.group.node_ranks, self.rules_for(rows.slots.shape[1]).node
        assert rule is not None
        wanted_Nn = self._count(rows.slots)[:, mates] > 0
        wanted_Nn[:, mates.index(self.group.rank)] = False
        sent = self._dispatch(self._inside[turn], rule[turn], layer, step, rows, wanted_Nn, _nothing)
        sums = self._compute(layer, self._with(rows, sent.received))
        own, others = sums[: len(rows.slots)], sums[len(rows.slots) :]
        return self._combine(node, f"gather {turn}", sent, others, own)

    def _count(self, slots: np.ndarray) -> np.ndarray:
        """(N, R) experts of each row that each rank serves."""
        return count_by_rank(self._rank_of_slot[slots], self.group.size)

    def rules_for(self, top_k: int) -> DispatchRules:
        """Rooms for tokens with so many experts; alike on all ranks, which must use them in the same passes."""
        if self._rules is None:
            tables, group, node = self.runtime.tables, self.group, self.node
            use_LR, layers = use_of_ranks(tables, top_k), tables.num_layers
            inside = None
            if node is not None:
                means = [NodeMeans(use_LR, group.node_ranks, foreign=foreign) for foreign in (False, True)]
                own, foreign = (make_rule(node, one, num_layers=layers) for one in means)
                inside = own, foreign
            self._rules = DispatchRules(make_rule(group, HomeMeans(use_LR), num_layers=layers), inside)
        return self._rules

    def _dispatch(
        self,
        exchange: RowExchange,
        rule: CapacityRule,
        layer: int,
        step: Step,
        copies: TokenCopies,
        wanted_MR: np.ndarray,
        meanwhile: Meanwhile,
    ) -> Dispatched:
        outgoing = Outgoing.of(wanted_MR)
        pending = exchange.start(copies.layout(), copies, outgoing, capacity=rule.capacity(layer, step))
        meanwhile()
        received = pending.finish()
        rule.observe(layer, step, outgoing.counts, received.counts)
        self.runtime.counters.copies_sent += len(outgoing.source)
        return Dispatched(outgoing, received)

    def _with(self, copies: TokenCopies, received: Received) -> TokenCopies:
        """Rows that were here, then those that came."""
        values = copies.values
        if len(received.place):
            values = {name: received.join(self._moves, value, None, name) for name, value in values.items()}
        slots = np.concatenate([copies.slots, received.slots])
        return TokenCopies(np.arange(len(slots)), slots, values)

    def _those_of(self, received: Received, like: TokenCopies) -> TokenCopies:
        """The rows that came, alone."""
        none = np.zeros(0, np.int64)
        values = {name: received.join(self._moves, value, none, name) for name, value in like.values.items()}
        return TokenCopies(np.arange(len(received.place)), received.slots, values)

    def _compute(self, layer: int, rows: TokenCopies) -> torch.Tensor:
        """Partial sums of own and of received rows, in one pass over the experts: their weights are read once."""
        return self.runtime.compute(layer, rows.values["x"], rows.slots, rows.values["weights"])

    def _combine(
        self, group: RankGroup, name: str, sent: Dispatched, partial: torch.Tensor, local: torch.Tensor
    ) -> torch.Tensor:
        """`local`, to which the partial sums are added that come back for what was sent; `partial` goes to where it
        came from."""
        outgoing = sent.outgoing
        returned = self._moves.room(name, len(outgoing.source), partial.shape[1], partial.dtype)
        group.all_to_all(returned, partial, outgoing.counts, sent.received.counts, kind="combine")
        if not len(outgoing.source):
            return local
        return local.index_add_(0, self._moves.index(outgoing.source), returned)


def _nothing() -> None:
    """What is done meanwhile where there is nothing to do."""
