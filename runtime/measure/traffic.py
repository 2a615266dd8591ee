"""What the steps of a replay put on the wire, counted from routing and placement alone, and how long that should take.

The same numbers as the runtime's counters (a test holds them equal), without running anything: homes are known, owners
follow from the routing, rows have a header, an empty message is one row, and K/V go once to each other node.

Shape letters: S steps, L MoE layers, B tokens per step, K top-k, R ranks, T = S * B tokens of all steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.balanced_choice import Sent, choose_balanced
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.replica_choice import choose_ranks
from moeplace.placement.cost.replica_rule import BALANCED, MOEPLACE
from moeplace.placement.cost.seconds import (
    collective_latency,
    expert_seconds,
    slowest_direction_seconds,
    transfer_seconds,
)
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.runtime.kv.exchange import relay_links


@dataclass(frozen=True)
class WireSizes:
    """Bytes of what travels.

    Attributes:
        row: a token copy with its header.
        hidden: a hidden vector without one, as partial sums travel.
        kv_row: K/V of one token and layer with its header.
    """

    row: int
    hidden: int
    kv_row: int


@dataclass(frozen=True, eq=False)
class Exchange:
    """One collective per layer.

    Attributes:
        bytes_SLRR: (S, L, R, R) int64 bytes from rank to rank, diagonal 0.
        issued_SL: (S, L) how often it is issued: 0 or 1.
        inside_nodes: whether it takes place inside each node, so that only the latency of a node counts.
        beside_first: whether it takes place while the layer's first exchange travels.
    """

    bytes_SLRR: np.ndarray
    issued_SL: np.ndarray
    inside_nodes: bool = False
    beside_first: bool = False


@dataclass(frozen=True, eq=False)
class ReplayTraffic:
    """Traffic and work of the steps of one run.

    Attributes:
        label: what runs, see `run_label`.
        exchanges: the collectives of a layer, in order.
        tokens_SLR: (S, L, R) assignments that each rank computes.
        activated_SLR: (S, L, R) experts with at least one token.
        beside_SLR: (S, L, R) assignments among them that are computed while the layer's first exchange travels;
            None = no rank computes then.
        kv_hops: (S, R, R) bytes of each hop of the K/V exchange: between nodes, then inside them; empty = no K/V.
        kv_pieces: in how many pieces they travel.
    """

    label: str
    exchanges: tuple[Exchange, ...]
    tokens_SLR: np.ndarray
    activated_SLR: np.ndarray
    beside_SLR: np.ndarray | None = None
    kv_hops: tuple[np.ndarray, ...] = field(default=())
    kv_pieces: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.tokens_SLR)

    def bytes_RR(self) -> np.ndarray:
        """(R, R) mean bytes of a step from rank to rank, K/V included."""
        layers = sum(exchange.bytes_SLRR.sum(axis=(0, 1)) for exchange in self.exchanges)
        kv = sum((hop.sum(axis=0) for hop in self.kv_hops), start=np.zeros((1, 1), np.int64))
        return (layers + kv) / self.num_steps

    def collectives_per_layer(self) -> float:
        """Mean over layers and steps."""
        return float(sum(exchange.issued_SL.mean() for exchange in self.exchanges))


def run_label(mode: Mode, *, node_aware: bool) -> str:
    """The mode, and whether copies go once per node."""
    return f"{mode} node-aware" if node_aware else mode


def even_homes(batch: int, num_ranks: int) -> tuple[int, ...]:
    """Tokens of a batch whose home each rank is: as even as possible, the first ranks taking the rest."""
    return tuple(batch // num_ranks + (rank < batch % num_ranks) for rank in range(num_ranks))


def count_traffic(
    ids_SLBK: np.ndarray,
    placement: Placement,
    mode: Mode,
    sizes: WireSizes,
    *,
    node_aware: bool = False,
    kv_pieces: int = 1,
    replica_rule: str = MOEPLACE.name,
) -> ReplayTraffic:
    """Traffic of steps whose routing is known.

    Args:
        ids_SLBK: (S, L, B, K) expert ids, -1 = none; homes are consecutive blocks of the batch (`even_homes`).
        placement: the placement.
        mode: execution mode.
        sizes: bytes of rows.
        node_aware: dispatch-combine sends one copy per node.
        kv_pieces: pieces of the K/V exchange in coherent mode, 0 = none.
        replica_rule: who serves an expert with several slots; by `balanced` nothing is sent before the first step.
    """
    steps, layers, batch, _ = ids_SLBK.shape
    home_B = np.repeat(np.arange(placement.num_ranks), even_homes(batch, placement.num_ranks))
    position = _Position(placement, np.tile(home_B, steps), np.repeat(np.arange(steps), batch), steps, replica_rule)
    counted = [position.layer(layer, ids_SLBK[:, layer].reshape(steps * batch, -1), mode) for layer in range(layers)]
    tokens, activated = (np.stack([each[i] for each in counted], axis=1) for i in (2, 3))
    label = run_label(mode, node_aware=node_aware)
    counts, homes = [each[0] for each in counted], [each[1] for each in counted]
    if mode == "allgather":
        exchanges = _dense(placement, steps, layers, batch, sizes)
    elif mode == "coherent":
        exchanges = _moving(position, counts, homes, sizes)
        owned = np.stack([position.per_rank(before) for before, _ in homes], axis=1).sum(axis=1)
        hops = _kv_hops(placement, owned, sizes) if kv_pieces else ()
        return ReplayTraffic(label, exchanges, tokens, activated, kv_hops=hops, kv_pieces=kv_pieces)
    elif node_aware and placement.num_nodes > 1:
        beside = np.stack([position.of_own_node(count_TR) for count_TR in counts], axis=1)
        return ReplayTraffic(label, _by_node(position, counts, sizes), tokens, activated, beside)
    else:
        exchanges = _direct(position, counts, sizes)
    return ReplayTraffic(label, exchanges, tokens, activated)


class _Position:
    """Where the tokens of all steps are, layer by layer."""

    def __init__(self, placement: Placement, home_T: np.ndarray, step_T: np.ndarray, steps: int, rule: str) -> None:
        self._rule, self.placement, self.home_T, self.step_T, self.steps = rule, placement, home_T, step_T, steps
        self.owner_T = home_T.astype(np.int32)
        self._token_T = np.tile(np.arange(len(home_T) // steps), steps)

    def layer(
        self, layer: int, ids_TK: np.ndarray, mode: Mode
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
        """Experts per rank (T, R) of each token, its owner before and after, tokens and activated experts (S, R)."""
        placement, ranks = self.placement, self.placement.num_ranks
        ids_TK = np.ascontiguousarray(ids_TK, dtype=np.int32)
        rank_TK = np.empty(ids_TK.shape, np.int32)
        near_T = self.owner_T if mode == "coherent" else self.home_T.astype(np.int32)
        copies_ER = placement.copies_LER[layer]
        if self._rule == BALANCED.name and placement.has_replicas:
            sent = Sent(near_T, self.step_T, self._token_T)
            choose_balanced(ids_TK, copies_ER, placement.node_of_rank, near_T, sent, rank_TK)
        else:
            choose_ranks(ids_TK, copies_ER, placement.node_of_rank, near_T, self._token_T, rank_TK)
        token, k = np.nonzero(rank_TK >= 0)
        rank, step = rank_TK[token, k], self.step_T[token]
        count_TR = np.zeros((len(ids_TK), ranks), np.int64)
        np.add.at(count_TR, (token, rank), 1)
        tokens_SR = np.bincount(step * ranks + rank, minlength=self.steps * ranks).reshape(self.steps, ranks)
        used = np.zeros((self.steps, ranks, placement.num_experts), bool)
        used[step, rank, ids_TK[token, k]] = True
        before_T = self.owner_T
        if mode == "coherent":
            score_TR = 2 * count_TR + (np.arange(ranks) == before_T[:, None])
            best_T = np.where(count_TR > 0, score_TR, -1).argmax(axis=1)
            self.owner_T = np.where(count_TR.any(axis=1), best_T, before_T).astype(np.int32)
        return count_TR, (before_T, self.owner_T), tokens_SR, used.sum(axis=2)

    def per_rank(self, rank_T: np.ndarray) -> np.ndarray:
        """(S, R) tokens of each step on each rank."""
        ranks = self.placement.num_ranks
        flat = self.step_T * ranks + rank_T
        return np.bincount(flat, minlength=self.steps * ranks).reshape(self.steps, ranks)

    def of_own_node(self, count_TR: np.ndarray) -> np.ndarray:
        """(S, R) assignments that each rank computes for tokens whose home is in its node."""
        node_R = self.placement.node_of_rank
        own_TR = np.where(node_R[self.home_T][:, None] == node_R, count_TR, 0)
        return own_TR.reshape(self.steps, -1, len(node_R)).sum(axis=1)

    def copies(self, source_T: np.ndarray, target_TR: np.ndarray) -> np.ndarray:
        """(S, R, R) copies from each token's source (-1 = none) to its targets, without those to itself."""
        ranks = self.placement.num_ranks
        token, target = np.nonzero(target_TR & (source_T[:, None] >= 0))
        source = source_T[token]
        flat = (self.step_T[token] * ranks + source) * ranks + target
        copies = np.bincount(flat, minlength=self.steps * ranks * ranks).reshape(self.steps, ranks, ranks)
        copies[:, np.arange(ranks), np.arange(ranks)] = 0
        return copies


def _messages(copies_SLRR: np.ndarray, row: int, linked_RR: np.ndarray | None = None) -> np.ndarray:
    """Bytes of messages with headers: at least one row between any two ranks that exchange."""
    ranks = copies_SLRR.shape[-1]
    linked_RR = np.ones((ranks, ranks), bool) if linked_RR is None else linked_RR
    return np.maximum(copies_SLRR, 1) * row * (linked_RR & ~np.eye(ranks, dtype=bool))


def _always(copies_SLRR: np.ndarray) -> np.ndarray:
    return np.ones(copies_SLRR.shape[:2], np.int64)


def _there_and_back(
    copies_SLRR: np.ndarray, sizes: WireSizes, same_RR: np.ndarray | None, *, beside_first: bool = False
) -> tuple[Exchange, Exchange]:
    """A dispatch and its combine; `same_RR` = it takes place inside nodes."""
    inside = same_RR is not None
    there = Exchange(_messages(copies_SLRR, sizes.row, same_RR), _always(copies_SLRR), inside, beside_first)
    back = Exchange(copies_SLRR.swapaxes(2, 3) * sizes.hidden, _always(copies_SLRR), inside, beside_first)
    return there, back


def _direct(position: _Position, counts: Sequence[np.ndarray], sizes: WireSizes) -> tuple[Exchange, ...]:
    copies = np.stack([position.copies(position.home_T, count_TR > 0) for count_TR in counts], axis=1)
    return _there_and_back(copies, sizes, None)


def _by_node(position: _Position, counts: Sequence[np.ndarray], sizes: WireSizes) -> tuple[Exchange, ...]:
    node_R = position.placement.node_of_rank
    across, inside = [], []
    for count_TR in counts:
        far = own = foreign = np.zeros((), np.int64)
        for node in range(int(node_R[-1]) + 1):
            here_TR = np.where(node_R == node, count_TR, 0)
            at_home_T = node_R[position.home_T] == node
            gateway_T = np.where(at_home_T | ~here_TR.any(axis=1), -1, here_TR.argmax(axis=1))
            far = far + position.copies(position.home_T, np.arange(len(node_R)) == gateway_T[:, None])
            own = own + position.copies(np.where(at_home_T, position.home_T, -1), here_TR > 0)
            foreign = foreign + position.copies(gateway_T, here_TR > 0)
        across.append(far)
        inside.append((own, foreign))
    there, back = _there_and_back(np.stack(across, axis=1), sizes, None)
    own, foreign = (np.stack([copies[turn] for copies in inside], axis=1) for turn in (0, 1))
    same_RR = node_R[:, None] == node_R[None, :]
    at_home = _there_and_back(own, sizes, same_RR, beside_first=True)
    return there, *at_home, *_there_and_back(foreign, sizes, same_RR), back


def _moving(
    position: _Position,
    counts: Sequence[np.ndarray],
    owners: Sequence[tuple[np.ndarray, np.ndarray]],
    sizes: WireSizes,
) -> tuple[Exchange, ...]:
    first = np.stack([position.copies(b, c > 0) for c, (b, _) in zip(counts, owners, strict=True)], axis=1)
    dispatch = Exchange(_messages(first, sizes.row), _always(first))
    spread_SL = np.zeros(first.shape[:2], np.int64)
    for layer, count_TR in enumerate(counts):
        spread = (count_TR > 0).sum(axis=1) > 1
        spread_SL[np.unique(position.step_T[spread]), layer] = 1
    if not spread_SL.any():
        return (dispatch,)
    second = np.stack([position.copies(a, c > 0) for c, (_, a) in zip(counts, owners, strict=True)], axis=1)
    return dispatch, Exchange(second.swapaxes(2, 3) * sizes.hidden, spread_SL)


def _dense(placement: Placement, steps: int, layers: int, batch: int, sizes: WireSizes) -> tuple[Exchange, ...]:
    ranks = placement.num_ranks
    width = max(even_homes(batch, ranks))
    pairs = np.broadcast_to(~np.eye(ranks, dtype=bool), (steps, layers, ranks, ranks)) * width
    return Exchange(pairs * sizes.row, _always(pairs)), Exchange(pairs * sizes.hidden, _always(pairs))


def _kv_hops(placement: Placement, rows_SR: np.ndarray, sizes: WireSizes) -> tuple[np.ndarray, ...]:
    """(S, R, R) bytes between nodes and inside them; of one hop where there is one node."""
    node_R = placement.node_of_rank
    others_RR = (node_R[:, None] == node_R[None, :]) & ~np.eye(len(node_R), dtype=bool)
    if placement.num_nodes == 1:
        return (rows_SR[:, :, None] * others_RR * sizes.kv_row,)
    links_RR = relay_links(node_R)
    held_SR = rows_SR + rows_SR @ links_RR
    return rows_SR[:, :, None] * links_RR * sizes.kv_row, held_SR[:, :, None] * others_RR * sizes.kv_row


def predict_seconds(traffic: ReplayTraffic, cluster: Cluster, calibration: Calibration) -> np.ndarray:
    """(S,) predicted seconds of each step.

    Every layer: the latency and transfer of its exchanges, the busiest rank's expert time, and what else a layer of
    this mode costs. K/V that travel while layers run cost the measured share of their own time on links
    (`Calibration.kv_exposed`), at least what the busiest direction of a link needs beyond the layers.
    """
    cluster = calibration.apply(cluster)
    steps, layers, _ = traffic.tokens_SLR.shape
    seconds_S = latency_seconds(traffic, cluster) + layers * calibration.layer_overhead(traffic.label)
    for exchange in traffic.exchanges:
        for step, layer in np.argwhere(exchange.issued_SL):
            seconds_S[step] += transfer_seconds(exchange.bytes_SLRR[step, layer], cluster, 1.0)
    for step in range(steps):
        for layer in range(layers):
            tokens_R, activated_R = traffic.tokens_SLR[step, layer], traffic.activated_SLR[step, layer]
            seconds_S[step] += expert_seconds(tokens_R, activated_R, cluster, calibration.expert)
    if traffic.beside_SLR is not None:
        seconds_S -= hidden_seconds(traffic, cluster, calibration)
    if traffic.kv_hops:
        seconds_S = _with_kv(traffic, seconds_S, cluster, calibration.kv_exposed)
    return seconds_S


def hidden_seconds(traffic: ReplayTraffic, cluster: Cluster, calibration: Calibration) -> np.ndarray:
    """(S,) seconds of what is done beside first exchanges, as long as these travel: they do not count twice."""
    assert traffic.beside_SLR is not None
    first, beside = traffic.exchanges[0], [exchange for exchange in traffic.exchanges if exchange.beside_first]
    share_SL = traffic.beside_SLR.sum(axis=2) / np.maximum(traffic.tokens_SLR.sum(axis=2), 1)
    hidden_S = np.zeros(traffic.num_steps)
    for step, layer in np.ndindex(share_SL.shape):
        tokens_R, activated_R = traffic.tokens_SLR[step, layer], traffic.activated_SLR[step, layer]
        own = share_SL[step, layer] * expert_seconds(tokens_R, activated_R, cluster, calibration.expert)
        for exchange in beside:
            own += cluster.intra.latency + transfer_seconds(exchange.bytes_SLRR[step, layer], cluster, 1.0)
        hidden_S[step] += min(own, transfer_seconds(first.bytes_SLRR[step, layer], cluster, 1.0))
    return hidden_S


def latency_seconds(traffic: ReplayTraffic, cluster: Cluster) -> np.ndarray:
    """(S,) seconds of each step that its exchanges would take if they were empty."""
    seconds_S = np.zeros(traffic.num_steps)
    for exchange in traffic.exchanges:
        latency = cluster.intra.latency if exchange.inside_nodes else collective_latency(cluster)
        seconds_S += latency * exchange.issued_SL.sum(axis=1)
    return seconds_S


def kv_link_seconds(traffic: ReplayTraffic, cluster: Cluster) -> np.ndarray:
    """(S,) seconds for which the K/V of each step occupy links, both hops one after the other, without latency."""
    hops = [[transfer_seconds(bytes_RR, cluster, 1.0) for bytes_RR in hop] for hop in traffic.kv_hops]
    return np.sum(hops, axis=0)


def _with_kv(traffic: ReplayTraffic, seconds_S: np.ndarray, cluster: Cluster, exposed: float | None) -> np.ndarray:
    """The K/V exchange added; in one piece it is waited for at once, in several it is partly hidden."""
    first = traffic.kv_hops[0]
    own_S = kv_link_seconds(traffic, cluster)
    if traffic.kv_pieces == 1:
        latency = collective_latency(cluster) + cluster.intra.latency * (len(traffic.kv_hops) - 1)
        return seconds_S + own_S + latency
    total = sum(exchange.bytes_SLRR.sum(axis=1) for exchange in traffic.exchanges) + first
    busy_S = np.array([slowest_direction_seconds(bytes_RR, cluster) for bytes_RR in total])
    return np.maximum(seconds_S + own_S * (exposed or 0.0), busy_S)
