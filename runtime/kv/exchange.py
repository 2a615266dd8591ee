"""The deferred K/V exchange of coherent decoding.

K and V of a token at layer l exist where the token was attended. The other ranks need them in the next step at the
earliest, so one exchange per step carries those of all layers to all ranks. Where nodes exist it has two hops: a copy
per node between nodes, then inside each node.

Row counts of all ranks are known from the headers of the last MoE layer's exchange, so messages have exact sizes.

Shape letters: n K/V rows of this rank, R ranks.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from moeplace.runtime.comm.group import PendingExchange, RankGroup
from moeplace.runtime.exchange.kv_ledger import KvLedger
from moeplace.runtime.exchange.row_layout import TOKEN, RowLayout

LAYER = TOKEN + 1


@dataclass(frozen=True, eq=False)
class SharedKv:
    """K/V rows of other ranks.

    Attributes:
        layer: (n,) int64 decoder layer.
        token: (n,) int64 index in the step's batch.
        kv: (n, c) elements.
    """

    layer: torch.Tensor
    token: torch.Tensor
    kv: torch.Tensor


class KvTransfer:
    """A K/V exchange on its way: between nodes, then (`relay`) inside them.

    All ranks start, relay and finish their transfers in the same order.
    """

    def __init__(self, group: RankGroup, ledger: KvLedger) -> None:
        """Begin: what crosses nodes is on its way when this returns.

        With `group.background()` it travels beside the exchanges of the layers that follow.
        """
        self._group = group
        self._mine, self._layout = _pack(ledger)
        self._counts = _counts(group, ledger)
        links = relay_links(group.node_of_rank) if group.num_nodes > 1 else ~np.eye(group.size, dtype=bool)
        self._far, self._first = _start_spread(group, self._mine, self._counts, links)
        self._second: tuple[torch.Tensor, PendingExchange] | None = None

    def relay(self) -> None:
        """Wait for what came from other nodes, and begin to pass it on inside this one. Nothing to do on one node."""
        if self._second is not None or self._group.num_nodes == 1:
            return
        self._first.wait()
        node, links = self._group.node_group(), relay_links(self._group.node_of_rank)
        totals = [
            self._counts[mate] + sum(self._counts[peer] for peer in np.flatnonzero(links[:, mate]))
            for mate in self._group.node_ranks
        ]
        held = torch.cat([self._mine, self._far])
        self._second = _start_spread(node, held, totals, ~np.eye(node.size, dtype=bool))

    def finish(self) -> SharedKv:
        """Wait for all rows of other ranks."""
        self.relay()
        others = self._far
        if self._second is None:
            self._first.wait()
        else:
            near, exchange = self._second
            exchange.wait()
            others = torch.cat([self._far, near])
        meta = self._layout.view(others, "meta")
        return SharedKv(meta[:, LAYER].long(), meta[:, TOKEN].long(), self._layout.view(others, "kv"))


def share_kv(group: RankGroup, ledger: KvLedger) -> SharedKv:
    """Give this rank's K/V rows to all ranks, and take theirs: one collective, two where there are nodes.

    Layers after the last exchange (dense layers at the end of a model) cost one more collective, for the sizes.
    """
    return KvTransfer(group, ledger).finish()


def _pack(ledger: KvLedger) -> tuple[torch.Tensor, RowLayout]:
    """(n, row_bytes) this rank's rows with their headers."""
    kv = torch.cat(ledger.rows)
    layout = RowLayout.of(kv=(kv.dtype, kv.shape[1]))
    rows = torch.empty(len(kv), layout.row_bytes, dtype=torch.uint8, device=kv.device)
    meta = layout.view(rows, "meta")
    meta[:, TOKEN] = torch.cat(ledger.tokens)
    layer = np.repeat(np.array(ledger.layers, np.int32), [len(token) for token in ledger.tokens])
    meta[:, LAYER] = torch.from_numpy(layer).to(kv.device)
    layout.view(rows, "kv").copy_(kv)
    return rows, layout


def _counts(group: RankGroup, ledger: KvLedger) -> list[int]:
    if ledger.announced is not None and not ledger.late:
        return ledger.announced
    mine = torch.tensor([ledger.num_rows], dtype=torch.int64, device=group.device)
    everyone = mine.new_empty(group.size)
    group.all_gather(everyone, mine, kind="kv sizes")
    counts: list[int] = everyone.tolist()
    group.raise_if_lost()
    return counts


def _start_spread(
    group: RankGroup, mine: torch.Tensor, counts: list[int], links: np.ndarray
) -> tuple[torch.Tensor, PendingExchange]:
    """Send `mine` along this rank's links; returns where rows of others will be, and the exchange.

    Args:
        counts: rows that each rank has.
        links: (R, R) bool, [r, p] = rank r sends its rows to rank p.
    """
    incoming = [counts[peer] if links[peer, group.rank] else 0 for peer in range(group.size)]
    outgoing = [len(mine) if links[group.rank, peer] else 0 for peer in range(group.size)]
    rows = mine.new_empty(sum(incoming), mine.shape[1])
    copies = torch.cat([mine] * int(links[group.rank].sum())) if links[group.rank].any() else mine[:0]
    return rows, group.start_all_to_all(rows, copies, incoming, outgoing, kind="kv")


def relay_links(node_of_rank: np.ndarray) -> np.ndarray:
    """(R, R) bool: [r, p] = rank r sends its rows to rank p between nodes.

    Rank i of a node sends to rank i of every other node (modulo that node's ranks), so that all links share the work.
    """
    return _relay_links(tuple(np.asarray(node_of_rank).tolist()))


@lru_cache(maxsize=8)
def _relay_links(node_of_rank: tuple[int, ...]) -> np.ndarray:
    node = np.array(node_of_rank)
    links = np.zeros((len(node), len(node)), dtype=bool)
    for rank, own in enumerate(node):
        index = rank - int(np.argmax(node == own))
        for other in set(node.tolist()) - {int(own)}:
            mates = np.flatnonzero(node == other)
            links[rank, mates[index % len(mates)]] = True
    links.flags.writeable = False  # shared by all callers
    return links
