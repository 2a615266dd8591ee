"""Replicas where an engine draws which of them serves: each is worth what its share of the tokens is worth.

Such a rule looks at one expert at a time. To a home with a fixed map, or to a token with its draws, a layer is an
ordinary placement without replicas, so a replica saves no rank by chance: it is a way to have some of an expert's
tokens elsewhere, where they cost less or where there is room. With share[h, q] = what rank q may be expected to serve
of the tokens of home h,

    traffic of expert e  =  sum over h, q of  share[h, q] * X[e, h, q]
    X[e, h, q]           =  price of rank q over the tokens of e at home h that have no other expert there

and likewise the load of each rank, so that the change by one more replica follows from a table. Replicas are added one
after another, the one that saves most first, load above the cap being dear; the table is counted again on the way.

Shape letters: T tokens, L MoE layers, E experts, K top-k, R ranks, H homes, N nodes, S slots per layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moeplace.placement.cost.in_turn import InTurn
from moeplace.placement.placement import EMPTY_SLOT
from moeplace.placement.problem import CAP_ROUNDING, Problem
from moeplace.placement.search.layout import unreplicated
from moeplace.placement.search.packing import pack_slots
from moeplace.profiling.traces.trace import RoutingTrace

OVERLOAD_PRICE = 20.0
"""Of a token above the cap, in ranks: the cap is kept before traffic is (as in `exact_search`)."""
TABLE_WORK = 1 << 24
"""Experts times ranks times tokens of one table of X; more tokens are thinned evenly (a tenth of a second)."""
TABLES = 8
"""Most tables for the replicas of one row: each serves for a quarter of the empty slots, of a rank for one."""
TABLE_SECONDS = 0.6e-9
"""Time of a table per expert, rank and token (measured: 64 experts on 8 ranks and 256 on 32, one core of 2024)."""
PAIR_SECONDS = 1.5e-6
"""What it takes besides, per expert and rank (the same machine)."""
ADDING_SHARE = 0.1
"""Of the time limit, for adding replicas to rows: the most promising ones if there is not time for all."""
TRIED = 64
"""Replicas that are priced by the shares of the rule, of those that are best when every home is alike."""


class Tables(NamedTuple):
    """What a layer's slots make of its tokens.

    Attributes:
        price_EHR: (E, H, R) float64 X of the module's docstring, per token of the layer.
        share_EHR: (E, H, R) float64, see `ReplicaRule.share`.
        load_EH: (E, H) float64 assignments of each expert by home, as shares of all.
    """

    price_EHR: np.ndarray
    share_EHR: np.ndarray
    load_EH: np.ndarray


def applies(problem: Problem) -> bool:
    """Whether slots are to spare, and an engine draws among replicas."""
    drawn = problem.replica_rule.share is not None and problem.mode == "dispatch-combine"
    return drawn and not problem.survive and bool((problem.redundant_slots > 0).any())


class DrawnLayer:
    """One layer, its tokens, and the load that each rank may have.

    Args:
        problem, layer: what is solved.
        ids_TK: (T, K) expert ids of the layer, -1 = none; token t has home t mod R.
        cap: imbalance allowed, None = any.
        turn: the rule, with all layers before this one taken.
    """

    def __init__(self, problem: Problem, layer: int, ids_TK: np.ndarray, cap: float | None, turn: InTurn) -> None:
        cluster, self._problem, self._layer, self._turn = problem.cluster, problem, layer, turn
        self._experts, self._ids_TK = int(problem.experts_per_layer[layer]), ids_TK
        self._share_of_rank_R = cluster.speed_of_rank / cluster.speed_of_rank.sum()
        self._limit_R = (np.inf if cap is None else cap + CAP_ROUNDING) * self._share_of_rank_R
        self._node_RN = (cluster.node_of_rank[:, None] == np.arange(cluster.num_nodes)).astype(np.int64)
        blocks, ranks = -(-len(ids_TK) // cluster.num_ranks), cluster.num_ranks  # one token of every home each
        stride = -(-blocks * ranks * self._experts * ranks // TABLE_WORK)
        self._shares: dict[bytes, np.ndarray] = {}
        self._few = np.flatnonzero(np.arange(len(ids_TK)) // ranks % stride == 0)

    def judge(self, slots_S: np.ndarray) -> tuple[float, float]:
        """(load above the limits as a share of all, price of ranks and nodes per token) by the rule as it draws."""
        rank_TK = self._turn.try_row(self._layer, slots_S, self._ids_TK)
        count_TR, ranks = _counts(rank_TK, self._problem.num_ranks), self._problem.num_ranks
        used = rank_TK >= 0
        pair = self._ids_TK[used].astype(np.int64) * ranks + rank_TK[used]
        served_ER = np.bincount(pair, minlength=self._experts * ranks).reshape(-1, ranks)
        load_R = (served_ER * self._per_token(served_ER.sum(axis=1))[:, None]).sum(axis=0)
        prices, used_TN = self._problem.prices, count_TR @ self._node_RN > 0
        price = ((count_TR > 0) @ prices.rank_R + used_TN @ prices.node_N).mean()
        return round(float(np.maximum(load_R - self._limit_R, 0.0).sum()), 6), float(price)

    def _per_token(self, tokens_E: np.ndarray) -> np.ndarray:
        """(E,) share of all the layer's load that a token of each expert stands for."""
        load_E = self._problem.load_LE[self._layer, : self._experts]
        return np.divide(load_E / max(load_E.sum(), 1e-30), tokens_E, out=np.zeros(len(load_E)), where=tokens_E > 0)

    def with_replicas(self, slots_S: np.ndarray) -> np.ndarray:
        """(S,) the slots with replicas in empty ones, as long as they save."""
        row_S, most = slots_S.copy(), -(-int((slots_S == EMPTY_SLOT).sum()) // 4)
        for _ in range(TABLES):
            if not (row_S == EMPTY_SLOT).any() or not self._add(row_S, most):
                break
        return row_S

    def _add(self, row_S: np.ndarray, most: int) -> int:
        """Add up to `most` replicas that save, in place; returns their number."""
        rank_S, added = self._problem.cluster.rank_of_slot, 0
        used: set[int] = set()  # the table is that before the first of them: no rank and no expert twice
        for change, expert, rank in self._candidates(row_S):
            if change >= -1e-9 or added == most:
                break
            if expert in used or -1 - rank in used:
                continue
            row_S[np.flatnonzero((rank_S == rank) & (row_S == EMPTY_SLOT))[0]] = expert
            used |= {expert, -1 - rank}
            added += 1
        return added

    def _candidates(self, row_S: np.ndarray) -> list[tuple[float, int, int]]:
        """(change of price per token, expert, rank) of the replicas that look best, rising."""
        cluster = self._problem.cluster
        held_ER = _held(row_S, cluster.rank_of_slot, self._experts, cluster.num_ranks)
        tables = self._tables(row_S, held_ER)
        rough_ER = self._rough_changes(held_ER, tables)
        room_R = np.bincount(cluster.rank_of_slot[row_S == EMPTY_SLOT], minlength=cluster.num_ranks) > 0
        rough_ER[held_ER | ~room_R] = np.inf
        load_R = np.einsum("ehr,eh->r", tables.share_EHR, tables.load_EH)
        best = np.argsort(rough_ER, axis=None, kind="stable")[:TRIED]
        pairs = [(int(i) // cluster.num_ranks, int(i) % cluster.num_ranks) for i in best]
        return sorted(
            (self._change(expert, rank, held_ER[expert], load_R, tables), expert, rank)
            for expert, rank in pairs
            if np.isfinite(rough_ER[expert, rank])
        )

    def _tables(self, row_S: np.ndarray, held_ER: np.ndarray) -> Tables:
        experts = self._experts
        rank_TK = self._turn.try_row(self._layer, row_S, self._ids_TK)
        price_EHR, load_EH = _marginal_prices(self._ids_TK[self._few], rank_TK[self._few], experts, self._problem)
        load_EH = load_EH * self._per_token(load_EH.sum(axis=1))[:, None]
        share_EHR = np.stack([self._share(held_R) for held_R in held_ER])
        return Tables(price_EHR, share_EHR, load_EH)

    def _overload(self, load_R: np.ndarray) -> float:
        return float(np.maximum(load_R - self._limit_R, 0.0).sum())

    def _rough_changes(self, held_ER: np.ndarray, tables: Tables) -> np.ndarray:
        """(E, R) change by a replica of each expert on each rank if it took the same share of every home's tokens."""
        count_E = np.maximum(held_ER.sum(axis=1), 1)
        price_ER, load_E = tables.price_EHR.sum(axis=1), tables.load_EH.sum(axis=1)
        mean_E = (price_ER * held_ER).sum(axis=1) / count_E
        load_R = np.einsum("ehr,eh->r", tables.share_EHR, tables.load_EH)
        part_E = load_E / (count_E + 1)
        over_R = np.maximum(load_R - self._limit_R, 0.0)
        more_ER = np.maximum(load_R + part_E[:, None] - self._limit_R, 0.0) - over_R
        less_ER = np.maximum(load_R - (part_E / count_E)[:, None] - self._limit_R, 0.0) - over_R
        over_ER = more_ER + (less_ER * held_ER).sum(axis=1)[:, None]
        return (price_ER - mean_E[:, None]) / (count_E + 1)[:, None] + self._overload_price * over_ER

    def _change(self, expert: int, rank: int, held_R: np.ndarray, load_R: np.ndarray, tables: Tables) -> float:
        """Expected change by one replica, by the shares of the rule."""
        more_R = held_R.copy()
        more_R[rank] = True
        shift_HR = self._share(more_R) - tables.share_EHR[expert]
        after_R = load_R + tables.load_EH[expert] @ shift_HR
        over = self._overload(after_R) - self._overload(load_R)
        return float((shift_HR * tables.price_EHR[expert]).sum()) + self._overload_price * over

    def _share(self, held_R: np.ndarray) -> np.ndarray:
        """(H, R) share that each rank may be expected to serve of an expert that these ranks hold."""
        key = held_R.tobytes()
        if key not in self._shares:
            rule = self._problem.replica_rule
            assert rule.share is not None
            self._shares[key] = rule.share(held_R, self._problem.cluster.node_of_rank)
        return self._shares[key]

    @property
    def _overload_price(self) -> float:
        return OVERLOAD_PRICE * self._problem.top_k * (1.0 + self._problem.node_weight)


def choose_rows(
    problem: Problem, trace: RoutingTrace, caps_L: np.ndarray | None, choices: Sequence[Sequence[np.ndarray]],
    adding: int, stop: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """(L, S) each layer's best row, in the order of the model: of those given, and of the best with replicas added.

    Args:
        problem: `applies` to it.
        trace: tokens on which rows are compared, a part of the problem's own or all.
        caps_L: (L,) imbalance that each layer is held to, None = any.
        choices: of each layer, (S,) slot -> expert each.
        adding: to how many of a layer's rows replicas are added, the best ones.
        stop: (1,) uint8, set when time is up: then nothing is added.
    """
    cluster, chosen = problem.cluster, []
    turn = InTurn(problem.replica_rule, cluster.rank_of_slot, cluster.node_of_rank, problem.num_experts)
    for layer, rows in enumerate(choices):
        drawn = DrawnLayer(problem, layer, trace.layer(layer), None if caps_L is None else float(caps_L[layer]), turn)
        tried = sorted(((drawn.judge(row_S), row_S) for row_S in rows), key=lambda pair: pair[0])
        for _, row_S in tried[: adding if not stop[0] else 0]:
            more_S = drawn.with_replicas(row_S)
            if not np.array_equal(more_S, row_S):
                tried.append((drawn.judge(more_S), more_S))
        best_S = min(tried, key=lambda pair: pair[0])[1]
        turn.take_row(best_S)
        chosen.append(best_S)
    return np.stack(chosen)


def rows_within(problem: Problem, tokens: int, seconds: float) -> int:
    """To how many rows of each layer replicas can be added in a share of the time."""
    pairs = problem.num_experts * problem.num_ranks
    table = pairs * PAIR_SECONDS + min(pairs * tokens, TABLE_WORK) * TABLE_SECONDS
    return int(ADDING_SHARE * seconds / (problem.num_layers * TABLES * table))


def keep_drawn_caps(problem: Problem, slots_LS: np.ndarray, caps_L: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """(L, S) the slots, or where a layer exceeds its cap by the problem's rule, a better choice for every layer.

    A layer may keep what it has, get replicas more, or be packed by load, with replicas or without.
    """
    trace = problem.trace
    assert trace is not None
    if (problem.evaluate(problem.placement(slots_LS)).imbalance_L <= caps_L + CAP_ROUNDING).all():
        return slots_LS
    packed = [
        [row_S, pack_slots(problem, layer).astype(np.int32), unreplicated(problem, layer)]
        for layer, row_S in enumerate(slots_LS)
    ]
    return choose_rows(problem, trace, caps_L, packed, 2, stop)


def _held(slots_S: np.ndarray, rank_S: np.ndarray, experts: int, ranks: int) -> np.ndarray:
    """(E, R) bool, which rank holds which expert."""
    held_ER = np.zeros((experts, ranks), bool)
    used = slots_S != EMPTY_SLOT
    held_ER[slots_S[used], rank_S[used]] = True
    return held_ER


def _counts(rank_TK: np.ndarray, ranks: int) -> np.ndarray:
    """(T, R) int64 experts of each token on each rank."""
    count_TR = np.zeros((len(rank_TK), ranks + 1), np.int64)
    rows = np.arange(len(rank_TK))
    for rank_T in rank_TK.T:
        count_TR[rows, rank_T] += 1  # -1 is the column behind the last
    return count_TR[:, :ranks]


def _marginal_prices(
    ids_TK: np.ndarray, rank_TK: np.ndarray, experts: int, problem: Problem
) -> tuple[np.ndarray, np.ndarray]:
    """(X of the module's docstring per token (E, H, R), tokens of each expert by home (E, H))."""
    node_R, prices, ranks = problem.cluster.node_of_rank, problem.prices, problem.num_ranks
    count_TR = _counts(rank_TK, ranks)
    count_TN = count_TR @ (node_R[:, None] == np.arange(problem.cluster.num_nodes)).astype(np.int64)
    price_TR = (count_TR == 0) * prices.rank_R + ((count_TN == 0) * prices.node_N)[:, node_R]
    has_TE = np.zeros((len(ids_TK), experts), np.float32)
    token, place = np.nonzero(ids_TK >= 0)
    expert, own = ids_TK[token, place], rank_TK[token, place]
    has_TE[token, expert] = 1.0
    price_EHR = np.stack([has_TE[h::ranks].T @ price_TR[h::ranks] for h in range(ranks)], axis=1).astype(np.float64)
    home, node = token % ranks, node_R[own]  # an expert is no company to itself, where it is now
    alone, alone_on_node = count_TR[token, own] == 1, count_TN[token, node] == 1
    np.add.at(price_EHR, (expert[alone], home[alone], own[alone]), prices.rank_R[own[alone]])
    price_EHN = np.zeros((experts, ranks, problem.cluster.num_nodes))
    where = (expert[alone_on_node], home[alone_on_node], node[alone_on_node])
    np.add.at(price_EHN, where, prices.node_N[node[alone_on_node]])
    load_EH = np.bincount(expert * ranks + home, minlength=experts * ranks).reshape(experts, ranks)
    return (price_EHR + price_EHN[:, :, node_R]) / max(len(ids_TK), 1), load_EH
