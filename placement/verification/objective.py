"""The objective of a statement, from counts: prices of links, transfers, predicted seconds.

Shape letters: L MoE layers, R ranks, N nodes.
"""

import numpy as np

from moeplace.placement.verification.counting import Counts
from moeplace.placement.verification.statement import Link, Statement


def imbalance(statement: Statement, load_LR: np.ndarray) -> np.ndarray:
    """(L,) time of the busiest rank over the mean, 1 where there is no load."""
    time_LR = load_LR / statement.speed_R
    fair_L = load_LR.sum(axis=1) / statement.speed_R.sum()
    return np.divide(time_LR.max(axis=1), fair_L, out=np.ones(len(fair_L)), where=fair_L > 0)


def traffic(statement: Statement, counts: Counts) -> float:
    """The mode's traffic at the prices of links."""
    layers = len(counts.served_LR)
    if statement.mode == "allgather":
        return 0.0
    rank_R, node_N, pair_RR = prices(statement)
    if statement.mode == "dispatch-combine":
        paid = (counts.served_LR * rank_R).sum() + (counts.served_LN * node_N).sum()
        return float(paid / (counts.tokens * layers))
    moved_RR = (counts.first_LRR[1:] + counts.second_LRR[1:]).sum(axis=0)
    return float((moved_RR * pair_RR).sum() / max(layers - 1, 1))


def prices(statement: Statement) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R,) price of a serving rank, (N,) of its node beside it, (R, R) of a copy; a copy inside a node is the unit."""
    ranks, node_R = statement.num_ranks, statement.node_R
    other_RR = ~np.eye(ranks, dtype=bool)
    inside_RR = (node_R[:, None] == node_R) & other_RR
    across_RR = (node_R[:, None] != node_R) & other_RR
    byte_RR = seconds_per_byte(statement, statement.price_links)
    if ranks == 1:
        return np.ones(1), np.zeros(1), np.zeros((1, 1))
    unit = byte_RR[inside_RR].mean() if inside_RR.any() else byte_RR[across_RR].mean()
    pair_RR = np.where(other_RR, byte_RR / unit, 0.0)
    if not inside_RR.any():
        return _mean_over(pair_RR, across_RR), np.zeros(statement.num_nodes), pair_RR
    if statement.distance_RR is None:
        more = byte_RR[across_RR].mean() / unit - 1.0 if across_RR.any() else 0.0
        pair_RR = np.where(across_RR, 1.0 + more, np.where(inside_RR, 1.0, 0.0))
        return np.ones(ranks), np.full(statement.num_nodes, more), pair_RR
    rank_R = np.where(inside_RR.any(axis=0), _mean_over(pair_RR, inside_RR), 1.0)
    if not across_RR.any():
        return rank_R, np.zeros(1), pair_RR
    entry_R = _mean_over(pair_RR, across_RR)
    return rank_R, np.array([entry_R[node_R == n].mean() - 1.0 for n in range(statement.num_nodes)]), pair_RR


def seconds_per_byte(statement: Statement, links: tuple[Link, Link]) -> np.ndarray:
    """(R, R) seconds that a byte keeps a rank's link busy; a topology scales pairs within their tier."""
    node_R = statement.node_R
    same_RR = node_R[:, None] == node_R
    size_R = np.bincount(node_R)[node_R]
    between_R = 1.0 / np.minimum(links[1].bandwidth, links[1].node_bandwidth / size_R)
    byte_RR = np.where(same_RR, 1.0 / links[0].bandwidth, between_R[:, None])
    byte_RR[np.diag_indices(len(node_R))] = 0.0
    if statement.distance_RR is not None:
        for tier_RR in (same_RR, ~same_RR):
            farthest = statement.distance_RR[tier_RR].max(initial=0.0)
            if farthest > 0:
                byte_RR[tier_RR] *= statement.distance_RR[tier_RR] / farthest
    return byte_RR


def seconds(statement: Statement, counts: Counts) -> float:
    """Predicted seconds of one step."""
    layers, ranks = len(counts.served_LR), statement.num_ranks
    latency = 0.0 if ranks == 1 else statement.links[1 if statement.num_nodes > 1 else 0].latency
    total = layers * (statement.overhead + statement.expert[0]) + float(counts.busiest_L.sum())
    hidden = statement.batch * statement.hidden_bytes
    for layer in range(layers):
        first_RR, second_RR = _exchanges(statement, counts, layer)
        total += latency * (1.0 + (counts.spread_L[layer] if statement.mode == "coherent" else 1.0))
        total += hidden * (transfer(statement, first_RR) + transfer(statement, second_RR))
    if statement.mode == "coherent" and ranks > 1:
        everyone_RR = np.tile(counts.attended_R[:, None], ranks)
        every_node_RN = np.tile(counts.attended_R[:, None], statement.num_nodes)
        copies_RR = forward(everyone_RR, every_node_RN, statement.node_R)
        total += latency + statement.batch * statement.kv_bytes * transfer(statement, copies_RR)
    return float(total)


def _exchanges(statement: Statement, counts: Counts, layer: int) -> tuple[np.ndarray, np.ndarray]:
    if statement.mode == "coherent":
        return counts.first_LRR[layer], counts.second_LRR[layer]
    if statement.mode == "allgather":
        every_RR = np.full((statement.num_ranks,) * 2, 1.0 / statement.num_ranks)
        return every_RR, every_RR
    copies_RR = forward(counts.first_LRR[layer], counts.entering_LRN[layer], statement.node_R)
    return copies_RR, copies_RR.T


def forward(wanted_RR: np.ndarray, entering_RN: np.ndarray, node_R: np.ndarray) -> np.ndarray:
    """Copies where a row enters another node once, at the rank of the sender's place there (modulo), which forwards."""
    ranks = len(node_R)
    copies_RR = np.zeros((ranks, ranks))
    for source in range(ranks):
        place = source - int(np.flatnonzero(node_R == node_R[source])[0])
        for node in range(int(node_R[-1]) + 1):
            members = np.flatnonzero(node_R == node)
            door = source if node == node_R[source] else int(members[place % len(members)])
            copies_RR[source, door] += entering_RN[source, node]
            copies_RR[door, members] += wanted_RR[source, members]
    copies_RR[np.diag_indices(ranks)] = 0.0
    return copies_RR


def transfer(statement: Statement, copies_RR: np.ndarray) -> float:
    """Seconds per byte of an exchange: the busiest rank inside nodes, plus the busiest rank or node between them."""
    node_R, (intra, inter) = statement.node_R, statement.links
    remote_RR = np.where(np.eye(len(node_R), dtype=bool), 0.0, copies_RR)
    same_RR = node_R[:, None] == node_R
    if statement.distance_RR is None:
        byte_RR = np.where(same_RR, 1.0 / intra.bandwidth, 1.0 / inter.bandwidth)
    else:
        byte_RR = seconds_per_byte(statement, statement.links)
    inside, across = (remote_RR * byte_RR * tier_RR for tier_RR in (same_RR, ~same_RR))
    by_rank = [float(max(t.sum(axis=0).max(), t.sum(axis=1).max())) for t in (inside, across)]
    if statement.num_nodes == 1:
        return by_rank[0]
    crossing_RR = remote_RR * ~same_RR
    by_node = max(float(np.bincount(node_R, crossing_RR.sum(axis=axis)).max()) for axis in (0, 1))
    return by_rank[0] + max(by_rank[1], by_node / inter.node_bandwidth)


def _mean_over(pair_RR: np.ndarray, counted_RR: np.ndarray) -> np.ndarray:
    number_R = counted_RR.sum(axis=0)
    return np.where(number_R > 0, (pair_RR * counted_RR).sum(axis=0) / np.maximum(number_R, 1), 0.0)
