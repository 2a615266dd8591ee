"""One layer with replicas: where they save most, then moves by the million on bits, then exact ones, within the cap.

Shape letters: T tokens, E experts of a layer, R ranks, N nodes, S slots per layer.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from moeplace.placement.problem import Problem
from moeplace.placement.search.annealing import seed_state
from moeplace.placement.search.nets import LayerNets, layer_nets
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.search.swaps import Near, no_ties
from moeplace.placement.solvers.replicas.bit_search import anneal_bits
from moeplace.placement.solvers.replicas.exact_search import Schedule, anneal_replicas
from moeplace.placement.solvers.replicas.filling import fill_with_replicas
from moeplace.placement.solvers.replicas.rule import Rule, replay, rule_on, unserved
from moeplace.placement.solvers.replicas.seats import Seats, count_moves, find_holders, seat
from moeplace.placement.solvers.replicas.token_bits import bit_state, token_bits

OVERLOAD = 1e3
"""Price of a token above the cap when runs are compared: any feasible run beats any other."""
TOUCH_SECONDS = 90e-9
"""Time to evaluate one token of a move in the exact search (measured: top-6, 64 experts, 8 ranks, one core of 2024)."""
WORD_SECONDS = 0.1e-9
"""Time per word of 64 tokens and row of bits in the search on bits (the same machine)."""
MOVE_SECONDS = 2e-6
"""What a move on bits costs whatever the number of words (the same machine)."""
_COOLING = 0.04
"""Last temperature as a share of the first."""
_REPAIRS = 4
TIED_RUNS = 4
"""Runs from a placement in force: they end in different places, and long ones are no better than short ones."""


class ReplicaSearch:
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
        self._rule = rule_on(nets.ids_TK, cluster.node_of_rank, problem.node_weight)
        self._every_rule = rule_on(
            np.ascontiguousarray(problem.trace.layer(layer), np.int16), cluster.node_of_rank, 0.0
        )
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
        cluster = self._problem.cluster
        redundant = int(self._problem.redundant_slots[self._layer])
        hot *= float(self._nets.load_E.sum()) / cluster.num_slots
        if self._problem.survive:
            return self._surviving(hot, seconds, rng)
        starts = [plain_S]
        if self.overload(plain_S) > 0:  # the cap needs replicas of the heaviest
            starts.append(pack_slots(self._problem, self._layer).astype(np.int32))
        slots_S = starts[-1].copy()
        self._fill(slots_S, redundant)
        work = 0.85 * seconds / self._evaluation_seconds(redundant)
        self._anneal_bits(slots_S, self._limit_R, hot, work, rng)
        self._repair(slots_S, 0.02 * work, rng)
        if self.overload(slots_S) > 0:  # start again from where the cap holds, and stay there
            slots_S = starts[-1].copy()
            self._add_within_limits(slots_S, redundant)
        value = self._exact_moves(slots_S, 1, 0.0, int(0.1 * seconds / TOUCH_SECONDS), rng)
        return min([(value, slots_S), *((self.value(each), each) for each in starts)], key=lambda pair: pair[0])

    def _surviving(self, hot: float, seconds: float, rng: np.random.Generator) -> tuple[float, np.ndarray]:
        """Start where every expert has the replicas that survival asks for; the moves keep them."""
        packed_S = pack_slots(self._problem, self._layer)
        slots_S = packed_S.copy()
        # On every third token, where three times as many moves can be tried; then on all.
        touches = seconds / TOUCH_SECONDS
        self._exact_moves(slots_S, 3, hot, int(0.4 * touches), rng)
        value = self._exact_moves(slots_S, 1, 0.25 * hot, int(0.6 * touches), rng)
        return min((value, slots_S), (self.value(packed_S), packed_S), key=lambda pair: pair[0])

    def run_tied(
        self, starts: Sequence[np.ndarray], near: Near, hot: float, seconds: float, rng: np.random.Generator
    ) -> tuple[float, np.ndarray]:
        """(objective with hedge and bias, (S,) slots) from rows within the cap on moves; as good as the first.

        Args:
            starts: (S,) int32 slot -> expert each.
            near: ties to ranks.
            hot, seconds: as in `run`.
        """
        cluster = self._problem.cluster
        hot *= float(self._nets.load_E.sum()) / cluster.num_slots
        redundant = int(self._problem.redundant_slots[self._layer])
        work = 0.85 * seconds / (self._evaluation_seconds(redundant) * TIED_RUNS)
        found = [starts[0]]
        for number in range(TIED_RUNS):
            slots_S = starts[number % len(starts)].copy()
            self._anneal_bits(slots_S, self._limit_R, hot, work, rng, near)
            if count_moves(slots_S, cluster.rank_of_slot, near.new_ER) <= near.most_moves:
                self._exact_moves(slots_S, 1, 0.0, int(0.1 * seconds / TOUCH_SECONDS / TIED_RUNS), rng, near)
                found.append(slots_S)

        def tied_value(some_S: np.ndarray) -> float:
            held = some_S >= 0
            bias = near.bias_ER[some_S[held], cluster.rank_of_slot[held]].sum()
            return self.value(some_S) + float(bias)

        return min(((tied_value(each_S), each_S) for each_S in found), key=lambda pair: pair[0])

    def value(self, slots_S: np.ndarray) -> float:
        """The objective of a layer as the search sees it: traffic and hedge by exact replay, overload priced."""
        cost, _ = self._replay(self._rule, slots_S)
        replicas_E = np.maximum(np.bincount(slots_S[slots_S >= 0], minlength=len(self._nets.load_E)), 1)
        shared_EE = self._nets.risk_EE / np.outer(replicas_E, replicas_E)
        for first, last in itertools.pairwise(self._problem.cluster.first_slots):
            held = slots_S[first:last][slots_S[first:last] >= 0]
            cost += float(shared_EE[np.ix_(held, held)].sum()) ** 2
        return cost + OVERLOAD * self.overload(slots_S)

    def overload(self, slots_S: np.ndarray) -> float:
        """Load above the limits, by replay of all the layer's tokens."""
        _, load_R = self._replay(self._every_rule, slots_S)
        over = float(np.maximum(load_R - self._full_limit_R, 0.0).sum())
        return over if over > 1e-6 else 0.0

    def _replay(self, rule: Rule, slots_S: np.ndarray) -> tuple[float, np.ndarray]:
        """(sum of costs, (R,) loads) of the rule's tokens."""
        cluster, served = self._problem.cluster, unserved(rule)
        holders = find_holders(slots_S, cluster.rank_of_slot, len(self._nets.load_E), cluster.num_ranks)
        return float(replay(rule, holders, served)), served.load_R

    def _fill(self, slots_S: np.ndarray, count: int) -> None:
        fill_with_replicas(self._rule, slots_S, self._problem.cluster.rank_of_slot, len(self._nets.load_E), count)

    def _repair(self, slots_S: np.ndarray, work: float, rng: np.random.Generator) -> None:
        """Descend, in place, under limits tightened by what the bits misjudge, until the replay keeps the cap."""
        limit_R = self._limit_R.copy()
        for _ in range(_REPAIRS):
            if self.overload(slots_S) <= 0:
                return
            _, load_R = self._replay(self._rule, slots_S)
            limit_R -= np.maximum(load_R - self._limit_R, 0.0)
            self._anneal_bits(slots_S, limit_R, 0.0, work, rng)

    def _evaluation_seconds(self, redundant: int) -> float:
        cluster = self._problem.cluster
        rows = 2 * cluster.slots_of_rank.mean() + 6 * redundant + 4 * cluster.num_ranks
        return float(MOVE_SECONDS + self._bits.tokens_EW.shape[1] * rows * WORD_SECONDS)

    def _seats(self, slots_S: np.ndarray) -> Seats:
        return seat(slots_S, self._problem.cluster.first_slots, len(self._nets.load_E), self._experts)

    def _anneal_bits(
        self, slots_S: np.ndarray, limit_R: np.ndarray, hot: float, work: float, rng: np.random.Generator,
        near: Near | None = None,
    ) -> None:  # fmt: skip
        near = no_ties(self._problem.num_ranks) if near is None else near
        seats = self._seats(slots_S)
        state = bit_state(self._bits, seats, self._problem.cluster.node_of_rank, self._problem.node_weight)
        schedule = Schedule(float(hot), float(_COOLING * hot), float(work))
        anneal_bits(self._bits, seats, state, limit_R, self._nets.risk_EE, schedule, near, self._stop, seed_state(rng))

    def _exact_moves(
        self, slots_S: np.ndarray, thinned: int, hot: float, touches: int, rng: np.random.Generator,
        near: Near | None = None,
    ) -> float:  # fmt: skip
        """Exact moves on one in `thinned` tokens, in place; returns `value`, or infinity for thinned ones."""
        near = no_ties(self._problem.num_ranks) if near is None else near
        cluster, nets, rule = self._problem.cluster, self._nets, self._rule
        if thinned > 1:
            risk_EE = nets.risk_EE / np.sqrt(float(thinned))
            nets = layer_nets(nets.ids_TK[::thinned], len(nets.load_E), risk_EE)
            rule = rule_on(nets.ids_TK, cluster.node_of_rank, self._problem.node_weight)
        replicas = self._problem.survive + 1
        schedule = Schedule(
            float(hot / thinned), float(_COOLING * hot / thinned), float(touches), replicas,
            min(replicas, cluster.num_nodes),
        )  # fmt: skip
        anneal_replicas(
            nets, rule, self._seats(slots_S), unserved(rule), self._limit_R / thinned, schedule,
            near._replace(bias_ER=near.bias_ER / thinned), self._stop, seed_state(rng),
        )  # fmt: skip
        return self.value(slots_S) if thinned == 1 else np.inf

    def _add_within_limits(self, slots_S: np.ndarray, redundant: int) -> None:
        """Add the replicas that save most, in place, while the cap holds."""
        for _ in range(redundant):
            trial_S = slots_S.copy()
            self._fill(trial_S, 1)
            if np.array_equal(trial_S, slots_S) or self.overload(trial_S) > 0:
                return
            slots_S[:] = trial_S
