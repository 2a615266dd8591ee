"""Rows on the wire: a token's hidden row with its header, and the exchange that moves such rows in one collective.

A message from one rank to another is a block of equal rows; its header lies in the first row:

    row    | meta: token, count, flags, extra | slots (K) | gate weights (K) | x (D) |
             int32 x 4                           int32       float             hidden type

`count` says how many rows the message means, so no sizes are exchanged beforehand. An empty message is one row with
count 0. Both sides know how many rows fit (the capacity). What exceeds it follows in an extra round with exact sizes,
of which every rank learns from the flags of the first round: all messages of a rank carry the same flags, and every
rank hears from every other.

Shape letters: R ranks, n copies to send, N rows received.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moeplace.runtime.comm.group import RankGroup

META = "meta"
META_WIDTH = 4
TOKEN, COUNT, FLAGS, EXTRA = range(META_WIDTH)

OVERFLOW = 1
"""Flag: some message of this rank exceeds its capacity."""
SPREAD = 2
"""Flag: some token of this rank has experts on several ranks."""

_ALIGNMENT = 8  # every field starts where any element type may start


@dataclass(frozen=True)
class RowField:
    """A field of a row: `width` elements of `dtype`, `offset` bytes from its start."""

    offset: int
    dtype: torch.dtype
    width: int

    @property
    def end(self) -> int:
        return self.offset + self.width * self.dtype.itemsize


@dataclass(frozen=True)
class RowLayout:
    """Where the fields of a row are.

    Attributes:
        fields: name -> field; every layout has "meta".
        row_bytes: size of a row, a multiple of 8.
    """

    fields: Mapping[str, RowField]
    row_bytes: int

    @classmethod
    def of(cls, **fields: tuple[torch.dtype, int]) -> "RowLayout":
        """A layout from name=(type, width), "meta" in front."""
        placed: dict[str, RowField] = {}
        end = 0
        for name, (dtype, width) in {META: (torch.int32, META_WIDTH), **fields}.items():
            placed[name] = RowField(end, dtype, width)
            end = -(-placed[name].end // _ALIGNMENT) * _ALIGNMENT
        return cls(placed, end)

    def view(self, rows: torch.Tensor, name: str) -> torch.Tensor:
        """(n, width) view of a field of (n, row_bytes) uint8 rows."""
        field = self.fields[name]
        return rows[:, field.offset : field.end].view(field.dtype)


@dataclass(frozen=True)
class Capacity:
    """Rows that fit into the first round, known to both sides of every pair.

    Attributes:
        to_peer: (R,) rows of the message to each rank.
        from_peer: (R,) rows of the message from each rank.
    """

    to_peer: Sequence[int]
    from_peer: Sequence[int]


@dataclass(frozen=True, eq=False)
class Received:
    """What an exchange brought.

    Attributes:
        rows: (N, row_bytes) uint8, by source rank, in the order in which the source listed them.
        sent: rows sent to each rank.
        counts: rows from each rank.
        extras: the `extra` of each rank.
        flags: flags of all ranks, or-ed: equal on every rank.
    """

    rows: torch.Tensor
    sent: list[int]
    counts: list[int]
    extras: list[int]
    flags: int

    def source(self) -> torch.Tensor:
        """(N,) int64, the rank each row came from."""
        counts = torch.tensor(self.counts, device=self.rows.device)
        return torch.repeat_interleave(torch.arange(len(self.counts), device=counts.device), counts)


def exchange_rows(
    group: RankGroup,
    layout: RowLayout,
    fields: Mapping[str, torch.Tensor],
    target: torch.Tensor,
    *,
    capacity: Capacity | None,
    flags: int = 0,
    extra: int = 0,
    kind: str,
) -> Received:
    """Send each copy to its target rank: one all-to-all, and a second one only where some capacity is exceeded.

    Args:
        group: all its ranks must call this together.
        layout: of the rows.
        fields: name -> (n, width) values; "token" -> (n,) goes into the header.
        target: (n,) int64 rank of each copy, ascending, never this rank.
        capacity: see `Capacity`; None = exchange sizes first, in a small collective of their own.
        flags: flags of this rank beside OVERFLOW.
        extra: a number for every other rank.
        kind: the name under which the collective is counted.
    """
    wanted: list[int] = torch.bincount(target, minlength=group.size).tolist()  # split sizes: the host needs them
    copies = _pack(layout, fields)
    if capacity is None:
        return _exchange_sized(group, copies, wanted, flags, extra, kind)
    return _exchange_bounded(group, layout, copies, wanted, capacity, flags, extra, kind)


def _exchange_sized(
    group: RankGroup, copies: torch.Tensor, wanted: list[int], flags: int, extra: int, kind: str
) -> Received:
    """Sizes in one collective, rows in the next."""
    mine = torch.tensor([[count, flags, extra] for count in wanted], dtype=torch.int64, device=copies.device)
    theirs = torch.empty_like(mine)
    group.all_to_all(theirs, mine, [1] * group.size, [1] * group.size, kind=f"{kind} sizes")
    counts, peer_flags, extras = theirs.t().tolist()
    incoming = copies.new_empty(sum(counts), copies.shape[1])
    group.all_to_all(incoming, copies, counts, wanted, kind=kind)
    return Received(incoming, wanted, counts, extras, _union(flags, peer_flags))


def _exchange_bounded(
    group: RankGroup,
    layout: RowLayout,
    copies: torch.Tensor,
    wanted: list[int],
    capacity: Capacity,
    flags: int,
    extra: int,
    kind: str,
) -> Received:
    """One collective; headers inside; the rest, if any, in another."""
    room_to = _room(capacity.to_peer, group.rank)
    fits = [min(n, room) for n, room in zip(wanted, room_to, strict=True)]
    if fits != wanted:
        flags |= OVERFLOW
    # What nobody meant to send is one row with count 0, or the whole room where messages cannot be short.
    sizes = [min(max(n, 1), room) for n, room in zip(fits, room_to, strict=True)] if group.short_messages else room_to
    outgoing = _place(copies, wanted, fits, sizes)
    _write_headers(layout, outgoing, sizes, wanted, flags, extra)
    rooms = _room(capacity.from_peer, group.rank)
    incoming = outgoing.new_empty(sum(rooms), layout.row_bytes)
    group.all_to_all(incoming, outgoing, rooms, sizes, kind=kind)
    headers = _read_headers(layout, incoming, rooms)
    counts, peer_flags, extras = ([header[i] for header in headers] for i in range(3))
    blocks = _blocks(incoming, rooms, counts)
    flags = _union(flags, peer_flags)
    if flags & OVERFLOW:
        blocks = _exchange_rest(group, copies, wanted, fits, blocks, counts, kind)
    return Received(torch.cat(blocks), wanted, counts, extras, flags)


def _room(capacity: Sequence[int], rank: int) -> list[int]:
    """Rows of each message: at least the one that carries the header, none to oneself."""
    return [0 if peer == rank else max(rows, 1) for peer, rows in enumerate(capacity)]


def _union(flags: int, others: Sequence[int]) -> int:
    for other in others:
        flags |= other
    return flags


def _pack(layout: RowLayout, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(n, row_bytes) rows from their fields; header entries other than the token are zero."""
    token = fields["token"]
    rows = torch.empty(len(token), layout.row_bytes, dtype=torch.uint8, device=token.device)
    meta = layout.view(rows, META)
    meta.zero_()
    meta[:, TOKEN] = token
    for name, value in fields.items():
        if name != "token":
            layout.view(rows, name).copy_(value)
    return rows


def _place(copies: torch.Tensor, wanted: list[int], fits: list[int], sizes: list[int]) -> torch.Tensor:
    """The send buffer: the first `fits` copies of each rank at the start of its block of `sizes` rows."""
    if fits == sizes and fits == wanted:
        return copies
    outgoing = copies.new_zeros(sum(sizes), copies.shape[1])
    read = write = 0
    for count, fit, size in zip(wanted, fits, sizes, strict=True):
        if fit:
            outgoing[write : write + fit] = copies[read : read + fit]
        read += count
        write += size
    return outgoing


def _write_headers(
    layout: RowLayout, outgoing: torch.Tensor, sizes: list[int], wanted: list[int], flags: int, extra: int
) -> None:
    first = [sum(sizes[:peer]) for peer, size in enumerate(sizes) if size]
    if not first:
        return
    headers = torch.tensor([[count, flags, extra] for count, size in zip(wanted, sizes, strict=True) if size])
    layout.view(outgoing, META)[torch.tensor(first, device=outgoing.device), COUNT:] = headers.to(
        outgoing.device, torch.int32
    )


def _read_headers(layout: RowLayout, incoming: torch.Tensor, rooms: list[int]) -> list[tuple[int, int, int]]:
    """(count, flags, extra) of each rank; zeros for this one."""
    peers = [peer for peer, room in enumerate(rooms) if room]
    result = [(0, 0, 0)] * len(rooms)
    if peers:
        first = torch.tensor([sum(rooms[:peer]) for peer in peers], device=incoming.device)
        for peer, header in zip(peers, layout.view(incoming, META)[first, COUNT:].tolist(), strict=True):
            result[peer] = (header[0], header[1], header[2])
    return result


def _blocks(incoming: torch.Tensor, rooms: list[int], counts: list[int]) -> list[torch.Tensor]:
    starts = [sum(rooms[:peer]) for peer in range(len(rooms))]
    return [incoming[s : s + min(n, room)] for s, n, room in zip(starts, counts, rooms, strict=True)]


def _exchange_rest(
    group: RankGroup,
    copies: torch.Tensor,
    wanted: list[int],
    fits: list[int],
    blocks: list[torch.Tensor],
    counts: list[int],
    kind: str,
) -> list[torch.Tensor]:
    """The extra round: what did not fit, with sizes that both sides know by now."""
    group.counters.overflows += 1
    starts = [sum(wanted[:peer]) for peer in range(len(wanted))]
    rest = torch.cat([copies[s + fit : s + n] for s, fit, n in zip(starts, fits, wanted, strict=True)])
    missing = [n - len(block) for n, block in zip(counts, blocks, strict=True)]
    late = copies.new_empty(sum(missing), copies.shape[1])
    group.all_to_all(late, rest, missing, [n - fit for n, fit in zip(wanted, fits, strict=True)], kind=f"{kind} rest")
    parts = late.split(missing)
    return [torch.cat([block, part]) if len(part) else block for block, part in zip(blocks, parts, strict=True)]
