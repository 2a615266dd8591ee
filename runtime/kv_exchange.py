"""The deferred K/V exchange of coherent decoding.

K and V of a token at layer l exist where the token was attended. The other ranks need them in the next step at the
earliest, so one exchange per step carries those of all layers to all ranks. Where nodes exist it has two hops: a copy
per node between nodes, then inside each node.

Row counts of all ranks are known from the headers of the last MoE layer's exchange, so messages have exact sizes.

Shape letters: n K/V rows of this rank, R ranks.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from moeplace.runtime.group import PendingExchange, RankGroup
from moeplace.runtime.rows import TOKEN, RowLayout

LAYER = TOKEN + 1


@dataclass
class KvLedger:
    """K/V rows of one step that this rank computed, to be shared at its end.

    Attributes:
        tokens: (M,) int64 per decoder layer, which tokens.
        layers: decoder layer of each entry.
        rows: (M, c) K/V elements per entry.
        announced: rows of each rank as the last exchange announced them; None = no exchange yet.
        late: whether rows were added after the last announcement.
    """

    tokens: list[torch.Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    announced: list[int] | None = None
    late: bool = True

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


@dataclass(frozen=True, eq=False)
class PendingKv:
    """A K/V exchange on its way, see `start_kv`.

    Attributes:
        first: its first hop.
        mine: (n, row_bytes) rows of this rank.
        far: where the first hop puts rows of other ranks.
        counts: rows of every rank.
        layout: of the rows.
        group: the ranks.
    """

    first: PendingExchange
    mine: torch.Tensor
    far: torch.Tensor
    counts: list[int]
    layout: RowLayout
    group: RankGroup

    def finish(self) -> SharedKv:
        """Wait, and pass on inside the node what came from other nodes. All ranks must call it together."""
        self.first.wait()
        others = self.far
        if self.group.num_nodes > 1:
            others = torch.cat([self.far, _pass_on(self.group, self.mine, self.far, self.counts)])
        meta = self.layout.view(others, "meta")
        return SharedKv(meta[:, LAYER].long(), meta[:, TOKEN].long(), self.layout.view(others, "kv"))


def share_kv(group: RankGroup, ledger: KvLedger) -> SharedKv:
    """Give this rank's K/V rows to all ranks, and take theirs: one collective, two where there are nodes.

    Layers after the last exchange (dense layers at the end of a model) cost one more collective, for the sizes.
    """
    return start_kv(group, ledger).finish()


def start_kv(group: RankGroup, ledger: KvLedger) -> PendingKv:
    """Begin `share_kv`: what crosses nodes is on its way when this returns.

    With `group.background()` it travels beside the exchanges of the layers that follow.
    """
    kv = torch.cat(ledger.rows)
    layout = RowLayout.of(kv=(kv.dtype, kv.shape[1]))
    mine = torch.zeros(len(kv), layout.row_bytes, dtype=torch.uint8, device=kv.device)
    meta = layout.view(mine, "meta")
    meta[:, TOKEN] = torch.cat(ledger.tokens)
    lengths = torch.tensor([len(token) for token in ledger.tokens], device=kv.device)
    meta[:, LAYER] = torch.repeat_interleave(torch.tensor(ledger.layers, device=kv.device), lengths)
    layout.view(mine, "kv").copy_(kv)
    counts = _counts(group, ledger)
    links = relay_links(group.node_of_rank) if group.num_nodes > 1 else ~np.eye(group.size, dtype=bool)
    far, first = _start_spread(group, mine, counts, links)
    return PendingKv(first, mine, far, counts, layout, group)


def _counts(group: RankGroup, ledger: KvLedger) -> list[int]:
    if ledger.announced is not None and not ledger.late:
        return ledger.announced
    mine = torch.tensor([ledger.num_rows], dtype=torch.int64, device=group.device)
    everyone = mine.new_empty(group.size)
    group.all_gather(everyone, mine, kind="kv sizes")
    return everyone.tolist()


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
    copies = mine.repeat(int(links[group.rank].sum()), 1)
    return rows, group.start_all_to_all(rows, copies, incoming, outgoing, kind="kv")


def _pass_on(group: RankGroup, mine: torch.Tensor, far: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Rows that other ranks of this node have: their own, and those that came to them from other nodes."""
    links = relay_links(group.node_of_rank)
    totals = [
        counts[mate] + sum(counts[peer] for peer in range(group.size) if links[peer, mate]) for mate in group.node_ranks
    ]
    node = group.node_group()
    near, exchange = _start_spread(node, torch.cat([mine, far]), totals, ~np.eye(node.size, dtype=bool))
    exchange.wait()
    return near


def relay_links(node_of_rank: np.ndarray) -> np.ndarray:
    """(R, R) bool: [r, p] = rank r sends its rows to rank p between nodes.

    Rank i of a node sends to rank i of every other node (modulo that node's ranks), so that all links share the work.
    """
    node = np.asarray(node_of_rank)
    links = np.zeros((len(node), len(node)), dtype=bool)
    for rank, own in enumerate(node):
        index = rank - int(np.argmax(node == own))
        for other in set(node.tolist()) - {int(own)}:
            mates = np.flatnonzero(node == other)
            links[rank, mates[index % len(mates)]] = True
    return links
