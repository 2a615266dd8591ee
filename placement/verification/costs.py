"""From bounds by layer to bounds on traffic and on predicted seconds.

Shape letters: T tokens, L MoE layers, R ranks, N nodes.
"""

import numpy as np

from moeplace.placement.verification.objective import prices, seconds_per_byte
from moeplace.placement.verification.proofs import Parted, Prover
from moeplace.placement.verification.statement import Statement


def least_traffic(prover: Prover, ranks: Parted, nodes: Parted) -> float:
    """The traffic objective at the bounds of its parts."""
    statement = prover.statement
    if statement.mode == "allgather":
        return 0.0
    if statement.mode == "dispatch-combine":
        used_L = [float((ids >= 0).any(axis=1).mean()) for ids in prover.ids]
        by_layer = zip(ranks.d_L, nodes.d_L, used_L, strict=True)
        return float(np.mean([_served(statement, d, dn, used) for d, dn, used in by_layer]))
    copies = _copies(prover, ranks, statement.num_ranks)
    across = _copies(prover, nodes, statement.num_nodes)
    moved, far = (float(first_L.sum() + second_L[1:].sum()) for first_L, second_L in (copies, across))
    return paid(statement, moved, far, prices(statement)[2]) / max(prover.layers - 1, 1)


def _served(statement: Statement, d: float, dn: float, used: float) -> float:
    """Least price of d ranks on dn nodes per token: the cheapest, in part; both convex, so means stand for all."""
    if used <= 0:
        return 0.0
    rank_R, node_N, _ = prices(statement)
    first: list[float] = []
    others: list[float] = []
    for node, price in enumerate(node_N):
        own = np.sort(rank_R[statement.node_R == node])
        first.append(max(float(own[0] + price), 0.0))
        others.extend(own[1:])
    best = _cheapest(np.array(first + others), d / used)
    if node_N.min() >= 0:
        best = max(best, _cheapest(rank_R, d / used) + _cheapest(node_N, dn / used))
    return used * best


def _cheapest(values: np.ndarray, number: float) -> float:
    weight = np.clip(number - np.arange(len(values)), 0.0, 1.0)
    return float(weight @ np.sort(values))


def _copies(prover: Prover, bounds: Parted, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """(L - 1,) least copies of the first exchange per token, (L,) of the second, in `coherent` mode.

    A token pays d - 1 or d to be brought to d parts, nothing while it has no owner, and d - 1 to reach its new one.
    """
    sizes = [(ids >= 0).sum(axis=1) for ids in prover.ids]
    seen_T, second, fresh = np.zeros(prover.trace.num_tokens, bool), [], []
    for layer, size_T in enumerate(sizes):
        second.append(max(float(bounds.d_L[layer]) - float((size_T > 0).mean()), 0.0))
        newcomers_T = (np.minimum(np.maximum(size_T, 1), parts) - 1)[~seen_T]
        fresh.append(newcomers_T.sum() / len(size_T))
        seen_T |= size_T > 0
    second_L, fresh_L = np.array(second), np.array(fresh)
    if prover.trace.top_k > 1:
        return np.maximum(second_L - fresh_L, 0.0)[1:], second_L
    pairs_L = np.array([prover.weight(layer).sum() for layer in range(prover.layers - 1)])
    return np.maximum(pairs_L - bounds.stay_L, 0.0), second_L


def paid(statement: Statement, copies: float, across: float, price_RR: np.ndarray) -> float:
    """Least price of so many copies, at least `across` of them between nodes."""
    other_RR = ~np.eye(statement.num_ranks, dtype=bool)
    same_RR = (statement.node_R[:, None] == statement.node_R) & other_RR
    inside = float(price_RR[same_RR].min()) if same_RR.any() else np.inf
    if statement.num_nodes == 1:
        return copies * inside if same_RR.any() else 0.0
    outside = float(price_RR[other_RR & ~same_RR].min())
    return across * outside + max(copies - across, 0.0) * min(inside, outside)


def least_seconds(prover: Prover, ranks: Parted, nodes: Parted) -> float:
    """Predicted seconds with every maximum over ranks replaced by a bound."""
    s, layers, size = prover.statement, prover.layers, prover.statement.num_ranks
    latency = 0.0 if size == 1 else s.links[1 if s.num_nodes > 1 else 0].latency
    total = layers * (s.overhead + latency) + sum(_expert_seconds(prover, layer) for layer in range(layers))
    if size == 1:
        return float(total)
    hidden = s.batch * s.hidden_bytes
    if s.mode == "allgather":
        per_byte = seconds_per_byte(s, s.links) if s.distance_RR is not None else None
        return float(total + layers * (latency + 2 * hidden * _dense(s, per_byte)))
    if s.mode == "dispatch-combine":
        return float(total + layers * latency + 2 * hidden * _dispatch(prover, ranks, nodes))
    first_L, second_L = _copies(prover, ranks, size)
    far_first_L, far_second_L = _copies(prover, nodes, s.num_nodes)
    moved = _first_scatter(s, float(ranks.d_L[0]))
    moved += _exchange(s, float(first_L.sum()), float(far_first_L.sum()))
    moved += _exchange(s, float(second_L.sum()), float(far_second_L.sum()))
    return float(total + hidden * moved + latency + _kv(prover))


def _expert_seconds(prover: Prover, layer: int) -> float:
    """Mean over steps of the slowest rank: all work over all speeds, the heaviest expert; or the mean step's bound."""
    s, ids_TK = prover.statement, prover.ids[layer]
    fixed, per_token, per_activated = s.expert
    tokens, experts = len(ids_TK), int(s.experts_L[layer])
    lanes = min(s.batch, tokens)
    length = tokens // lanes
    token, slot = np.nonzero((ids_TK >= 0) & (np.arange(tokens) < lanes * length)[:, None])
    count_SE = np.zeros((length, experts))
    np.add.at(count_SE, (token % length, ids_TK[token, slot]), 1.0)
    work_SE = per_token * s.batch / lanes * count_SE + per_activated * (count_SE > 0)
    slowest_S = work_SE.sum(axis=1) / s.speed_R.sum()
    if not prover.spare_L[layer]:
        slowest_S = np.maximum(slowest_S, work_SE.max(axis=1) / s.speed_R.max())
    mean_E = work_SE.mean(axis=0)
    of_mean = prover.layer_imbalance(layer, mean_E) * mean_E.sum() / s.speed_R.sum()
    return fixed + max(float(slowest_S.mean()), float(of_mean))


def _dense(s: Statement, per_byte_RR: np.ndarray | None) -> float:
    """Seconds per byte of every token to every rank."""
    share_RR = np.full((s.num_ranks,) * 2, 1.0 / s.num_ranks)
    np.fill_diagonal(share_RR, 0.0)
    same_RR = s.node_R[:, None] == s.node_R
    cost_RR = np.where(same_RR, 1 / s.links[0].bandwidth, 1 / s.links[1].bandwidth)
    cost_RR = cost_RR if per_byte_RR is None else per_byte_RR
    busiest = [max(float(t.sum(axis=a).max()) for a in (0, 1)) for t in (share_RR * cost_RR * same_RR,
                                                                         share_RR * cost_RR * ~same_RR)]  # fmt: skip
    if s.num_nodes == 1:
        return busiest[0]
    by_node = max(float(np.bincount(s.node_R, (share_RR * ~same_RR).sum(axis=a)).max()) for a in (0, 1))
    return busiest[0] + max(busiest[1], by_node / s.links[1].node_bandwidth)


def _dispatch(prover: Prover, ranks: Parted, nodes: Parted) -> float:
    """Seconds per byte from homes to the ranks that serve, all layers."""
    s, size = prover.statement, prover.statement.num_ranks
    spare = bool((prover.spare_L > 0).any())
    if not spare and s.distance_RR is None:
        return _scatter(s, float(ranks.d_L.sum()), float(nodes.d_L.sum()))
    largest = int(np.bincount(s.node_R).max())
    copies_L, across_L = ranks.d_L * (1 - 1 / size), nodes.d_L * (1 - largest / size)
    if spare:  # homes are known then, and may serve more of their own tokens than chance would have it
        home_L = np.array([_at_home(prover, layer) for layer in range(prover.layers)])
        used_L = np.array([(ids >= 0).any(axis=1).mean() for ids in prover.ids])
        copies_L, across_L = np.minimum(copies_L, ranks.d_L - home_L), np.minimum(across_L, nodes.d_L - used_L)
    return _exchange(s, float(np.maximum(copies_L, 0).sum()), float(np.maximum(across_L, 0).sum()))


def _at_home(prover: Prover, layer: int) -> float:
    """Most tokens, as a share, whose home (token t on rank t mod R) can hold one of their experts."""
    ids_TK, size = prover.ids[layer], prover.statement.num_ranks
    experts = int(prover.statement.experts_L[layer])
    token, slot = np.nonzero(ids_TK >= 0)
    met_ER = np.zeros((experts, size))
    np.add.at(met_ER, (ids_TK[token, slot], token % size), 1.0)
    falling_ER = np.sort(met_ER, axis=1)[:, ::-1]
    further = np.sort(falling_ER[:, 1:].ravel())[::-1][: max(int(prover.spare_L[layer]), 0)].sum()
    return float(min(falling_ER[:, 0].sum() + further, (ids_TK >= 0).any(axis=1).sum()) / len(ids_TK))


def _scatter(s: Statement, d: float, dn: float) -> float:
    """From a uniform home to d ranks on dn nodes, across nodes once, by the gateway of the home's place."""
    node_R, size = s.node_R, s.num_ranks
    homes_R = np.zeros(size)  # for how many homes, itself included, a rank is where their rows enter its node
    for home in range(size):
        place = home - int(np.flatnonzero(node_R == node_R[home])[0])
        for node in range(s.num_nodes):
            members = np.flatnonzero(node_R == node)
            homes_R[home if node == node_R[home] else members[place % len(members)]] += 1
    total = d * _harmonic((size - homes_R) / size) / s.links[0].bandwidth
    if s.num_nodes > 1:
        most_N = np.array([(homes_R[node_R == n] - 1).max() / size for n in range(s.num_nodes)])
        by_node = _harmonic((size - np.bincount(node_R)) / size) / s.links[1].node_bandwidth
        total += dn * max(_harmonic(most_N) / s.links[1].bandwidth, by_node)
    return float(total)


def _first_scatter(s: Statement, d: float) -> float:
    """The first layer of `coherent`: every copy from a uniform owner for itself."""
    size, size_N = s.num_ranks, np.bincount(s.node_R)
    if s.distance_RR is not None:
        return d * float(seconds_per_byte(s, s.links).sum(axis=0).min()) / size**2
    total = d * _harmonic((size_N[s.node_R] - 1) / size) / s.links[0].bandwidth
    if s.num_nodes > 1:
        across_N = (size - size_N) / size
        by_rank = _harmonic(across_N[s.node_R]) / s.links[1].bandwidth
        total += d * max(by_rank, _harmonic(across_N) / s.links[1].node_bandwidth)
    return float(total)


def _exchange(s: Statement, copies: float, across: float) -> float:
    """Seconds per byte of so many copies per token, evenly shared by all links."""
    if s.distance_RR is not None:
        return paid(s, copies, across, seconds_per_byte(s, s.links) / s.num_ranks)
    inside = 1 / (s.num_ranks * s.links[0].bandwidth)
    if s.num_nodes == 1:
        return copies * inside
    outside = max(1 / (s.num_ranks * s.links[1].bandwidth), 1 / (s.num_nodes * s.links[1].node_bandwidth))
    return across * outside + max(copies - across, 0.0) * min(inside, outside)


def _kv(prover: Prover) -> float:
    """K/V of every attended token to all other ranks, to another node once."""
    s, seen_T, attended = prover.statement, (prover.ids[0] >= 0).any(axis=1), 1.0
    for ids_TK in prover.ids[1:]:
        attended += float(seen_T.mean())
        seen_T = seen_T | (ids_TK >= 0).any(axis=1)
    size, nodes = s.num_ranks, s.num_nodes
    amount = s.batch * s.kv_bytes
    if s.distance_RR is not None:
        return amount * _exchange(s, attended * (size - 1), attended * (nodes - 1))
    total = attended * (size - nodes) / (size * s.links[0].bandwidth)
    if nodes > 1:
        outside = max(1 / (size * s.links[1].bandwidth), 1 / (nodes * s.links[1].node_bandwidth))
        total += attended * (nodes - 1) * outside
    return amount * total


def _harmonic(factors: np.ndarray) -> float:
    """Least max of p_i factor_i over shares p."""
    return 0.0 if (factors == 0).any() else 1.0 / float((1.0 / factors).sum())
