"""Exchanges of rows in messages of fixed size: a place that nobody needs says so by the token -1.

Shape letters: R ranks, N rows of this rank, P places for rows sent, Q places for rows received, K top-k, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.capacity import Capacity
from moeplace.runtime.exchange.fixed.counts import pack_messages
from moeplace.runtime.exchange.moves import DeviceMoves
from moeplace.runtime.exchange.row_layout import META, TOKEN, RowLayout

NOBODY = -1
"""The token of a place that holds none."""


@dataclass(frozen=True, eq=False)
class Rooms:
    """Places of the messages of an exchange, on the host and on the device.

    Attributes:
        to_peer: (R,) places of the message to each rank, none to itself.
        from_peer: (R,) places of the message from each rank.
        starts_R: first place of each message that is sent.
        rooms_R: `to_peer`.
        source_Q: the rank that each place for received rows belongs to.
    """

    to_peer: tuple[int, ...]
    from_peer: tuple[int, ...]
    starts_R: torch.Tensor
    rooms_R: torch.Tensor
    source_Q: torch.Tensor

    @classmethod
    def of(cls, capacity: Capacity, *, rank: int, device: torch.device) -> Self:
        """As a rule of capacities says. This is done before steps: it copies to the device."""
        sides = [[0 if p == rank else rows for p, rows in enumerate(s)] for s in (capacity.to_peer, capacity.from_peer)]
        to_R, from_R = (np.array(side, np.int64) for side in sides)
        arrays = (to_R.cumsum() - to_R, to_R, np.repeat(np.arange(len(from_R)), from_R))
        return cls(tuple(sides[0]), tuple(sides[1]), *(torch.from_numpy(array).to(device) for array in arrays))

    @property
    def places(self) -> int:
        """P."""
        return sum(self.to_peer)


class FixedReceived(NamedTuple):
    """What came from others, and what has been sent."""

    values: Mapping[str, torch.Tensor]  # field -> (Q, width)
    token: torch.Tensor  # (Q,) int64, -1 = nobody
    sent: torch.Tensor  # (P,) int64, row of this rank in each place, N = nobody
    exceeded: torch.Tensor  # () bool: rows of this rank had no place


class FixedRowExchange:
    """Exchanges of one kind, one after the other: their messages use the same memory."""

    def __init__(self, group: RankGroup, *, kind: str, back: str) -> None:
        """`kind`, `back`: names under which the exchange, and sums that go back, are counted."""
        self.group, self.kind, self.back = group, kind, back
        self._moves = DeviceMoves(group.device)

    def send(
        self,
        layout: RowLayout,
        token: torch.Tensor,
        values: Mapping[str, torch.Tensor],
        wanted_NR: torch.Tensor,
        rooms: Rooms,
    ) -> FixedReceived:
        """One collective.

        Args:
            layout: of the rows.
            token: (N,) int64 names.
            values: field -> (N, width).
            wanted_NR: bool, who gets a copy of each row; nobody sends to itself.
            rooms: of the messages.
        """
        source_P, exceeded = pack_messages(wanted_NR, rooms.starts_R, rooms.rooms_R, rooms.places)
        message = self._moves.room("sent", rooms.places, layout.row_bytes)
        _fill(message, layout, token, values, source_P)
        received = self._moves.room("received", sum(rooms.from_peer), layout.row_bytes)
        self.group.all_to_all(received, message, rooms.from_peer, rooms.to_peer, kind=self.kind)
        fields = {name: layout.view(received, name) for name in values}
        return FixedReceived(fields, layout.view(received, META)[:, TOKEN].long(), source_P, exceeded)

    def send_back(
        self, sums_QD: torch.Tensor, local_ND: torch.Tensor, sent: FixedReceived, rooms: Rooms
    ) -> torch.Tensor:
        """`local_ND`, to which the sums are added that others give back for what was sent to them: one collective."""
        width = local_ND.shape[1]
        returned_PD = self._moves.room("returned", rooms.places, width, local_ND.dtype)
        self.group.all_to_all(returned_PD, sums_QD.contiguous(), rooms.to_peer, rooms.from_peer, kind=self.back)
        return add_at(local_ND, sent.sent, returned_PD)


def add_at(local_ND: torch.Tensor, row_P: torch.Tensor, value_PD: torch.Tensor) -> torch.Tensor:
    """`local_ND` plus values at rows; row N takes what nobody wants."""
    sums = local_ND.new_zeros(len(local_ND) + 1, local_ND.shape[1])
    sums[:-1] = local_ND
    return sums.index_add_(0, row_P, value_PD)[:-1]


def rows_at(value: torch.Tensor, row_P: torch.Tensor) -> torch.Tensor:
    """(P, width): row N, which does not exist, is any other; zeros where there is none at all."""
    if not len(value):
        return value.new_zeros(len(row_P), *value.shape[1:])
    return value.index_select(0, row_P.clamp(max=len(value) - 1))


def _fill(
    message: torch.Tensor,
    layout: RowLayout,
    token: torch.Tensor,
    values: Mapping[str, torch.Tensor],
    source_P: torch.Tensor,
) -> None:
    meta = layout.view(message, META)
    meta.zero_()
    meta[:, TOKEN] = torch.where(source_P < len(token), rows_at(token, source_P), NOBODY)
    for name, value in values.items():
        layout.view(message, name).copy_(rows_at(value, source_P))
