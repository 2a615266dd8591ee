"""coherent in fixed shapes; see `moeplace.runtime.exchange.coherent`, of which it is the same.

A rank has as many rows in a layer as there is room for, whatever it owns; rows of nobody have the token -1. With
several experts per token the second exchange always takes place, and its rows carry their tokens' names: no rank can
know on the host which sums the others will send.

Shape letters: N rows of this rank before, Q rows that may be here after the exchange, R ranks, D hidden size.
"""

import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.capacity import Capacity
from moeplace.runtime.exchange.coherent import CoherentDispatcher
from moeplace.runtime.exchange.dispatcher import MoeBlock, MoeRuntime, Step, TokenRows, add_outputs
from moeplace.runtime.exchange.fixed.counts import choose_owner, count_by_rank, seat_rows
from moeplace.runtime.exchange.fixed.rows import NOBODY, FixedReceived, FixedRowExchange, Rooms, add_at
from moeplace.runtime.exchange.fixed.slots import FixedSlots
from moeplace.runtime.exchange.fixed.step import StepNotes
from moeplace.runtime.exchange.row_layout import RowLayout


class FixedCoherent:
    """One all-to-all per MoE layer, two where tokens have several experts; see `FixedDispatcher`."""

    def __init__(self, exact: CoherentDispatcher) -> None:
        """`exact` runs steps again that did not have room; its rules say how much there is."""
        self._exact = exact
        self.runtime: MoeRuntime = exact.runtime
        self.group: RankGroup = exact.group
        self.notes = StepNotes()
        self._slots = FixedSlots(self.runtime)
        self._exchange = FixedRowExchange(self.group, kind="dispatch", back="return")
        self._return = FixedRowExchange(self.group, kind="return", back="return")

    def forward(self, layer: int, block: MoeBlock, rows: TokenRows, step: Step) -> TokenRows:
        """See `TokenDispatcher`. K/V are shared when the layers are done: the step has no ledger."""
        assert step.ledger is None, "row counts do not travel in fixed shapes"
        if not step.num_tokens:
            return rows
        hidden = block.normalise(rows.x)
        slots, weights = self._slots.choose(layer, block, hidden, rows.token, self.notes)
        with self.group.layer(layer, mode="coherent"):
            return self._move(layer, block, rows, slots, weights, step)

    def _move(
        self, layer: int, block: MoeBlock, rows: TokenRows, slots: torch.Tensor, weights: torch.Tensor, step: Step
    ) -> TokenRows:
        rank, top_k = self.group.rank, slots.shape[1]
        rules = self._exact.rules_for(top_k)
        rooms = self._rooms(rules.dispatch.capacity(layer, step))
        wanted_NR = self._count(slots) > 0
        stays_N = (rows.token != NOBODY) & (wanted_NR[:, rank] | ~wanted_NR.any(1))
        wanted_NR[:, rank] = False
        received = self._send(rows, slots, weights, wanted_NR, rooms)
        here = _join(rows, stays_N, slots, weights, received)
        room = min(rules.held.rows(layer, step), len(here["token"]))
        if top_k == 1:
            here = self._seat(here, here["token"] != NOBODY, room)
        hidden = block.normalise(here["x"])
        local = self.runtime.tables.local_slots(here["slots"])
        sums = self.runtime.computation.compute_fixed(layer, hidden, local, here["weights"])
        if top_k > 1:
            before = torch.cat([torch.full_like(rows.token, rank), rooms.source_Q])
            owner = choose_owner(self._count(here["slots"]), before)
            owner = torch.where(here["token"] == NOBODY, NOBODY, owner)
            back = self._rooms(rules.back.capacity(layer, step))
            sums = self._collect(sums, here["token"], owner, back, step)
            here = self._seat({**here, "sums": sums, "hidden": hidden}, owner == rank, room)
            sums, hidden = here["sums"], here["hidden"]
        return TokenRows(add_outputs(here["x"], sums, block.shared(hidden)), here["token"])

    def _send(
        self, rows: TokenRows, slots: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor, rooms: Rooms
    ) -> FixedReceived:
        layout = RowLayout.of_tokens(slots.shape[1], weights=weights, x=rows.x)
        values = {"slots": slots, "weights": weights, "x": rows.x}
        received = self._exchange.send(layout, rows.token, values, wanted, rooms)
        self.notes.exceeded.append(received.exceeded)
        return received

    def _seat(self, here: dict[str, torch.Tensor], wanted: torch.Tensor, room: int) -> dict[str, torch.Tensor]:
        """The rows that are wanted in `room` rows; the others are nobody's."""
        seated = seat_rows(wanted, room)
        self.notes.exceeded.append(seated.exceeded)
        found = {name: value.index_select(0, seated.row) for name, value in here.items()}
        nobody = ~wanted.index_select(0, seated.row)
        found["token"] = found["token"].masked_fill(nobody, NOBODY)
        found["slots"] = found["slots"].masked_fill(nobody[:, None], -1)
        return found

    def _collect(
        self, sums_QD: torch.Tensor, token_Q: torch.Tensor, owner_Q: torch.Tensor, rooms: Rooms, step: Step
    ) -> torch.Tensor:
        """Sums (Q, D) of the tokens that this rank owns now complete; those of others are sent to their owners."""
        rank, rows = self.group.rank, len(token_Q)
        wanted_QR = owner_Q[:, None] == torch.arange(self.group.size, device=owner_Q.device)
        wanted_QR[:, rank] = False
        layout = RowLayout.of(x=(sums_QD.dtype, sums_QD.shape[1]))
        returned = self._return.send(layout, token_Q, {"x": sums_QD}, wanted_QR, rooms)
        self.notes.exceeded.append(returned.exceeded)
        # Where each token is that this rank owns; one more entry takes all that it does not.
        row_T = torch.full((step.num_tokens + 1,), rows, dtype=torch.int64, device=token_Q.device)
        name_Q = torch.where(owner_Q == rank, token_Q, step.num_tokens)
        row_T.scatter_(0, name_Q, torch.arange(rows, device=token_Q.device))
        row_T[step.num_tokens :] = rows
        row = row_T[torch.where(returned.token == NOBODY, step.num_tokens, returned.token)]
        return add_at(sums_QD, row, returned.values["x"])

    def _count(self, slots: torch.Tensor) -> torch.Tensor:
        return count_by_rank(self.runtime.tables.rank_of_slot[slots], self.group.size)

    def _rooms(self, capacity: Capacity) -> Rooms:
        return self._slots.rooms(capacity, self.group.rank, self.group.device)


def _join(
    rows: TokenRows, stays_N: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, received: FixedReceived
) -> dict[str, torch.Tensor]:
    """Rows that may be here now: (Q, width) of each field. Those that have left are nobody's."""
    token = torch.cat([torch.where(stays_N, rows.token, NOBODY), received.token])
    arrived = received.values["slots"].long()
    joined = torch.where(token[:, None] == NOBODY, -1, torch.cat([slots, arrived]))
    return {
        "token": token,
        "slots": joined,
        "weights": torch.cat([weights, received.values["weights"]]),
        "x": torch.cat([rows.x, received.values["x"]]),
    }
