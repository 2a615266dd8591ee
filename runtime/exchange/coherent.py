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

from dataclasses import dataclass

import numpy as np
import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.capacity import (
    CapacityRule,
    HeldRows,
    OwnerMeans,
    ReturnMeans,
    make_rule,
    owned_shares,
    use_of_ranks,
)
from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime, Step, TokenRows, add_outputs
from moeplace.runtime.exchange.host_counts import choose_owner, count_by_rank
from moeplace.runtime.exchange.moves import Moves, make_moves
from moeplace.runtime.exchange.rows import SPREAD, Outgoing, Received, RowExchange, TokenCopies


@dataclass(frozen=True, eq=False)
class _Gathered:
    """Rows on this rank after the first exchange: those that stayed, then those that came.

    Attributes:
        x: (N, D) residual stream.
        hidden: (N, D) normalised.
        token: (N,) int64 names on the host.
        slots: (N, K) int64 global slots.
        before: (N,) int64 the rank that owned each.
        names: `token` on the device, where it is the tensor that rows came with.
    """

    x: torch.Tensor
    hidden: torch.Tensor
    token: np.ndarray
    slots: np.ndarray
    before: np.ndarray
    names: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class CoherentRules:
    """Rooms of the messages of both exchanges, and of the rows that a rank owns after a layer."""

    dispatch: CapacityRule
    back: CapacityRule
    held: HeldRows


class CoherentDispatcher:
    """One all-to-all per MoE layer; a second one in layers where some token has experts on several ranks."""

    def __init__(self, runtime: MoeRuntime, group: RankGroup, *, capacity: CapacityRule | None = None) -> None:
        self.runtime, self.group = runtime, group
        self._rank_of_slot = runtime.tables.rank_of_slot.cpu().numpy()
        self._moves: Moves = make_moves(group.device)
        self._exchange = RowExchange(group, make_moves(group.device), kind="dispatch")
        self._capacity = capacity
        self._rules: CoherentRules | None = None  # made when the first tokens tell how many experts they have

    def forward(self, layer: int, block: MoeBlock, rows: TokenRows, step: Step) -> TokenRows:
        """See `TokenDispatcher`. The row count of the step's ledger travels in the headers."""
        hidden = block.normalise(rows.x)
        slots, weights = self.runtime.choose_on_host(layer, block, hidden, rows.token)
        copies = TokenCopies(rows.names_on_host(), slots, {"weights": weights, "x": rows.x})
        with self.group.layer(layer, mode="coherent"):
            moved = self._move(layer, block, rows, hidden, copies, step)
        self.rules_for(slots.shape[1]).held.observe(layer, step, len(moved))
        return moved

    def _move(
        self, layer: int, block: MoeBlock, rows: TokenRows, hidden: torch.Tensor, copies: TokenCopies, step: Step
    ) -> TokenRows:
        runtime, rank = self.runtime, self.group.rank
        wanted_MR = count_by_rank(self._rank_of_slot[copies.slots], self.group.size) > 0
        flags = SPREAD if (np.count_nonzero(wanted_MR, axis=1) > 1).any() else 0
        stays = np.flatnonzero(wanted_MR[:, rank] | ~wanted_MR.any(axis=1))
        wanted_MR[:, rank] = False
        received = self._dispatch(layer, copies, Outgoing.of(wanted_MR), flags, step)
        here = self._gather(block, rows, hidden, copies, stays, received)
        weights = self._join(copies.values["weights"], stays, received, "weights")
        partial = runtime.compute(layer, here.hidden, here.slots, weights)
        if not received.flags & SPREAD:
            runtime.counters.single_exchange += 1
            return self._rows(add_outputs(here.x, partial, block.shared(here.hidden)), here.token, here.names)
        count_NR = count_by_rank(self._rank_of_slot[here.slots], self.group.size)
        owner = choose_owner(count_NR, here.before)
        mine = np.flatnonzero(owner == rank)
        routed = self._collect(layer, partial, here.token, count_NR, owner, step)
        if len(mine) == len(owner):
            return self._rows(add_outputs(here.x, routed, block.shared(here.hidden)), here.token, here.names)
        index = self._moves.index(mine)
        x, kept = here.x.index_select(0, index), here.hidden.index_select(0, index)
        return self._rows(add_outputs(x, routed, block.shared(kept)), here.token[mine], None)

    def _rows(self, x: torch.Tensor, token: np.ndarray, names: torch.Tensor | None) -> TokenRows:
        return TokenRows(x, self._moves.index(token) if names is None else names, token)

    def _dispatch(self, layer: int, copies: TokenCopies, outgoing: Outgoing, flags: int, step: Step) -> Received:
        ledger = step.ledger
        held = 0 if ledger is None else ledger.num_rows
        rule = self.rules_for(copies.slots.shape[1]).dispatch
        capacity = rule.capacity(layer, step)
        pending = self._exchange.start(copies.layout(), copies, outgoing, capacity=capacity, flags=flags, extra=held)
        received = pending.finish()
        rule.observe(layer, step, outgoing.counts, received.counts)
        if ledger is not None:
            ledger.announce([held if p == self.group.rank else n for p, n in enumerate(received.extras)])
        self.runtime.counters.copies_sent += len(outgoing.source)
        return received

    def rules_for(self, top_k: int) -> CoherentRules:
        """Rooms for tokens with so many experts; alike on all ranks, which must use them in the same passes."""
        if self._rules is None:
            tables, group = self.runtime.tables, self.group
            use_LR, owned_R = use_of_ranks(tables, top_k), owned_shares(tables)
            means = OwnerMeans(use_LR, owned_R), ReturnMeans(use_LR)
            dispatch, back = (make_rule(group, one, num_layers=tables.num_layers) for one in means)
            held = HeldRows(float(owned_R[group.rank]), tables.num_layers, expected=not group.short_messages)
            self._rules = CoherentRules(self._capacity or dispatch, back, held)
        return self._rules

    def _join(self, own: torch.Tensor, stays: np.ndarray, received: Received, name: str) -> torch.Tensor:
        """A field of the rows that stay, then of those that came."""
        kept = None if len(stays) == len(own) else stays
        return own if kept is None and not len(received.place) else received.join(self._moves, own, kept, name)

    def _gather(
        self,
        block: MoeBlock,
        rows: TokenRows,
        hidden: torch.Tensor,
        copies: TokenCopies,
        stays: np.ndarray,
        received: Received,
    ) -> _Gathered:
        rank = self.group.rank
        if len(stays) == len(rows) and not len(received.place):  # nothing came or went
            before = np.full(len(stays), rank)
            return _Gathered(rows.x, hidden, copies.token, copies.slots, before, rows.token)
        x = self._join(rows.x, stays, received, "x")
        return _Gathered(
            x,
            block.normalise(x),
            np.concatenate([copies.token[stays], received.token]),
            np.concatenate([copies.slots[stays], received.slots]),
            np.concatenate([np.full(len(stays), rank), received.source()]),
            None,
        )

    def _collect(
        self,
        layer: int,
        partial: torch.Tensor,
        token: np.ndarray,
        count_NR: np.ndarray,
        owner: np.ndarray,
        step: Step,
    ) -> torch.Tensor:
        """Sums of the tokens this rank owns now, in the order of their rows; partial sums of others are sent off."""
        rank, size = self.group.rank, self.group.size
        mine, leaving = np.flatnonzero(owner == rank), np.flatnonzero(owner != rank)
        leaving = leaving[np.lexsort((token[leaving], owner[leaving]))]  # by owner, then by token
        sizes = np.bincount(owner[leaving], minlength=size).tolist()
        # Every other rank in use for a token of mine sends one row, in the order of tokens.
        by_token = token[mine].argsort()
        helped = count_NR[mine][by_token] > 0
        helped[:, rank] = False
        source, position = helped.T.nonzero()
        expected = np.bincount(source, minlength=size).tolist()
        sums = self._moves.room("returned", len(position), partial.shape[1], partial.dtype)
        assert self._rules is not None
        self._rules.back.observe(layer, step, sizes, expected)
        self.runtime.counters.copies_sent += len(leaving)
        index = self._moves.index
        off = partial.index_select(0, index(leaving))
        self.group.all_to_all(sums, off, expected, sizes, kind="return")
        own = partial if len(mine) == len(owner) else partial.index_select(0, index(mine))
        return own.index_add_(0, index(by_token[position]), sums) if len(position) else own
