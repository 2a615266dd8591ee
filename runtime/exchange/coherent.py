"""coherent: a token stays where its experts ran. Every rank holds the K/V of every sequence.

    owner o --- x, slots, weights: one copy per rank of A except o --->  ranks of A
    ranks of A except n --- partial sum --->  new owner n             (only if some token has |A| > 1)

The residual stream travels, and its norm is computed again where it arrives. The new owner is the rank of A that serves
most of the token's experts; ties go to the current owner, then to the lowest rank. Every holder of a copy can work that
out, since copies carry all slots of the token: partial sums need neither header nor sizes, because both sides list
them in the order of the tokens. A token without experts stays.

With one expert per token a layer is one all-to-all. Whether any token of any rank needs the second exchange is in the
flags of the first.

Shape letters: M tokens of this rank before, N rows on it after the exchange, K top-k, R ranks.
"""

from typing import Protocol

import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.dispatch_combine import count_by_rank
from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime, Step, TokenRows, add_outputs
from moeplace.runtime.exchange.rows import META, SPREAD, TOKEN, Capacity, Received, RowLayout, exchange_rows


class CapacityRule(Protocol):
    """How many rows fit into the message of a pair of ranks; a function of what both ranks know."""

    def rows(self, layer: int, source: int, target: int, step: Step) -> int:
        """Room for copies from `source` to `target` in MoE layer `layer`."""


class BatchCapacity:
    """Room for the whole batch: never exceeded. Costs nothing on the wire where messages may be short."""

    def rows(self, layer: int, source: int, target: int, step: Step) -> int:
        """See `CapacityRule`."""
        return step.num_tokens


class CoherentDispatcher:
    """One all-to-all per MoE layer; a second one in layers where some token has experts on several ranks."""

    def __init__(self, runtime: MoeRuntime, group: RankGroup, *, capacity: CapacityRule | None = None) -> None:
        self.runtime, self.group = runtime, group
        self.capacity = BatchCapacity() if capacity is None else capacity

    def forward(self, layer: int, block: MoeBlock, rows: TokenRows, step: Step) -> TokenRows:
        """See `TokenDispatcher`. The row count of the step's ledger travels in the headers."""
        hidden = block.normalise(rows.x)
        slots, weights = self.runtime.choose(layer, block, hidden, rows.token)
        with self.group.layer(layer, mode="coherent"):
            return self._move(layer, block, rows, hidden, slots, weights, step)

    def _move(
        self,
        layer: int,
        block: MoeBlock,
        rows: TokenRows,
        hidden_M: torch.Tensor,
        slots_MK: torch.Tensor,
        weights_MK: torch.Tensor,
        step: Step,
    ) -> TokenRows:
        runtime, rank = self.runtime, self.group.rank
        count_MR = count_by_rank(runtime.tables.rank_of_slot[slots_MK], self.group.size)
        layout = _layout(rows.x, slots_MK, weights_MK)
        fields = {"token": rows.token, "slots": slots_MK, "weights": weights_MK, "x": rows.x}
        received = self._dispatch(layer, layout, fields, count_MR, step)
        stays = (count_MR[:, rank] > 0) | (count_MR.sum(1) == 0)
        arrived = received.rows
        # Rows on this rank now: those that stayed, then those that came.
        x = torch.cat([rows.x[stays], layout.view(arrived, "x")])
        token = torch.cat([rows.token[stays], layout.view(arrived, META)[:, TOKEN].long()])
        slots = torch.cat([slots_MK[stays], layout.view(arrived, "slots").long()])
        weights = torch.cat([weights_MK[stays], layout.view(arrived, "weights")])
        hidden = torch.cat([hidden_M[stays], block.normalise(layout.view(arrived, "x"))])
        before = torch.cat([torch.full_like(token[: len(token) - len(arrived)], rank), received.source()])
        partial = runtime.computation.compute(layer, hidden, runtime.tables.local_slots(slots), weights)
        if not received.flags & SPREAD:
            runtime.counters.single_exchange += 1
            return TokenRows(add_outputs(x, partial, block.shared(hidden)), token)
        count_NR = count_by_rank(runtime.tables.rank_of_slot[slots], self.group.size)
        owner = choose_owner(count_NR, before)
        mine = owner == rank
        routed = self._collect(partial, token, count_NR, owner)
        return TokenRows(add_outputs(x[mine], routed, block.shared(hidden[mine])), token[mine])

    def _dispatch(
        self,
        layer: int,
        layout: RowLayout,
        fields: dict[str, torch.Tensor],
        count_MR: torch.Tensor,
        step: Step,
    ) -> Received:
        in_use = count_MR > 0
        spread = bool((in_use.sum(1) > 1).any())
        in_use[:, self.group.rank] = False
        target, source = in_use.t().nonzero(as_tuple=True)
        ledger = step.ledger
        held = 0 if ledger is None else ledger.num_rows
        received = exchange_rows(
            self.group,
            layout,
            {name: value[source] for name, value in fields.items()},
            target,
            capacity=self._capacity(layer, step),
            flags=SPREAD if spread else 0,
            extra=held,
            kind="dispatch",
        )
        if ledger is not None:
            ledger.announce([held if p == self.group.rank else n for p, n in enumerate(received.extras)])
        self.runtime.counters.copies_sent += len(source)
        return received

    def _capacity(self, layer: int, step: Step) -> Capacity:
        rank, rule = self.group.rank, self.capacity
        return Capacity(
            [rule.rows(layer, rank, peer, step) for peer in range(self.group.size)],
            [rule.rows(layer, peer, rank, step) for peer in range(self.group.size)],
        )

    def _collect(
        self, partial: torch.Tensor, token: torch.Tensor, count_NR: torch.Tensor, owner: torch.Tensor
    ) -> torch.Tensor:
        """Sums of the tokens this rank owns now, in the order of their rows; partial sums of others are sent off."""
        rank, size = self.group.rank, self.group.size
        mine = owner == rank
        leaving = (~mine).nonzero().squeeze(1)
        leaving = leaving[token[leaving].argsort()]
        leaving = leaving[owner[leaving].argsort(stable=True)]  # by owner, then by token
        sizes = torch.bincount(owner[leaving], minlength=size).tolist()
        # Every other rank in use for a token of mine sends one row, in the order of tokens.
        by_token = token[mine].argsort()
        helped = count_NR[mine][by_token] > 0
        helped[:, rank] = False
        source, position = helped.t().nonzero(as_tuple=True)
        expected = torch.bincount(source, minlength=size).tolist()
        sums = partial.new_empty(len(position), partial.shape[1])
        self.runtime.counters.copies_sent += len(leaving)
        self.group.all_to_all(sums, partial[leaving], expected, sizes, kind="return")
        return partial[mine].index_add_(0, by_token[position], sums)


def choose_owner(count_NR: torch.Tensor, before_N: torch.Tensor) -> torch.Tensor:
    """(N,) int64 new owner of each token.

    The rank that serves most of its experts; ties go to the owner before, then to the lowest rank; a token without
    experts stays.

    Args:
        count_NR: (N, R) experts of each token on each rank.
        before_N: (N,) owner before.
    """
    ranks = count_NR.shape[1]
    index_R = torch.arange(ranks, device=count_NR.device)
    score_NR = (2 * count_NR + (index_R == before_N[:, None])) * ranks + (ranks - 1 - index_R)
    return torch.where(count_NR.any(1), torch.where(count_NR > 0, score_NR, -1).argmax(1), before_N)


def _layout(x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> RowLayout:
    top_k = slots.shape[1]
    return RowLayout.of(slots=(torch.int32, top_k), weights=(weights.dtype, top_k), x=(x.dtype, x.shape[1]))
