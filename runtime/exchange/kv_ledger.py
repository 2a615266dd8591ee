"""KvLedger: the K/V rows of one step, noted layer by layer, and what exchanges have announced of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class KvLedger:
    """K/V rows of some layers of one step that this rank computed, to be shared.

    Attributes:
        tokens: (M,) int64 per decoder layer, which tokens.
        layers: decoder layer of each entry.
        rows: (M, c) K/V elements per entry.
        announced: rows of each rank as the last exchange announced them; None = no exchange yet.
        late: whether rows were added after the last announcement.
        on_announced: called when an exchange has announced the rows, while the layer has yet to compute.
    """

    tokens: list[torch.Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    announced: list[int] | None = None
    late: bool = True
    on_announced: Callable[[], None] | None = None

    @property
    def num_rows(self) -> int:
        return sum(map(len, self.tokens))

    def add(self, layer: int, token: torch.Tensor, kv: torch.Tensor) -> None:
        """Note the K/V (M, c) of tokens (M,) at a decoder layer. Every rank must call it, also with no rows."""
        self.layers.append(layer)
        self.tokens.append(token)
        self.rows.append(kv)
        self.late = True

    def announce(self, counts: list[int]) -> None:
        """All ranks' `num_rows`, as headers said."""
        self.announced = counts
        self.late = False
        if self.on_announced is not None:
            self.on_announced()
