"""One layer of the dispatch objective from start to end: nodes, ranks inside nodes, both together, replicas.

Shape letters: L MoE layers, E experts of a layer, R ranks, N nodes, S slots per layer.
"""

from dataclasses import dataclass, replace

import numpy as np

from moeplace.placement.problem import Problem
from moeplace.placement.search.annealing import seed_state
from moeplace.placement.search.hedge import risk_matrix
from moeplace.placement.search.layout import load_limits, packed_start, padded_load, to_slots
from moeplace.placement.search.nets import connectivity, layer_nets
from moeplace.placement.search.packing import packed_imbalance
from moeplace.placement.search.swaps import anneal_layer, no_ties
from moeplace.placement.search.ties import Ties, first_ranks
from moeplace.placement.solvers.replicas.search import OVERLOAD, ReplicaSearch

MOST_TOKENS = 40_000
"""Tokens of a layer that a search looks at; more are thinned evenly, which bounds memory and time."""
LUKEWARM = 0.25
"""First temperature of a run that begins at the placement in force, as a share of that of other runs."""


@dataclass(frozen=True)
class Effort:
    """How hard to search one layer.

    Attributes:
        sweeps: proposals per pair of experts and temperature, in tenths.
        hot: first temperature as a share of the mean expert's load.
        copy_seconds: what the search over copies should take on an unshared core.
        hedge: weight of `robust.risk_matrix`.
        seconds: what all of it should take.
        warm: begin at the placement in force, lukewarm, if there is one.
    """

    sweeps: int = 300
    hot: float = 0.06
    copy_seconds: float = 0.0
    hedge: float = 0.004
    seconds: float = 0.0
    warm: bool = False

    def scaled(self, factor: float) -> "Effort":
        """Less of the same: `factor` in 0..1."""
        return replace(
            self,
            sweeps=max(int(self.sweeps * factor), 4),
            copy_seconds=self.copy_seconds * factor,
            seconds=self.seconds * factor,
        )


class LayerSearch:
    """The nets, limits and hedge of one layer, its ties to the placement in force, and the searches over them."""

    def __init__(
        self, problem: Problem, layer: int, cap: float | None, hedge: float, stop: np.ndarray,
        ties: Ties | None = None, *, plain: bool = False,
    ) -> None:  # fmt: skip
        assert problem.trace is not None
        self._ties = ties
        self._problem, self._layer, self._stop = problem, layer, stop
        self._copies: ReplicaSearch | None = None
        self._cluster = problem.cluster
        self._experts = int(problem.experts_per_layer[layer])
        ids_TK = problem.trace.layer(layer)
        stride = max(1, len(ids_TK) // MOST_TOKENS)
        self._start_S = packed_start(problem, layer)
        limits_R = load_limits(problem, layer, self._start_S, cap)
        if cap is not None and problem.redundant_slots[layer] > 0 and not plain:  # copies may balance better
            fair_R = self._cluster.speed_of_rank * problem.load_LE[layer].sum() / self._cluster.speed_of_rank.sum()
            limits_R = np.minimum(limits_R, fair_R * max(cap, packed_imbalance(problem, layer)) + 1e-9)
        thin_TK = np.ascontiguousarray(ids_TK[::stride])
        assigned = int((ids_TK >= 0).sum())
        share = (thin_TK >= 0).sum() / assigned if assigned else 1.0
        self._full_limit_R = limits_R
        self._limit_R = limits_R * share
        risk_SS = risk_matrix(problem.trace.select(slice(None, None, stride)), thin_TK, self._start_S, hedge)
        # Loads are those of all tokens, scaled: the cap must hold for them, not for the thinned ones.
        scaled_S = padded_load(problem, layer) * share
        self._nets = layer_nets(thin_TK, self._cluster.num_slots, risk_SS)._replace(load_E=scaled_S)
        self._near = no_ties(self._cluster.num_ranks)
        if ties is not None and ties.bind:
            # What the objective divides by; in coherent mode a rank more costs a copy there and one back.
            per_unit = len(thin_TK) * problem.num_layers / (2.0 if problem.mode == "coherent" else 1.0)
            self._near = ties.near(layer, per_unit)

    def penalised(self, rank_S: np.ndarray) -> float:
        """Objective of a layer without replicas as the search sees it: connectivity and hedge."""
        weight = self._problem.node_weight
        total = connectivity(self._nets, rank_S, self._cluster.node_of_rank, weight)
        for rank in range(self._cluster.num_ranks):
            members = np.flatnonzero(rank_S == rank)
            total += float(self._nets.risk_EE[np.ix_(members, members)].sum()) ** 2
        load_R = np.bincount(rank_S, self._nets.load_E, minlength=self._cluster.num_ranks)
        if len(self._near.new_ER):
            entries = np.arange(len(rank_S))
            excess = max(float(self._near.new_ER[entries, rank_S].sum()) - self._near.most_moves, 0.0)
            total += float(self._near.bias_ER[entries, rank_S].sum()) + OVERLOAD * self._nets.load_E.sum() * excess
        return total + OVERLOAD * self._overload(load_R)

    def _overload(self, load_R: np.ndarray) -> float:
        """Load above the limits over all ranks, 0 within rounding."""
        over = float(np.maximum(load_R - self._limit_R, 0.0).sum())
        return over if over > 1e-6 * self._nets.load_E.sum() else 0.0

    def run(self, effort: Effort, rng: np.random.Generator) -> tuple[float, np.ndarray]:
        """One run from the packed start, or from the placement in force: (penalised objective, (S,) int32 slots)."""
        if self._ties is not None and (effort.warm or self._ties.bind):
            return self._run_from_old(self._ties, effort, rng)
        rank_S = self._start_S.copy()
        if self._problem.survive and effort.copy_seconds > 0:  # every expert has copies from the start
            return self._copy_search().run(to_slots(rank_S, self._experts), effort.hot, effort.copy_seconds, rng)
        cluster, weight = self._cluster, self._problem.node_weight
        hot = effort.hot
        if cluster.num_nodes > 1:
            rank_S = self._nodes_first(rank_S, effort, rng)
            hot = effort.hot / 4  # both levels together: polish
        anneal_layer(
            self._nets, rank_S, cluster.node_of_rank, self._limit_R,
            node_weight=weight, sweeps=effort.sweeps, hot=hot, stop=self._stop, state=seed_state(rng),
        )  # fmt: skip
        if self._overload(np.bincount(rank_S, self._nets.load_E, minlength=cluster.num_ranks)):
            rank_S = self._start_S.copy()  # the limits are such that packing keeps them
        slots_S = to_slots(rank_S, self._experts)
        copies = int(self._problem.redundant_slots[self._layer])
        if copies <= 0 or effort.copy_seconds <= 0:
            return self.penalised(rank_S), slots_S
        return self._copy_search().run(slots_S, effort.hot, effort.copy_seconds, rng)

    def _run_from_old(self, ties: Ties, effort: Effort, rng: np.random.Generator) -> tuple[float, np.ndarray]:
        """Both levels together from the ties' row, which the result is never worse than."""
        row_S, cluster = ties.rows_LS[self._layer], self._cluster
        start_S = first_ranks(row_S, cluster.rank_of_slot, self._experts)
        hot = effort.hot * (LUKEWARM if effort.warm else 1.0)
        copies = self._problem.redundant_slots[self._layer] > 0
        if copies and ties.bind:
            seconds = max(effort.copy_seconds, 0.2 * effort.seconds)
            starts = [ties.start(self._layer, number) for number in range(2)]
            return self._copy_search().run_tied(starts, self._near, hot, seconds, rng)
        begin_S = ties.start(self._layer, int(rng.integers(2)))
        rank_S = first_ranks(begin_S, cluster.rank_of_slot, self._experts)
        anneal_layer(
            self._nets, rank_S, cluster.node_of_rank, self._limit_R, node_weight=self._problem.node_weight,
            sweeps=effort.sweeps, hot=hot, stop=self._stop, state=seed_state(rng), near=self._near,
        )  # fmt: skip
        rank_S = min((rank_S, start_S), key=self.penalised)
        slots_S = to_slots(rank_S, self._experts)
        if not copies or effort.copy_seconds <= 0:
            return self.penalised(rank_S), slots_S
        search = self._copy_search()
        found = search.run(slots_S, hot, effort.copy_seconds, rng)
        return min(found, (search.value(row_S), row_S), key=lambda pair: pair[0])

    def _copy_search(self) -> ReplicaSearch:
        if self._copies is None:
            self._copies = ReplicaSearch(
                self._problem, self._layer, self._nets, self._limit_R, self._full_limit_R, self._stop
            )
        return self._copies

    def _nodes_first(self, rank_S: np.ndarray, effort: Effort, rng: np.random.Generator) -> np.ndarray:
        """Experts to nodes, then inside every node to ranks; limits of nodes are the sums of their ranks'."""
        cluster = self._cluster
        node_R = cluster.node_of_rank
        node_limit_N = np.bincount(node_R, self._limit_R)
        node_S = node_R[rank_S]
        zero_N = np.zeros(cluster.num_nodes, np.int64)
        anneal_layer(
            self._nets, node_S, zero_N, node_limit_N,
            node_weight=0.0, sweeps=max(effort.sweeps // 3, 4), hot=effort.hot, stop=self._stop, state=seed_state(rng),
        )  # fmt: skip
        rank_S = np.empty_like(rank_S)
        for node in range(cluster.num_nodes):
            members, ranks = np.flatnonzero(node_S == node), np.flatnonzero(node_R == node)
            rank_S[members] = ranks[self._inside(members, ranks, effort, rng)]
        return rank_S

    def _inside(self, members: np.ndarray, ranks: np.ndarray, effort: Effort, rng: np.random.Generator) -> np.ndarray:
        """(members,) index into `ranks` of each member, for the tokens that use one of them."""
        local_of = np.full(len(self._nets.load_E) + 1, -1, np.int64)
        local_of[members] = np.arange(len(members))
        ids_TK = local_of[self._nets.ids_TK]  # -1 indexes the last entry, which stays -1
        nets = layer_nets(ids_TK[(ids_TK >= 0).any(axis=1)], len(members), self._nets.risk_EE[np.ix_(members, members)])
        room_R = self._cluster.slots_of_rank[ranks].copy()
        load_R = np.zeros(len(ranks))
        local_S = np.empty(len(members), np.int64)
        for member in np.argsort(-nets.load_E, kind="stable"):
            time_R = np.where(room_R > 0, load_R / self._cluster.speed_of_rank[ranks], np.inf)
            local_S[member] = int(time_R.argmin())
            load_R[local_S[member]] += nets.load_E[member]
            room_R[local_S[member]] -= 1
        limit_R = np.maximum(self._limit_R[ranks], 0.0)
        anneal_layer(
            nets, local_S, np.zeros(len(ranks), np.int64), limit_R,
            node_weight=0.0, sweeps=effort.sweeps, hot=effort.hot, stop=self._stop, state=seed_state(rng),
        )  # fmt: skip
        return local_S
