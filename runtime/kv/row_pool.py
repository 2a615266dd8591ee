"""RowPool: the rows of a K/V cache, those that are free, what these still hold, and the pages of all.

A row keeps its K/V when its sequence ends. A prompt that begins with the same tokens needs not run them again: their
K/V are taken from there. So a free row that holds nothing is taken before one that does, and of those the one that has
been free for longest.

A row is as long as a sequence may get, but it is address space: memory is claimed by the page, as a sequence grows, and
comes from what is left or from free rows that hold something, the longest free first (virtually contiguous pages as in
vAttention, Prabhu et al. 2025, so that attention reads rows as if nothing were paged).
"""

from collections.abc import Iterable, Sequence
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

    def __init__(self, rows: int, *, pages: int | None = None) -> None:
        """`pages` of all rows together; None = enough, and then no memory is given back."""
        self._free = dict.fromkeys(range(rows))
        self._held: dict[int, list[int]] = {}  # of free rows, those that became free first are first
        self._pages_left, self._is_paged = pages or 0, pages is not None
        self._pages = [0] * rows
        # What was there before is not known.
        self._trims = dict.fromkeys(range(rows), 0) if self._is_paged else {}

    def __len__(self) -> int:
        """Free rows."""
        return len(self._free)

    def take(self, row: int | None = None, *, keep: int = 0) -> int:
        """Take a free row, this one or (None) the one that is missed least; it keeps what `keep` positions hold."""
        if row is None:
            empty = self._free.keys() - self._held.keys()
            row = min(empty) if empty else next(iter(self._held))
        del self._free[row]
        self._held.pop(row, None)
        self._shrink(row, keep)
        return row

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
            evicted = next(iter(self._held))
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
        return self._pages_left + sum(self._pages[row] for row in self._held)

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
