"""One layer with replicas: where copies save most, then moves by the million on bits, then exact ones, within the cap.

Shape letters: T tokens, E experts of a layer, R ranks, N nodes, S slots per layer.
"""

import numpy as np

from moeplace.placement.cost.replica_choice import preference_orders
from moeplace.placement.problem import Problem
from moeplace.placement.search.annealing import seed_state
from moeplace.placement.search.nets import LayerNets, layer_nets
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.solvers.replicas.bit_search import anneal_bits
from moeplace.placement.solvers.replicas.exact_search import (
    anneal_replicas,
    expert_masks,
    fill_with_copies,
    node_masks,
    replay_layer,
)
from moeplace.placement.solvers.replicas.token_bits import token_bits

OVERLOAD = 1e3
"""Price of a token above the cap when runs are compared: any feasible run beats any other."""
TOUCH_SECONDS = 90e-9
"""Time to evaluate one token of a move in the exact search."""
WORD_SECONDS = 0.1e-9
"""Time per word of 64 tokens and row of bits in the search on bits."""
MOVE_SECONDS = 2e-6
"""What a move on bits costs whatever the number of words."""
_REPAIRS = 4


class CopySearch:
    """The searches over one layer whose experts may have several slots.

    Args:
        problem, layer: what is solved.
        nets: tokens searched, with loads and hedge.
        limit_R: (R,) most load of each rank on the tokens of `nets`.
        full_limit_R: the same on all tokens.
        stop: (1,) uint8, set when time is up.
    """

    def __init__(
        self,
        problem: Problem,
        layer: int,
        nets: LayerNets,
        limit_R: np.ndarray,
        full_limit_R: np.ndarray,
        stop: np.ndarray,
    ) -> None:
        assert problem.trace is not None
        self._problem, self._layer, self._nets, self._stop = problem, layer, nets, stop
        self._limit_R, self._full_limit_R = limit_R, full_limit_R
        self._experts = int(problem.experts_per_layer[layer])
        cluster = problem.cluster
        self._start_R = np.concatenate([[0], np.cumsum(cluster.slots_of_rank)])
        self._masks_N, self._orders_PR = node_masks(cluster.node_of_rank), preference_orders(cluster.num_ranks)
        self._min_copies = problem.survive + 1
        self._min_nodes = min(self._min_copies, cluster.num_nodes)
        self._bits = token_bits(nets.ids_TK, cluster.num_slots, cluster.num_ranks)

    def run(
        self, plain_S: np.ndarray, hot: float, seconds: float, rng: np.random.Generator
    ) -> tuple[float, np.ndarray]:
        """(objective with hedge, overload priced; (S,) int32 slot -> expert) with replicas in the empty slots.

        Args:
            plain_S: (S,) int32, every expert in one slot, within the cap; the result is never worse.
            hot: first temperature, as a share of the mean slot's load.
            seconds: what it should take on an unshared core.
        """
        cluster, weight = self._problem.cluster, self._problem.node_weight
        copies = int(self._problem.redundant_slots[self._layer])
        hot *= float(self._nets.load_E.sum()) / cluster.num_slots
        if self._problem.survive:
            return self._surviving(hot, seconds, rng)
        slots_S = plain_S.copy()
        fill_with_copies(self._nets, slots_S, cluster.rank_of_slot, cluster.node_of_rank, weight, copies)
        work = 0.85 * seconds / self._evaluation_seconds(copies)
        self._anneal_bits(slots_S, self._limit_R, hot, work, rng)
        self._repair(slots_S, 0.02 * work, rng)
        if self.overload(slots_S) > 0:  # start again from where the cap holds, and stay there
            slots_S = plain_S.copy()
            self._add_within_limits(slots_S, copies)
        value = self._exact_moves(slots_S, self._nets, 1.0, 0.0, int(0.1 * seconds / TOUCH_SECONDS), rng)
        return min((value, slots_S), (self.value(plain_S), plain_S), key=lambda pair: pair[0])

    def _surviving(self, hot: float, seconds: float, rng: np.random.Generator) -> tuple[float, np.ndarray]:
        """Start where every expert has the copies that survival asks for; the moves keep them."""
        packed_S = pack_slots(self._problem, self._layer)
        slots_S = packed_S.copy()
        # On every third token, where three times as many moves can be tried; then on all.
        thin = layer_nets(self._nets.ids_TK[::3], len(self._nets.load_E))
        touches = seconds / TOUCH_SECONDS
        self._exact_moves(slots_S, thin, 3.0, hot, int(0.4 * touches), rng)
        value = self._exact_moves(slots_S, self._nets, 1.0, 0.25 * hot, int(0.6 * touches), rng)
        return min((value, slots_S), (self.value(packed_S), packed_S), key=lambda pair: pair[0])

    def value(self, slots_S: np.ndarray) -> float:
        """The objective of a layer as the search sees it: traffic and hedge by exact replay, overload priced."""
        cost, _ = self._replay(self._nets.ids_TK, slots_S, self._problem.node_weight)
        copies_E = np.maximum(np.bincount(slots_S[slots_S >= 0], minlength=len(self._nets.load_E)), 1)
        for first, last in zip(self._start_R[:-1], self._start_R[1:], strict=True):
            held = slots_S[first:last][slots_S[first:last] >= 0]
            cost += float((self._nets.risk_EE / np.outer(copies_E, copies_E))[np.ix_(held, held)].sum()) ** 2
        return cost + OVERLOAD * self.overload(slots_S)

    def overload(self, slots_S: np.ndarray) -> float:
        """Load above the limits, by replay of all the layer's tokens."""
        assert self._problem.trace is not None
        ids_TK = np.ascontiguousarray(self._problem.trace.layer(self._layer), dtype=np.int16)
        _, load_R = self._replay(ids_TK, slots_S, 0.0)
        over = float(np.maximum(load_R - self._full_limit_R, 0.0).sum())
        return over if over > 1e-6 else 0.0

    def _replay(self, ids_TK: np.ndarray, slots_S: np.ndarray, weight: float) -> tuple[float, np.ndarray]:
        cluster = self._problem.cluster
        load_R, cost_T = np.zeros(cluster.num_ranks), np.zeros(len(ids_TK))
        mask_E = expert_masks(slots_S, cluster.rank_of_slot, len(self._nets.load_E))
        cost = replay_layer(
            ids_TK, mask_E, self._masks_N, self._orders_PR, weight, cost_T,
            np.full(ids_TK.shape, -1, np.int64), load_R,
        )  # fmt: skip
        return float(cost), load_R

    def _repair(self, slots_S: np.ndarray, work: float, rng: np.random.Generator) -> None:
        """Descend, in place, under limits tightened by what the bits misjudge, until the replay keeps the cap."""
        limit_R = self._limit_R.copy()
        for _ in range(_REPAIRS):
            if self.overload(slots_S) <= 0:
                return
            _, load_R = self._replay(self._nets.ids_TK, slots_S, 0.0)
            limit_R -= np.maximum(load_R - self._limit_R, 0.0)
            self._anneal_bits(slots_S, limit_R, 0.0, work, rng)

    def _evaluation_seconds(self, copies: int) -> float:
        cluster = self._problem.cluster
        rows = 2 * cluster.slots_of_rank.mean() + 6 * copies + 4 * cluster.num_ranks
        return float(MOVE_SECONDS + self._bits.tokens_EW.shape[1] * rows * WORD_SECONDS)

    def _anneal_bits(
        self, slots_S: np.ndarray, limit_R: np.ndarray, hot: float, work: float, rng: np.random.Generator
    ) -> None:
        cluster = self._problem.cluster
        anneal_bits(
            *self._bits, self._experts, slots_S, self._start_R, cluster.node_of_rank, limit_R, self._nets.risk_EE,
            self._problem.node_weight, hot, 0.04 * hot, work, 1, self._stop, seed_state(rng),
        )  # fmt: skip

    def _exact_moves(
        self, slots_S: np.ndarray, nets: LayerNets, thinned: float, hot: float, touches: int, rng: np.random.Generator
    ) -> float:
        """Exact moves on one in `thinned` tokens, in place; returns `value`."""
        cluster = self._problem.cluster
        anneal_replicas(
            nets.ids_TK, nets.first_E, nets.token_of, self._experts, slots_S, cluster.rank_of_slot, self._masks_N,
            self._orders_PR, self._limit_R / thinned, self._nets.risk_EE / np.sqrt(thinned),
            self._problem.node_weight, hot / thinned, 0.04 * hot / thinned, touches, self._min_copies,
            self._min_nodes, self._stop, seed_state(rng),
        )  # fmt: skip
        return self.value(slots_S) if thinned == 1 else np.inf

    def _add_within_limits(self, slots_S: np.ndarray, copies: int) -> None:
        """Add the copies that save most, in place, while the cap holds."""
        cluster, weight = self._problem.cluster, self._problem.node_weight
        for _ in range(copies):
            trial_S = slots_S.copy()
            fill_with_copies(self._nets, trial_S, cluster.rank_of_slot, cluster.node_of_rank, weight, 1)
            if np.array_equal(trial_S, slots_S) or self.overload(trial_S) > 0:
                return
            slots_S[:] = trial_S
