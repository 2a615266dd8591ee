"""Log-probabilities of drawn tokens and of the likeliest ones, as a client may ask for them.

They are the model's own: the log-softmax of the logits before penalties, temperature and truncation. A rank measures
those of the tokens that it draws; they travel to the others inside the collective that makes the tokens known, as the
bits of float64 numbers, so that no step has a collective more because of them.

Shape letters: B sequences of this rank, V vocabulary, k likeliest tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F

MOST = 20
"""Likeliest tokens that may be asked for, as in OpenAI's API."""
LEAST = -9999.0
"""What stands for the logarithm of nothing: JSON has no infinity. OpenAI's API has the same number."""


class TokenLogprob(NamedTuple):
    """Of one drawn token.

    Attributes:
        value: natural logarithm of its probability.
        top: (token id, logarithm) of the likeliest tokens, in descending order.
    """

    value: float
    top: tuple[tuple[int, float], ...] = ()

    def to_json(self) -> list[Any]:
        """As plain data."""
        return [self.value, [list(pair) for pair in self.top]]

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """From plain data; ValueError or TypeError = it is none."""
        value, top = document
        return cls(float(value), tuple((int(token), float(found)) for token, found in top))


@dataclass(frozen=True)
class WantedLogprobs:
    """Which sequences of a pass want log-probabilities, and how those of a rank travel to the others.

    Attributes:
        num_top: by number of the sequence, how many likeliest tokens it wants; others are absent.
    """

    num_top: Mapping[int, int]

    @classmethod
    def of(cls, wishes: Sequence[int | None]) -> Self:
        """From what each sequence wants, None = nothing."""
        return cls({index: wish for index, wish in enumerate(wishes) if wish is not None})

    @property
    def width(self) -> int:
        """Numbers of a sequence in the message."""
        return 1 + 2 * max(self.num_top.values(), default=0)

    @property
    def size(self) -> int:
        """Numbers of the message."""
        return len(self.num_top) * self.width

    def write(self, message: torch.Tensor, names: Sequence[int], logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Fill in those of this rank: of sequences `names`, with logits (B, V) and drawn tokens (B,)."""
        place_of = {name: place for place, name in enumerate(names)}
        here = [(row, place_of[name]) for row, name in enumerate(self.num_top) if name in place_of]
        if here:
            row_B, place_B = torch.tensor(here, device=message.device).unbind(1)
            found = _measure(logits[place_B], tokens[place_B], self.width // 2)
            message.view(len(self.num_top), self.width)[row_B] = found

    def read(self, numbers: Sequence[int]) -> dict[int, TokenLogprob]:
        """By number of the sequence, from a message of all ranks."""
        rows = (numbers[start : start + self.width] for start in range(0, len(numbers), self.width))
        return {name: _read(row, wish) for (name, wish), row in zip(self.num_top.items(), rows, strict=True)}


def _measure(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> torch.Tensor:
    """(B, 1 + 2 k) int64 of logits (B, V) and drawn tokens (B,): the token's own, ids, and theirs; k = `num_top`."""
    values_BV = torch.log_softmax(logits.double(), dim=1).nan_to_num(nan=LEAST, neginf=LEAST).clamp(min=LEAST)
    own_B1 = values_BV.gather(1, tokens[:, None])
    top = values_BV.topk(min(num_top, values_BV.shape[1]), dim=1)
    missing = num_top - top.values.shape[1]  # of a vocabulary smaller than that
    ids = F.pad(top.indices, (0, missing), value=-1)
    values = F.pad(top.values, (0, missing)).contiguous()
    return torch.cat([own_B1.view(torch.int64), ids, values.view(torch.int64)], dim=1)


def _read(row: Sequence[int], num_top: int) -> TokenLogprob:
    """From a row of `_measure`, the likeliest `num_top` of those that it has."""
    most = len(row) // 2
    own, *values = torch.tensor([row[0], *row[1 + most :]], dtype=torch.int64).view(torch.float64).tolist()
    pairs = [(token, value) for token, value in zip(row[1 : 1 + most], values, strict=True) if token >= 0]
    return TokenLogprob(own, tuple(pairs[:num_top]))
