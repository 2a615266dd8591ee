"""Load caps kept under the replica choice that the runtime makes.

Packing splits an expert's load evenly, the search on bits does not see owners, and names of ranks decide ties: what a
search returns may exceed a cap that it meant to keep. So it is replayed layer by layer in model order, as `evaluate`
does, and a layer above its cap is mended by exact moves, from where it is and from packing, overload before traffic.

Shape letters: T tokens, L MoE layers, E experts of a layer, K top-k, R ranks, S slots per layer.
"""

import itertools

import numpy as np

from moeplace.placement.problem import Problem
from moeplace.placement.search.annealing import seed_state
from moeplace.placement.search.nets import LayerNets, layer_nets
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.search.swaps import no_ties
from moeplace.placement.solvers.replicas.budget import narrow, widen, with_steps
from moeplace.placement.solvers.replicas.exact_search import Schedule, anneal_replicas
from moeplace.placement.solvers.replicas.rule import Rule, follow_owners, replay, rule_on, unserved
from moeplace.placement.solvers.replicas.seats import Holders, find_holders, seat

MOVES = 600
"""Moves that each attempt of the first round may try (8 to 72 ranks with 8 to 96 experts mostly needed fewer than
200); a round has twice those of the round before."""
ROUNDS = 6
"""The last attempts try 32 times as many moves: experts of seven ranks' load on 72 ranks with one spare slot each."""
HOT = 0.02
"""Temperature of half the attempts, as a share of the mean slot's tokens: overload that no single move ends."""


def keep_caps(
    problem: Problem, slots_LS: np.ndarray, caps_L: np.ndarray, rng: np.random.Generator, stop: np.ndarray,
    *, packs: bool = True,
) -> np.ndarray:  # fmt: skip
    """(L, S) the slots with layers that exceed their cap on imbalance mended, as far as moves can; others untouched.

    Args:
        problem: has a trace.
        slots_LS: (L, S) slot -> expert; under a global replica budget of its layout, and no layer gets more slots.
        caps_L: (L,) imbalance that each layer is held to.
        rng: draws the moves.
        stop: (1,) uint8, set when time is up: then layers stay as they are, or as the best attempt left them.
        packs: whether to begin from packing too, which keeps nearly any cap and has nothing of a row's traffic.
    """
    assert problem.trace is not None
    kept_LS, near_T = slots_LS.copy(), np.full(problem.trace.num_tokens, -1, np.int16)
    if not (problem.redundant_slots > 0).any():
        return kept_LS
    is_wide = slots_LS.shape[1] != problem.cluster.num_slots
    for layer in range(problem.num_layers):
        ids_TK = np.ascontiguousarray(problem.trace.layer(layer), np.int16)
        owners_T = near_T if problem.mode == "coherent" else None
        rule = rule_on(ids_TK, problem.cluster.node_of_rank, problem.node_weight, owners_T)
        step, row_S = narrow(problem, kept_LS[layer]) if is_wide else (0, kept_LS[layer])
        mend = _Mend(with_steps(problem, step) if is_wide else problem, layer, rule, caps_L)
        if mend.overload(row_S) > 0 and not stop[0]:
            row_S = mend.run(row_S, rng, stop, packs)
            kept_LS[layer] = widen(problem, row_S, step) if is_wide else row_S
        if problem.mode == "coherent":
            near_T = mend.owners(row_S, near_T)
    return kept_LS


class _Mend:
    """One layer, its tokens where they are, and the most that each rank may serve."""

    def __init__(self, problem: Problem, layer: int, rule: Rule, caps_L: np.ndarray) -> None:
        cluster = problem.cluster
        self._problem, self._layer, self._rule, self._cluster = problem, layer, rule, cluster
        self._entries = max(cluster.num_slots, problem.num_experts)
        self._ids_TK = rule.asked_TX[:, :-1]
        total = int((self._ids_TK >= 0).sum())
        self._limit_R = caps_L[layer] * total / cluster.speed_of_rank.sum() * cluster.speed_of_rank + 1e-9
        self._nets: LayerNets | None = None

    def overload(self, row_S: np.ndarray) -> float:
        """Assignments above the limits."""
        served, holders = unserved(self._rule), self._holders(row_S)
        replay(self._rule, holders, served)
        return float(np.maximum(served.load_R - self._limit_R, 0.0).sum())

    def owners(self, row_S: np.ndarray, near_T: np.ndarray) -> np.ndarray:
        """(T,) where tokens are after the layer."""
        served = unserved(self._rule)
        replay(self._rule, self._holders(row_S), served)
        return follow_owners(served.rank_TK, near_T, self._cluster.num_ranks)

    def run(self, row_S: np.ndarray, rng: np.random.Generator, stop: np.ndarray, packs: bool) -> np.ndarray:
        """(S,) the first attempt without overload, else the row of least; a round that gains nothing is the last."""
        least, best_S = self.overload(row_S), row_S
        starts = [row_S, pack_slots(self._problem, self._layer)] if packs else [row_S]
        for number in range(ROUNDS):
            before = least
            for hot, start in itertools.product((0.0, HOT), starts):
                if least <= 0 or stop[0]:
                    return best_S
                moved_S = start.astype(np.int32)
                self._descend(moved_S, hot, MOVES << number, rng, stop)
                least, best_S = min((least, best_S), (self.overload(moved_S), moved_S), key=lambda pair: pair[0])
            if least >= before:
                break
        return best_S

    def _descend(self, row_S: np.ndarray, hot: float, moves: int, rng: np.random.Generator, stop: np.ndarray) -> None:
        """Exact moves, in place."""
        if self._nets is None:
            self._nets = layer_nets(self._ids_TK, self._entries)
        replicas, experts = self._problem.survive + 1, int(self._problem.experts_per_layer[self._layer])
        touched = 2.0 * self._nets.load_E.sum() / experts
        hot *= float(self._nets.load_E.sum()) / self._cluster.num_slots
        schedule = Schedule(hot, 0.1 * hot, moves * touched, replicas, min(replicas, self._cluster.num_nodes))
        seats = seat(row_S, self._cluster.first_slots, self._entries, experts)
        anneal_replicas(
            self._nets,
            self._rule,
            seats,
            unserved(self._rule),
            self._limit_R,
            schedule,
            no_ties(self._cluster.num_ranks),
            stop,
            seed_state(rng),
        )

    def _holders(self, row_S: np.ndarray) -> Holders:
        return find_holders(row_S, self._cluster.rank_of_slot, self._entries, self._cluster.num_ranks)
