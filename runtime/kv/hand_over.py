"""K/V that some ranks have, given to others: after a prefill, at the end of a coherent step, and to newcomers.

Shape letters: n tokens, c K/V elements per token and layer, R ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.kv.cache import KvCache
from moeplace.runtime.kv.exchange import SharedKv, share_kv


@dataclass(frozen=True, eq=False)
class KvPlaces:
    """Where the K/V of some tokens are in the cache, on every rank that has them.

    Attributes:
        row: (n,) int64 cache rows.
        position: (n,) int64 positions.
    """

    row: torch.Tensor
    position: torch.Tensor

    @classmethod
    def of(cls, rows: Sequence[int], positions: Sequence[int], device: torch.device) -> Self:
        """From numbers."""
        return cls(
            torch.tensor(rows, dtype=torch.int64, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
        )

    def __len__(self) -> int:
        return len(self.row)


def hand_over(cache: KvCache, group: RankGroup, places: KvPlaces, home: torch.Tensor) -> None:
    """Give K/V that exist at home only to all ranks: a collective.

    Args:
        places: of the tokens, alike on every rank.
        home: (n,) int64 rank that has each.
    """
    mine = (home == group.rank).nonzero().squeeze(1)
    ledger = KvLedger()
    for layer in range(cache.num_layers):
        ledger.add(layer, mine, cache.read(layer, places.row[mine], places.position[mine]))
    counts = torch.bincount(home, minlength=group.size) * cache.num_layers
    ledger.announce(counts.tolist())
    keep_shared(cache, group, places, ledger)


def keep_shared(cache: KvCache, group: RankGroup, places: KvPlaces, ledger: KvLedger) -> None:
    """Share the rows of a ledger, and keep those of others: a collective.

    Args:
        places: of all tokens of the pass.
    """
    store_shared(cache, places, share_kv(group, ledger))


def store_shared(cache: KvCache, places: KvPlaces, shared: SharedKv) -> None:
    """Keep rows of others in the places of their tokens."""
    row, position = places.row.index_select(0, shared.token), places.position.index_select(0, shared.token)
    cache.write_layers(shared.layer, row, position, shared.kv)


def give_kv(cache: KvCache, group: RankGroup, places_R: Sequence[KvPlaces], receivers: Sequence[int]) -> None:
    """Let each rank send some K/V to those ranks that have none: one collective.

    Args:
        places_R: per rank, of the tokens that it sends.
        receivers: who gets them.
    """
    mine, width = places_R[group.rank], cache.row_width
    own = [cache.read(layer, mine.row, mine.position) for layer in range(cache.num_layers)]
    kv = torch.cat(own)
    others = [rank for rank in receivers if rank != group.rank]
    outgoing = [len(kv) if rank in others else 0 for rank in range(group.size)]
    gets = group.rank in receivers
    incoming = [
        len(places) * cache.num_layers if gets and rank != group.rank else 0 for rank, places in enumerate(places_R)
    ]
    got = kv.new_empty(sum(incoming), width)
    group.all_to_all(got, torch.cat([kv] * len(others)) if others else kv[:0], incoming, outgoing, kind="kv")
    for places, block in zip(places_R, got.split(incoming), strict=True):
        for layer, part in enumerate(block.split(len(places)) if len(block) else ()):
            cache.write(layer, places.row, places.position, part)
