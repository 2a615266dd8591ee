"""RowPool: the rows of a K/V cache, those that are free, and what these still hold.

A row keeps its K/V when its sequence ends. A prompt that begins with the same tokens needs not run them again: their
K/V are taken from there. So a free row that holds nothing is taken before one that does, and of those the one that has
been free for longest.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

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


class Holding(NamedTuple):
    """What a row has the K/V of.

    Attributes:
        row: which.
        token_ids: tokens of a sequence.
        positions: the first so many of them.
    """

    row: int
    token_ids: Sequence[int]
    positions: int


class RowPool:
    """Rows 0 .. `rows` - 1, all free and empty at first."""

    def __init__(self, rows: int) -> None:
        self._free = dict.fromkeys(range(rows))
        self._held: dict[int, Sequence[int]] = {}  # of free rows, those that became free first are first

    def __len__(self) -> int:
        """Free rows."""
        return len(self._free)

    def take(self, row: int | None = None) -> int:
        """Take a free row, this one or (None) the one that is missed least; what it held will be overwritten."""
        if row is None:
            empty = self._free.keys() - self._held.keys()
            row = min(empty) if empty else next(iter(self._held))
        del self._free[row]
        self._held.pop(row, None)
        return row

    def give_back(self, row: int, token_ids: Sequence[int] = ()) -> None:
        """A row is free; it holds the K/V of these tokens."""
        self._free[row] = None
        if len(token_ids) >= LEAST_PREFIX:
            self._held[row] = token_ids

    def is_free(self, row: int) -> bool:
        return row in self._free

    def find(self, token_ids: Sequence[int], running: Iterable[Holding]) -> Prefix | None:
        """The longest beginning of a prompt that a row holds, but for its last token, whose hidden state is wanted.

        Of equal ones that of a free row, where nothing need be copied, then of the lowest row. None = it is short.

        Args:
            running: what rows that are not free hold.
        """
        most = len(token_ids) - 1
        best, rank = None, (0, False, 0)
        kept = (Holding(row, tokens, len(tokens)) for row, tokens in self._held.items())
        for holding in (*kept, *running):
            limit = min(most, holding.positions)
            if limit < max(rank[0], LEAST_PREFIX):
                continue
            positions = _common(token_ids, holding.token_ids, limit)
            found = (positions, self.is_free(holding.row), -holding.row)
            if positions >= LEAST_PREFIX and found > rank:
                best, rank = Prefix(holding.row, positions), found
        return best


def _common(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    """Length of the common beginning of two sequences of one type, at most `limit`."""
    low, high = 0, limit  # the first `low` are equal, the first `high` + 1 are not (or beyond the limit)
    while low < high:
        middle = (low + high + 1) // 2
        if list(first[low:middle]) == list(second[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
