"""Batch: what a pass runs, the next tokens of some sequences, in the order in which the pass numbers them.

A token is numbered by the home of its sequence, then by what attention can do for it together with others: single
tokens, then new prompts, then prompts that go on, those of like lengths side by side. So the tokens of a rank are cut
into parts, and a part is a stretch of rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Self

import torch

from moeplace.runtime.engine.requests import RunningSequence
from moeplace.runtime.exchange.dispatcher import TokenRows
from moeplace.runtime.kv.row_pool import Trim

_FACTOR_BITS = 2
"""Prompts are padded to the longest of a part: lengths in a part differ by less than 2 to this power."""


class BatchPart(NamedTuple):
    """Sequences of one rank whose tokens are attended together.

    Attributes:
        kind: "token" = one token each; "prompt" = from position 0; "continued" = several, behind what is cached.
        sequences: which.
        lengths: tokens of each.
    """

    kind: str
    sequences: list[RunningSequence]
    lengths: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Batch:
    """See the module.

    Attributes:
        sequences: by home, there by kind, and then by row.
        lengths: tokens of each that run, the first that are not cached.
        has_prompts: whether tokens run beside the last ones of sequences: of prompts, or of what is made again.
        trims: (home, memory of a row that is given back) before anything is written.
    """

    sequences: tuple[RunningSequence, ...]
    lengths: tuple[int, ...]
    has_prompts: bool
    trims: tuple[tuple[int, Trim], ...] = ()

    @classmethod
    def of(cls, sequences: Sequence[RunningSequence], lengths: Sequence[int], *, has_prompts: bool) -> Self:
        """In its order; rows of the cache in theirs, since neighbours can be read without a copy."""

        def place(pair: tuple[RunningSequence, int]) -> tuple[int, int, int, int]:
            return pair[0].home, *_kind_of(*pair), pair[0].row

        pairs = sorted(zip(sequences, lengths, strict=True), key=place)
        return cls(tuple(s for s, _ in pairs), tuple(length for _, length in pairs), has_prompts)

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def prompt_ids(self) -> list[str]:
        """Requests of which more than the last token runs, before the pass has run."""
        found = [s for s in self.sequences if not s.cached or s.num_missing > 1]
        return [sequence.request.request_id for sequence in found]

    @property
    def runs_single_tokens(self) -> bool:
        """Whether no sequence has more than one."""
        return self.num_tokens == len(self.sequences)

    def tokens_of_rank(self, num_ranks: int) -> tuple[int, ...]:
        """(R,) tokens whose home each rank is."""
        counts = [0] * num_ranks
        for sequence, length in zip(self.sequences, self.lengths, strict=True):
            counts[sequence.home] += length
        return tuple(counts)

    def parts_on(self, rank: int) -> Iterator[BatchPart]:
        """The parts of a rank, in the order of its tokens; before the pass has run."""
        pairs = [pair for pair in zip(self.sequences, self.lengths, strict=True) if pair[0].home == rank]
        for (order, _), part in groupby(pairs, key=lambda pair: _kind_of(*pair)):
            sequences, lengths = map(list, zip(*part, strict=True))
            yield BatchPart(_KINDS[order], sequences, lengths)

    def last_rows(self, rows: TokenRows, sequences: Sequence[RunningSequence]) -> TokenRows:
        """Of the batch's tokens that are on a rank, the last one of each of `sequences`, renamed to its number there.

        Args:
            sequences: some of the batch's, in its order.
        """
        wanted, lasts, end = set(map(id, sequences)), [], 0
        for sequence, length in zip(self.sequences, self.lengths, strict=True):
            end += length
            if id(sequence) in wanted:
                lasts.append(end - 1)
        if len(lasts) == self.num_tokens:
            return rows
        last_B = torch.tensor(lasts, dtype=torch.int64, device=rows.token.device)
        is_last_M = torch.isin(rows.token, last_B)
        return TokenRows(rows.x[is_last_M], torch.searchsorted(last_B, rows.token[is_last_M]))


_KINDS = ("token", "prompt", "continued")


def _kind_of(sequence: RunningSequence, length: int) -> tuple[int, int]:
    """Number of its kind, and class of its length."""
    if length == 1:
        return 0, 0
    return (2 if sequence.start else 1), length.bit_length() // _FACTOR_BITS
