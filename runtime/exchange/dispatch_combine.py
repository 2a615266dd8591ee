"""dispatch-combine: tokens stay at home, copies travel to the experts and partial sums back.

    home   --- one copy per rank of A, with the slots and weights of its experts --->  ranks of A
    home  <--- one partial sum per copy ------------------------------------------------  ranks of A

The copies carry all slots of the token, and each rank computes those that are its own. Sums return in the order in
which copies arrived, so that the second all-to-all has exact sizes on both sides and no header.

Node-aware form: one copy per *node* of A goes to a gateway there (the rank of A on that node with most of the token's
experts, ties to the lowest), which forwards it inside the node and sums what comes back: two more, node-local,
collectives for fewer bytes between nodes.

Shape letters: M tokens at home, N copies received, D hidden size, K top-k, R ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime, RoutedTokens, Step, TokenRows, add_outputs
from moeplace.runtime.exchange.rows import Capacity, Received, RowLayout, exchange_rows

PADDED_ROWS = 256
"""Up to this many tokens per rank, messages that must be padded are padded; beyond, sizes are exchanged first."""


class Copies(NamedTuple):
    """Tokens as experts need them."""

    hidden: torch.Tensor  # (N, D) normalised rows
    slots: torch.Tensor  # (N, K) int64 global slots, -1 = none
    weights: torch.Tensor  # (N, K) gate weights

    def layout(self) -> RowLayout:
        """How such rows travel."""
        top_k = self.slots.shape[1]
        return RowLayout.of(
            slots=(torch.int32, top_k),
            weights=(self.weights.dtype, top_k),
            x=(self.hidden.dtype, self.hidden.shape[1]),
        )

    @classmethod
    def of(cls, runtime: MoeRuntime, layer: int, tokens: RoutedTokens) -> Self:
        """Copies of tokens that know their experts."""
        return cls(tokens.hidden, runtime.slots_for(layer, tokens.ids, tokens.token), tokens.weights)

    @classmethod
    def unpack(cls, layout: RowLayout, rows: torch.Tensor) -> Self:
        """Copies from received rows."""
        return cls(layout.view(rows, "x"), layout.view(rows, "slots").long(), layout.view(rows, "weights"))

    def followed_by(self, others: "Copies") -> "Copies":
        """These rows, then the others."""
        return Copies(*(torch.cat(pair) for pair in zip(self, others, strict=True)))


@dataclass(frozen=True, eq=False)
class Dispatched:
    """What `combine` needs of a dispatch.

    Attributes:
        source: (n,) int64, row at this rank of each copy, in the order in which they were sent.
        received: what came from others.
        copies: the received rows.
    """

    source: torch.Tensor
    received: Received
    copies: Copies


class DispatchCombineDispatcher:
    """Two all-to-alls per MoE layer; four in the node-aware form, two of them inside the nodes."""

    def __init__(self, runtime: MoeRuntime, group: RankGroup, *, node_aware: bool = False) -> None:
        self.runtime, self.group = runtime, group
        self._node = group.node_group() if node_aware and group.num_nodes > 1 else None

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
        with self.group.layer(layer, mode="dispatch-combine"):
            if self._node is None:
                return self._direct(layer, home, step)
            return self._through_nodes(layer, home, step, self._node)

    def _direct(self, layer: int, home: Copies, step: Step) -> torch.Tensor:
        served_MR = ranks_in_use(self.runtime.tables.rank_of_slot[home.slots], self.group.size)
        served_MR[:, self.group.rank] = False
        target, source = served_MR.t().nonzero(as_tuple=True)
        sent = self._dispatch(self.group, self._capacity(step), source, target, home)
        own, foreign = self._compute_both(layer, home, sent.copies)
        return self._combine(self.group, sent, foreign, own)

    def _through_nodes(self, layer: int, home: Copies, step: Step, node: RankGroup) -> torch.Tensor:
        gateway_NM = self._gateways(home.slots)
        gateway_NM[self.group.node_of_rank[self.group.rank]] = -1  # the own node needs no gateway
        far_node, source = (gateway_NM >= 0).nonzero(as_tuple=True)
        # Nodes are blocks of consecutive ranks, but gateways inside a node come in any order.
        target, order = gateway_NM[far_node, source].sort(stable=True)
        across = self._dispatch(self.group, self._capacity(step), source[order], target, home)
        # Own tokens and those that came through this gateway are forwarded inside the node alike.
        here = home.followed_by(across.copies)
        mates = torch.tensor(self.group.node_ranks, device=target.device)
        served = ranks_in_use(self.runtime.tables.rank_of_slot[here.slots], self.group.size)[:, mates]
        served[:, node.rank] = False
        mate, source = served.t().nonzero(as_tuple=True)
        inside = self._dispatch(node, self._node_capacity(step, node), source, mate, here)
        gathered, forwarded = self._compute_both(layer, here, inside.copies)
        summed = self._combine(node, inside, forwarded, gathered)
        own, foreign = summed.split([len(home.slots), len(across.copies.slots)])
        return self._combine(self.group, across, foreign, own)

    def _gateways(self, slots: torch.Tensor) -> torch.Tensor:
        """(nodes, M) rank that takes the copy of a token, -1 = none of its experts is on the node."""
        count_MR = count_by_rank(self.runtime.tables.rank_of_slot[slots], self.group.size)
        gateways = []
        for node in range(self.group.num_nodes):
            count_MR_here = torch.where(self.runtime.tables.node_of_rank == node, count_MR, 0)
            best, rank = count_MR_here.max(1)  # the first of equals: the lowest rank
            gateways.append(torch.where(best > 0, rank, -1))
        return torch.stack(gateways)

    def _capacity(self, step: Step) -> Capacity | None:
        """No rank sends more copies to one rank than it has tokens."""
        return self._bounded(self.group, list(step.tokens_of_rank))

    def _node_capacity(self, step: Step, node: RankGroup) -> Capacity | None:
        """A gateway forwards its own tokens and at most all tokens of other nodes."""
        own = [step.tokens_of_rank[mate] for mate in self.group.node_ranks]
        foreign = step.num_tokens - sum(own)
        return self._bounded(node, [tokens + foreign for tokens in own])

    @staticmethod
    def _bounded(group: RankGroup, bound: list[int]) -> Capacity | None:
        if not group.short_messages and max(bound) > PADDED_ROWS:
            return None
        return Capacity([bound[group.rank]] * group.size, bound)

    def _dispatch(
        self, group: RankGroup, capacity: Capacity | None, source: torch.Tensor, target: torch.Tensor, copies: Copies
    ) -> Dispatched:
        layout = copies.layout()
        fields = {
            "token": source,
            "slots": copies.slots[source],
            "weights": copies.weights[source],
            "x": copies.hidden[source],
        }
        received = exchange_rows(group, layout, fields, target, capacity=capacity, kind="dispatch")
        self.runtime.counters.copies_sent += len(source)
        return Dispatched(source, received, Copies.unpack(layout, received.rows))

    def _compute_both(self, layer: int, here: Copies, others: Copies) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial sums of own and of received rows, in one pass over the experts: their weights are read once."""
        rows = here.followed_by(others)
        local = self.runtime.tables.local_slots(rows.slots)
        sums = self.runtime.computation.compute(layer, rows.hidden, local, rows.weights)
        own, foreign = sums.split([len(here.slots), len(others.slots)])
        return own, foreign

    def _combine(self, group: RankGroup, sent: Dispatched, partial: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """`local` plus the partial sums that come back for what was sent; `partial` goes to where it came from."""
        returned = partial.new_empty(len(sent.source), partial.shape[1])
        received = sent.received
        group.all_to_all(returned, partial.contiguous(), received.sent, received.counts, kind="combine")
        return local.index_add(0, sent.source, returned)


def count_by_rank(rank_MK: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """(M, R) int64: experts of each token that each rank serves; -1 counts nowhere."""
    count = torch.zeros(len(rank_MK), num_ranks + 1, dtype=torch.int64, device=rank_MK.device)
    column = torch.where(rank_MK >= 0, rank_MK, num_ranks)
    return count.scatter_add_(1, column, torch.ones_like(column))[:, :num_ranks]


def ranks_in_use(rank_MK: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """(M, R) bool: A(t, l) of each token."""
    return count_by_rank(rank_MK, num_ranks) > 0
