"""Capacity: how many rows fit into the message of a pair of ranks, by rules that both of them can work out.

Where a back end sends what there is (gloo), room for everything costs nothing on the wire: `WholeBatch`. Where a
message has the size of its room (NCCL) room is for what is expected, `ExpectedRows`: the mean that the placement lets
expect with random experts, then what has been sent in that layer from that rank to that one, and in both cases four
standard deviations of a Poisson number. What exceeds it travels in an extra round, so results do not depend on it.

A pair needs no message to agree. What is expected of it follows from the placement and the step, which all ranks know,
and from the rows of earlier passes, which the source counted and the target read from the headers. The numbers are made
by sums, products and square roots of doubles alone, which are the same on every machine.

Shape letters: L MoE layers, E experts, R ranks, K top-k, C slots of a rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.exchange.dispatcher import Step
from moeplace.runtime.exchange.slot_tables import SlotTables

DEVIATIONS = 4.0
"""Standard deviations of a Poisson number above its mean: a message in 30,000 exceeds that."""
SPARE_ROWS = 2
"""Beyond them, for means of less than a row, whose numbers are not normal."""
FORGETTING = 1 / 16
"""Share of the difference by which an expectation sinks towards a pass that sent less; it rises at once."""


@dataclass(frozen=True)
class Capacity:
    """Rows that fit into the first round, known to both sides of every pair.

    Attributes:
        to_peer: (R,) rows of the message to each rank.
        from_peer: (R,) rows of the message from each rank.
    """

    to_peer: Sequence[int]
    from_peer: Sequence[int]


class Means(Protocol):
    """Rows that ranks send each other in a pass, before anything is known of its routing."""

    def most(self, step: Step) -> np.ndarray:
        """(R, R) int64, more rows than [source] can send to [target]: no message needs more room."""

    def mean(self, layer: int, step: Step) -> np.ndarray:
        """(R, R) expected rows from [source] to [target]."""


class CapacityRule(Protocol):
    """Rooms of the messages of one exchange, pass after pass."""

    def capacity(self, layer: int, step: Step) -> Capacity:
        """Of this rank's messages in MoE layer `layer`."""

    def observe(self, layer: int, step: Step, sent: Sequence[int], received: Sequence[int]) -> None:
        """What was to be sent to each rank, and by each rank, in a pass; room may have been less."""


class WholeBatch:
    """Room for all that could be sent: never exceeded."""

    def __init__(self, rank: int, means: Means) -> None:
        self._rank, self._means = rank, means

    def capacity(self, layer: int, step: Step) -> Capacity:
        """See `CapacityRule`."""
        most_RR = self._means.most(step)
        return Capacity(most_RR[self._rank].tolist(), most_RR[:, self._rank].tolist())

    def observe(self, layer: int, step: Step, sent: Sequence[int], received: Sequence[int]) -> None:
        """See `CapacityRule`."""


class ExpectedRows:
    """Room for what is expected, see the module."""

    def __init__(self, rank: int, means: Means, *, num_layers: int, num_ranks: int) -> None:
        self._rank, self._means = rank, means
        # [0]: to each rank, [1]: from each rank. What was sent, as a multiple of the mean; 1 before any pass.
        self._ratio_2LR = np.ones((2, num_layers, num_ranks))

    def capacity(self, layer: int, step: Step) -> Capacity:
        """See `CapacityRule`."""
        most_RR, mean_RR = self._means.most(step), self._means.mean(layer, step)
        sides = ((most_RR[self._rank], mean_RR[self._rank]), (most_RR[:, self._rank], mean_RR[:, self._rank]))
        rooms = [
            np.minimum(room_for(mean_R * ratio_R), most_R).tolist()
            for (most_R, mean_R), ratio_R in zip(sides, self._ratio_2LR[:, layer], strict=True)
        ]
        return Capacity(*rooms)

    def observe(self, layer: int, step: Step, sent: Sequence[int], received: Sequence[int]) -> None:
        """See `CapacityRule`."""
        mean_RR = self._means.mean(layer, step)
        for side, (mean_R, rows) in enumerate(((mean_RR[self._rank], sent), (mean_RR[:, self._rank], received))):
            now_R = np.asarray(rows, np.float64) / np.maximum(mean_R, 1.0)
            self._ratio_2LR[side, layer] = _follow(self._ratio_2LR[side, layer], now_R)


def _follow(before: np.ndarray, now: np.ndarray | float) -> np.ndarray:
    """An expectation after a pass: it rises at once and sinks slowly."""
    return np.maximum(now, before - (before - now) * FORGETTING)


def room_for(mean: np.ndarray | float) -> np.ndarray:
    """int64 rows that a Poisson number of this mean hardly ever exceeds."""
    return np.ceil(mean + DEVIATIONS * np.sqrt(mean)).astype(np.int64) + SPARE_ROWS


def use_of_ranks(tables: SlotTables, top_k: int) -> np.ndarray:
    """(L, R) share of tokens with random experts of which some is on a rank: 1 - C(E - C, K) / C(E, K).

    Of an expert with n replicas each counts 1 / n.
    """
    share_LER = _shares_held(tables)
    experts_L = share_LER.any(axis=2).sum(axis=1).astype(np.float64)
    here_LR = share_LER.sum(axis=1)
    none_LR = np.ones_like(here_LR)
    for drawn in range(top_k):
        left_L1 = np.maximum(experts_L - drawn, 1.0)[:, None]
        none_LR *= np.clip(1.0 - here_LR / left_L1, 0.0, 1.0)
    return 1.0 - none_LR


@dataclass(frozen=True, eq=False)
class HomeMeans:
    """Copies from home to the ranks of A, `dispatch-combine`; also to one rank of a node, which are no more.

    Attributes:
        use_LR: see `use_of_ranks`.
    """

    use_LR: np.ndarray

    def most(self, step: Step) -> np.ndarray:
        """See `Means`: no rank sends more copies to one rank than it has tokens."""
        return _without_own(np.array(step.tokens_of_rank)[:, None].repeat(len(step.tokens_of_rank), 1))

    def mean(self, layer: int, step: Step) -> np.ndarray:
        """See `Means`."""
        return np.array(step.tokens_of_rank, np.float64)[:, None] * self.use_LR[layer][None, :]


@dataclass(frozen=True, eq=False)
class NodeMeans:
    """Copies inside a node: of own tokens, or of those of other nodes that came through a gateway.

    Attributes:
        use_LR: see `use_of_ranks`.
        mates: ranks of the node.
        foreign: whose tokens.
    """

    use_LR: np.ndarray
    mates: Sequence[int]
    foreign: bool

    def most(self, step: Step) -> np.ndarray:
        """See `Means`: all own tokens, or at most all tokens of other nodes."""
        own_n = np.array(step.tokens_of_rank)[self.mates]
        rows_n = np.full_like(own_n, step.num_tokens - own_n.sum()) if self.foreign else own_n
        return _without_own(rows_n[:, None].repeat(len(own_n), 1))

    def mean(self, layer: int, step: Step) -> np.ndarray:
        """See `Means`: a token that a gateway is to pass on to a mate needs both of them."""
        own_n, use_n = np.array(step.tokens_of_rank, np.float64)[self.mates], self.use_LR[layer][self.mates]
        if not self.foreign:
            return own_n[:, None] * use_n[None, :]
        return (step.num_tokens - own_n.sum()) * np.minimum(use_n[:, None], use_n[None, :])


@dataclass(frozen=True, eq=False)
class OwnerMeans:
    """Copies from owners to the ranks of A, `coherent`; owners are anywhere, by the slots that ranks have.

    Attributes:
        use_LR: see `use_of_ranks`.
        owned_R: share of tokens that a rank owns.
    """

    use_LR: np.ndarray
    owned_R: np.ndarray

    def most(self, step: Step) -> np.ndarray:
        """See `Means`: a rank may own the whole batch."""
        ranks = len(self.owned_R)
        return _without_own(np.full((ranks, ranks), step.num_tokens))

    def mean(self, layer: int, step: Step) -> np.ndarray:
        """See `Means`."""
        return step.num_tokens * (self.owned_R[:, None] * self.use_LR[layer][None, :])


@dataclass(frozen=True, eq=False)
class ReturnMeans:
    """Partial sums to new owners, `coherent`: a token that needs a pair of ranks is owned by one of those it needs.

    Attributes:
        use_LR: see `use_of_ranks`.
    """

    use_LR: np.ndarray

    def most(self, step: Step) -> np.ndarray:
        """See `Means`: every token may need both ranks."""
        ranks = self.use_LR.shape[1]
        return _without_own(np.full((ranks, ranks), step.num_tokens))

    def mean(self, layer: int, step: Step) -> np.ndarray:
        """See `Means`."""
        use_R = self.use_LR[layer]
        return step.num_tokens * (use_R[:, None] * use_R[None, :]) / max(math.fsum(use_R), 1.0)


class HeldRows:
    """Room for the tokens that this rank owns after a layer; no other rank has to know it."""

    def __init__(self, share: float, num_layers: int, *, expected: bool) -> None:
        """`share` of all tokens that are expected here; room for all of them unless `expected`."""
        self._mean, self._is_expected = share, expected
        self._ratio_L = np.ones(num_layers)

    def rows(self, layer: int, step: Step) -> int:
        """Rows of a pass."""
        if not self._is_expected:
            return step.num_tokens
        return min(int(room_for(step.num_tokens * self._mean * self._ratio_L[layer])), step.num_tokens)

    def observe(self, layer: int, step: Step, rows: int) -> None:
        """Rows that there were in a pass."""
        self._ratio_L[layer] = _follow(self._ratio_L[layer], rows / max(step.num_tokens * self._mean, 1.0))


def owned_shares(tables: SlotTables) -> np.ndarray:
    """(R,) share of tokens that each rank owns, where they go to random experts: its share of the experts."""
    share_R = _shares_held(tables).sum(axis=(0, 1))
    return share_R / max(math.fsum(share_R), 1.0)


def _shares_held(tables: SlotTables) -> np.ndarray:
    """(L, E, R) share of each expert that a rank has: of one with n replicas 1 / n."""
    held_LER = (tables.slot_on_rank >= 0).cpu().numpy()
    shares_LER: np.ndarray = held_LER / np.maximum(held_LER.sum(axis=2, keepdims=True), 1)
    return shares_LER


def make_rule(group: RankGroup, means: Means, *, num_layers: int) -> CapacityRule:
    """The rule for the back end of a group: see the module."""
    if group.short_messages:
        return WholeBatch(group.rank, means)
    return ExpectedRows(group.rank, means, num_layers=num_layers, num_ranks=group.size)


def _without_own(rows_RR: np.ndarray) -> np.ndarray:
    """No message to oneself."""
    rows_RR[np.arange(len(rows_RR)), np.arange(len(rows_RR))] = 0
    return rows_RR
