"""RowPool: the rows of a K/V cache, those that are free, what these still hold, and the pages of all.

A row keeps its K/V when its sequence ends. A prompt that begins with the same tokens needs not run them again: their
K/V are taken from there. So a free row that holds nothing is taken before one that does, and of those the one that has
been of no use for longest. The row itself is taken if little else is in it; if not, its beginning is copied, and what
follows there stays for who comes back to it. Until it has been copied a row is lent: nobody takes it or its memory.

A row is as long as a sequence may get, but it is address space: memory is claimed by the page, as a sequence grows, and
comes from what is left or from free rows that hold something, the longest free first (virtually contiguous pages as in
vAttention, Prabhu et al. 2025, so that attention reads rows as if nothing were paged).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

PAGE = 16
"""Positions of a page."""
LEAST_PREFIX = 16
"""Tokens from which on a prefix is taken over: fewer are run again as quickly as they are found and copied."""


class Prefix(NamedTuple):
    """The beginning of a prompt whose K/V are in a row.

    Attributes:
        row: of the cache.
        positions: how many.
    """

    row: int
    positions: int


class Trim(NamedTuple):
    """Memory of a row that is to be given back.

    Attributes:
        row: which.
        end: positions that stay.
    """

    row: int
    end: int


class Holding(NamedTuple):
    """What a row has the K/V of.

    Attributes:
        row: which.
        token_ids: tokens of a sequence.
        positions: the first so many of them.
    """

    row: int
    token_ids: list[int]
    positions: int


class RowPool:
    """Rows 0 .. `rows` - 1, all free and empty at first."""

    def __init__(self, rows: int, *, pages: int | None = None, spare: int = 0) -> None:
        """`pages` of all rows together; None = enough, and then no memory is given back.

        Args:
            spare: rows that are always left free, for what they hold.
        """
        self._free = dict.fromkeys(range(rows))
        self._held: dict[int, list[int]] = {}  # of free rows, those that were of use first are first
        self._lent: set[int] = set()
        self._spare = spare
        self._pages_left, self._is_paged = pages or 0, pages is not None
        self._pages = [0] * rows
        # What was there before is not known.
        self._trims = dict.fromkeys(range(rows), 0) if self._is_paged else {}

    def __len__(self) -> int:
        """Free rows that can be taken."""
        return len(self._free) - max(self._spare, len(self._lent))

    def take(self, row: int | None = None, *, keep: int = 0) -> int:
        """Take a free row, this one or (None) the one that is missed least; it keeps what `keep` positions hold."""
        if row is None:
            empty = self._free.keys() - self._held.keys()
            row = min(empty) if empty else next(self._to_evict())
        del self._free[row]
        self._held.pop(row, None)
        self._shrink(row, keep)
        return row

    def take_for(self, prefix: Prefix | None, positions: int) -> int:
        """Take a free row for a sequence of so many positions, for which there is room.

        It is the row that holds its beginning if that is free and holds little else, or if there is no other or no
        memory for a copy. If it is another one, the row that is to be copied from is lent.
        """
        if prefix is None or not self.is_free(prefix.row):
            return self.take()
        source = prefix.row
        loses_little = len(self._held[source]) - prefix.positions < LEAST_PREFIX
        is_wanted = source in self._lent
        if not is_wanted and (loses_little or not self._has_copy_room(source, positions)):
            return self.take(source, keep=prefix.positions)
        self._held[source] = self._held.pop(source)
        self._lent.add(source)
        return self.take()

    def lend(self, rows: Iterable[int]) -> None:
        """These rows, those of them that are free, are about to be copied from; no others are."""
        self._lent = {row for row in rows if row in self._held}

    def _has_copy_room(self, source: int, positions: int) -> bool:
        """Whether there is a free row beside this one, and memory for a sequence in it."""
        others = len(self._free) - len(self._lent | {source})
        pages = self._num_available - self._pages[source]
        return others > 0 and (not self._is_paged or pages >= _pages_for(positions))

    def _to_evict(self) -> Iterator[int]:
        """Free rows that hold something, the one that is missed least first."""
        return (row for row in self._held if row not in self._lent)

    def seat(self, row: int, positions: int) -> None:
        """Take a row that holds so many positions of a sequence, which has been there before this pool."""
        self._trims.pop(row, None)
        del self._free[row]
        claimed = self.claim(row, positions)
        assert claimed, "what had room before has room now"

    def give_back(self, row: int, token_ids: Sequence[int] = ()) -> None:
        """A row is free; it holds the K/V of these tokens."""
        self._free[row] = None
        if len(token_ids) >= LEAST_PREFIX:
            self._held[row] = list(token_ids)
            self._shrink(row, len(token_ids))
        else:
            self._shrink(row, 0)

    def claim(self, row: int, positions: int) -> bool:
        """Let a row that is taken have so many positions, at the cost of what free ones hold; False = it cannot."""
        if not self._is_paged:
            return True
        more = _pages_for(positions) - self._pages[row]
        if more > self._num_available:
            return False
        while more > self._pages_left:
            evicted = next(self._to_evict())
            del self._held[evicted]
            self._shrink(evicted, 0)
        self._pages_left -= max(more, 0)
        self._pages[row] += max(more, 0)
        return True

    def room(self, row: int | None = None) -> int | None:
        """Positions that a row that is taken, or (None) a new one, can have; None = any number."""
        if not self._is_paged:
            return None
        return PAGE * (self._num_available + (0 if row is None else self._pages[row]))

    def take_trims(self) -> list[Trim]:
        """What has become free since this was asked, to be given back before a row is written."""
        trims, self._trims = [Trim(*pair) for pair in self._trims.items()], {}
        return trims

    @property
    def _num_available(self) -> int:
        """Pages that nobody has, and those of free rows."""
        return self._pages_left + sum(self._pages[row] for row in self._to_evict())

    def _shrink(self, row: int, positions: int) -> None:
        fewer = self._pages[row] - _pages_for(positions)
        if self._is_paged and fewer > 0:
            self._pages[row] -= fewer
            self._pages_left += fewer
            self._trims[row] = min(positions, self._trims.get(row, positions))

    def is_free(self, row: int) -> bool:
        return row in self._free

    def find(self, token_ids: Sequence[int], running: Iterable[Holding], *, free: bool = True) -> Prefix | None:
        """The longest beginning of a prompt that a row holds, but for its last token, whose hidden state is wanted.

        Of equal ones that of a free row, where nothing need be copied, then of the lowest row. None = it is short.

        Args:
            running: what rows that are not free hold.
            free: look at free rows too.
        """
        prompt, kept = list(token_ids), self._held.items() if free else ()
        best, length = None, LEAST_PREFIX - 1
        in_order = (
            *sorted((Holding(row, tokens, len(tokens)) for row, tokens in kept), key=_row_of),
            *sorted(running, key=_row_of),
        )
        for holding in in_order:
            limit = min(len(prompt) - 1, holding.positions)
            # Most prompts are of no use, or of as much as the best one: one token says so.
            if limit <= length or holding.token_ids[length] != prompt[length]:
                continue
            positions = _common(prompt, holding.token_ids, limit)
            if positions > length:
                best, length = Prefix(holding.row, positions), positions
        return best


def _row_of(holding: Holding) -> int:
    return holding.row


def _pages_for(positions: int) -> int:
    return -(-positions // PAGE)


def _common(first: list[int], second: list[int], limit: int) -> int:
    """Length of the common beginning of two lists, at most `limit`."""
    low, high = 0, limit  # the first `low` are equal, the first `high` + 1 are not (or beyond the limit)
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
