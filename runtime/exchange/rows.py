"""Rows on the wire: a token's hidden row with its header, and the exchange that moves such rows in one collective.

A message from one rank to another is a block of equal rows (`row_layout`); its header lies in the first row: `count`
says how many rows the message means, so no sizes are exchanged beforehand. An empty message is one row with count 0.
Both sides know how many rows fit (`capacity`). What exceeds it follows in an extra round with exact sizes, of which
every rank learns from the flags of the first round: all messages of a rank carry the same flags, and every rank hears
from every other.

Shape letters: R ranks, M rows of this rank, n copies to send, N rows received.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from moeplace.runtime.comm.group import PendingExchange, RankGroup
from moeplace.runtime.exchange.capacity import Capacity
from moeplace.runtime.exchange.moves import Moves
from moeplace.runtime.exchange.row_layout import COUNT, META_WIDTH, TOKEN, RowLayout

OVERFLOW = 1
"""Flag: some message of this rank exceeds its capacity."""
SPREAD = 2
"""Flag: some token of this rank has experts on several ranks."""


@dataclass(frozen=True, eq=False)
class TokenCopies:
    """Rows of this rank that can be sent.

    Attributes:
        token: (M,) int64 names.
        slots: (M, K) int64 global slots, -1 = none.
        values: field -> (M, width) tensors.
    """

    token: np.ndarray
    slots: np.ndarray
    values: Mapping[str, torch.Tensor]

    def layout(self) -> RowLayout:
        """How such rows travel."""
        return RowLayout.of_tokens(self.slots.shape[1], weights=self.values["weights"], x=self.values["x"])


@dataclass(frozen=True, eq=False)
class Outgoing:
    """Which row goes to whom.

    Attributes:
        source: (n,) int64 rows of this rank, by rank they go to, ascending within each.
        counts: rows for each rank.
    """

    source: np.ndarray
    counts: list[int]

    @classmethod
    def of(cls, wanted_MR: np.ndarray) -> Self:
        """From who wants a copy of each row; nobody sends to itself."""
        return cls(wanted_MR.T.nonzero()[1], np.count_nonzero(wanted_MR, axis=0).tolist())


@dataclass(frozen=True, eq=False)
class Received:
    """What an exchange brought.

    Attributes:
        layout: of the rows.
        message: (., row_bytes) uint8, the rows among others; memory that the next exchange of the same kind takes.
        place: (N,) int64, rows of `message`, by source rank, in the order in which the source listed them.
        token: (N,) int64 their names.
        slots: (N, K) int64.
        counts: rows from each rank.
        extras: the `extra` of each rank.
        flags: flags of all ranks, or-ed: equal on every rank.
    """

    layout: RowLayout
    message: torch.Tensor
    place: np.ndarray
    token: np.ndarray
    slots: np.ndarray
    counts: list[int]
    extras: list[int]
    flags: int

    def source(self) -> np.ndarray:
        """(N,) int64, the rank each row came from."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def join(self, moves: Moves, own: torch.Tensor, kept: np.ndarray | None, name: str) -> torch.Tensor:
        """Rows `kept` of a tensor (None = all), then a field of what was received."""
        return moves.join(own, kept, self.message, self.layout.fields[name], self.place)


class RowExchange:
    """Exchanges of one kind, one after the other: their messages use the same memory."""

    def __init__(self, group: RankGroup, moves: Moves, *, kind: str) -> None:
        """`kind`: the name under which collectives are counted, and memory kept."""
        self.group, self.kind = group, kind
        self._moves = moves
        self._is_under_way = False

    def start(
        self,
        layout: RowLayout,
        copies: TokenCopies,
        outgoing: Outgoing,
        *,
        capacity: Capacity,
        flags: int = 0,
        extra: int = 0,
    ) -> "PendingRows":
        """Send copies off; all ranks of the group must start and finish together.

        Args:
            capacity: see `Capacity`.
            flags: flags of this rank beside OVERFLOW.
            extra: a number for every other rank.
        """
        assert not self._is_under_way, f"the {self.kind} before has not been finished, and its memory is in use"
        self._is_under_way = True
        rank, wanted = self.group.rank, np.array(outgoing.counts)
        room_R, from_R = _room(capacity.to_peer, rank), _room(capacity.from_peer, rank)
        fits = np.minimum(wanted, room_R)
        if (fits < wanted).any():
            flags |= OVERFLOW
        # What nobody meant to send is one row with count 0, or the whole room where messages cannot be short.
        sizes = np.minimum(np.maximum(fits, 1), room_R) if self.group.short_messages else room_R
        index = np.arange(len(outgoing.source)) - np.repeat(np.cumsum(wanted) - wanted, wanted)  # in its message
        target = np.repeat(np.arange(len(wanted)), wanted)
        sent = index < fits[target]
        starts = np.cumsum(sizes) - sizes
        heads = np.zeros((int(sizes.sum()), layout.head_words), np.int32)
        peers = np.flatnonzero(sizes)
        heads[starts[peers], COUNT] = wanted[peers]
        heads[starts[peers], COUNT + 1 : META_WIDTH] = flags, extra
        place = (starts[target] + index)[sent]
        first = self._pack(layout, copies, outgoing.source[sent], heads, place, self.kind)
        incoming = self._moves.room(f"{self.kind} received", int(from_R.sum()), layout.row_bytes)
        work = self.group.start_all_to_all(incoming, first, from_R.tolist(), sizes.tolist(), kind=self.kind)
        rest = outgoing.source[~sent], (wanted - fits).tolist()
        return PendingRows(self, layout, copies, work, incoming, from_R, rest, flags)

    def _pack(
        self,
        layout: RowLayout,
        copies: TokenCopies,
        source: np.ndarray,
        heads: np.ndarray,
        place: np.ndarray,
        name: str,
    ) -> torch.Tensor:
        """A message with some rows of this rank in places of it."""
        heads[place, TOKEN] = copies.token[source]
        heads[place, META_WIDTH : META_WIDTH + copies.slots.shape[1]] = copies.slots[source]
        message = self._moves.room(f"{name} sent", len(heads), layout.row_bytes)
        self._moves.pack(message, layout, heads, place, source, copies.values)
        return message

    def _send_rest(
        self, layout: RowLayout, copies: TokenCopies, rest: tuple[np.ndarray, list[int]], missing: list[int]
    ) -> torch.Tensor:
        """The extra round: what did not fit, with sizes that both sides know by now."""
        self.group.counters.overflows += 1
        source, sizes = rest
        heads = np.zeros((len(source), layout.head_words), np.int32)
        message = self._pack(layout, copies, source, heads, np.arange(len(source)), f"{self.kind} rest")
        late = self._moves.room(f"{self.kind} rest received", sum(missing), layout.row_bytes)
        self.group.all_to_all(late, message, missing, sizes, kind=f"{self.kind} rest")
        return late

    def _heads_of(self, message: torch.Tensor, layout: RowLayout) -> np.ndarray:
        """What the rows of a message begin with, once it is here; no numbers of one that was given up."""
        heads = self._moves.heads(message, layout)
        self.group.raise_if_lost()
        return heads

    def _end(self) -> None:
        self._is_under_way = False


@dataclass(frozen=True, eq=False)
class PendingRows:
    """Rows on their way; `finish` ends it.

    Attributes:
        exchange: whose they are.
        layout: of the rows.
        copies: what they are copies of.
        work: the collective.
        incoming: where those of others will be, `rooms` rows for each rank.
        rooms: (R,) int64.
        rest: rows of this rank that did not fit, and how many for each rank.
        flags: of this rank.
    """

    exchange: RowExchange
    layout: RowLayout
    copies: TokenCopies
    work: PendingExchange
    incoming: torch.Tensor
    rooms: np.ndarray
    rest: tuple[np.ndarray, list[int]]
    flags: int

    def finish(self) -> Received:
        """Wait for the rows of other ranks; what did not fit follows in a collective more.

        Raises:
            PeerLostError: a peer is gone.
        """
        self.work.wait()
        exchange, message = self.exchange, self.incoming
        heads = exchange._heads_of(message, self.layout)
        starts, peers = np.cumsum(self.rooms) - self.rooms, np.flatnonzero(self.rooms)
        told_R3 = np.zeros((len(self.rooms), META_WIDTH - COUNT), np.int64)
        told_R3[peers] = heads[starts[peers], COUNT:META_WIDTH]
        counts, flags = told_R3[:, 0], int(np.bitwise_or.reduce(told_R3[:, 1], initial=self.flags))
        arrived = np.minimum(counts, self.rooms)
        place = _ranges(starts, arrived)
        if flags & OVERFLOW:
            missing = counts - arrived
            late = exchange._send_rest(self.layout, self.copies, self.rest, missing.tolist())
            heads = np.concatenate([heads, exchange._heads_of(late, self.layout)])
            message = torch.cat([message, late])
            place = np.concatenate([place, np.arange(len(self.incoming), len(message))])
            source = np.concatenate([np.repeat(np.arange(len(counts)), part) for part in (arrived, missing)])
            place = place[source.argsort(kind="stable")]
        head_N = heads[place]
        exchange._end()
        return Received(
            self.layout,
            message,
            place,
            head_N[:, TOKEN].astype(np.int64),
            head_N[:, META_WIDTH : META_WIDTH + self.copies.slots.shape[1]].astype(np.int64),
            counts.tolist(),
            told_R3[:, 2].tolist(),
            flags,
        )


def _room(capacity: Sequence[int], rank: int) -> np.ndarray:
    """(R,) int64 rows of each message: at least the one that carries the header, none to oneself."""
    room_R = np.maximum(np.asarray(capacity, np.int64), 1)
    room_R[rank] = 0
    return room_R


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(sum of sizes,) int64: start, start + 1, ... of each range, one range after the other."""
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)
