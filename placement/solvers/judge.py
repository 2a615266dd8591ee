"""Which of several placements to hand in: constraints first, then the objective with its moves, then fewer moves.

Where the objective is a mean over layers, rows of different placements may be combined, each layer's best.

Shape letters: L MoE layers, S slots per layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moeplace.placement.objective import load_imbalance, measured, survival_deficit
from moeplace.placement.placement import Placement
from moeplace.placement.problem import CAP_ROUNDING, Problem
from moeplace.placement.search.sample import judging_trace
from moeplace.placement.search.ties import Ties
from moeplace.profiling.traces.trace import RoutingTrace

SAME = 1e-9
"""Objectives closer than this, relatively, are a tie."""


class Judge:
    """Compares placements of one problem.

    Args:
        problem: gives objective, price and cap on moves.
        ties: of the problem, None without a previous placement.
        caps_L: (L,) imbalance that each layer is held to, None = any.
        seconds: time limit of a search that compares many drafts, on as many tokens as it can pay for; None = on all.
    """

    def __init__(
        self, problem: Problem, ties: Ties | None, caps_L: np.ndarray | None, seconds: float | None = None
    ) -> None:
        self._problem, self._ties, self._caps_L = problem, ties, caps_L
        self._trace = problem.trace
        if problem.trace is not None and seconds is not None:
            self._trace = judging_trace(problem, seconds)
        self._known: dict[bytes, _Values] = {}

    @property
    def caps_L(self) -> np.ndarray | None:
        """(L,) imbalance that each layer is held to, None = any."""
        return self._caps_L

    def best(self, drafts: Sequence[np.ndarray]) -> np.ndarray:
        """The best draft, (L, S) slots; of equal ones the one that moves least, then the first."""
        if len(drafts) == 1:
            return drafts[0]
        keys = [self.key(draft) for draft in drafts]
        order = sorted(range(len(drafts)), key=lambda i: keys[i][2])
        best = order[0]
        for i in order[1:]:
            if _better(keys[i][:2], keys[best][:2]):
                best = i
        return drafts[best]

    def key(self, slots_LS: np.ndarray) -> tuple[tuple[float, ...], float, float]:
        """(what is broken: moves above their cap, copies missing, imbalance above the cap; objective; moves)."""
        placement = self._problem.placement(slots_LS)
        values = self._values(placement)
        over = 0.0
        if self._caps_L is not None:
            over = float(np.maximum(values.imbalance_L - self._caps_L - CAP_ROUNDING, 0.0).sum())
        broken = (self._excess(placement), float(survival_deficit(self._problem, placement)), round(over, 4))
        moves_L = self._moves_L(placement)
        return broken, values.objective + float(self._price_L(placement).sum()), float(moves_L.sum())

    def objective(self, slots_LS: np.ndarray) -> float:
        """The problem's objective alone."""
        return self._values(self._problem.placement(slots_LS)).objective

    def imbalance(self, slots_LS: np.ndarray) -> np.ndarray:
        """(L,) imbalance of each layer."""
        return self._values(self._problem.placement(slots_LS)).imbalance_L

    @property
    def sampled(self) -> bool:
        """Whether drafts are compared on a part of the tokens only."""
        return self._trace is not self._problem.trace

    def on_all_tokens(self) -> "Judge":
        """The same judge, who takes the time to compare on all tokens."""
        return Judge(self._problem, self._ties, self._caps_L) if self.sampled else self

    def by_layer(self, slots_LS: np.ndarray) -> np.ndarray | None:
        """(L,) the objective of each layer, which is their mean; None where layers depend on each other."""
        return self._values(self._problem.placement(slots_LS)).objective_L

    def combine(self, drafts: Sequence[np.ndarray], by_layer: Sequence[np.ndarray] | None = None) -> np.ndarray | None:
        """Each layer's best row, where layers are independent; None where they are not, or rows differ in length.

        Args:
            drafts: (L, S) each.
            by_layer: (L,) what to compare instead of the objective of each draft.
        """
        if len({draft.shape for draft in drafts}) > 1:
            return None
        given = [None] * len(drafts) if by_layer is None else by_layer
        by_layer_D = [
            self._layer_values(self._problem.placement(draft), value_L)
            for draft, value_L in zip(drafts, given, strict=True)
        ]
        values = [value_L for value_L in by_layer_D if value_L is not None]
        if len(values) < len(drafts):
            return None
        chosen_L = []
        for layer in range(self._problem.num_layers):
            order = sorted(range(len(drafts)), key=lambda i: values[i][layer][2])
            best = order[0]
            for i in order[1:]:
                if _better(values[i][layer][:2], values[best][layer][:2]):
                    best = i
            chosen_L.append(best)
        return np.stack([drafts[draft][layer] for layer, draft in enumerate(chosen_L)])

    def _layer_values(
        self, placement: Placement, objective_L: np.ndarray | None
    ) -> list[tuple[tuple[float, ...], float, float]] | None:
        """`key` of each layer by itself, None if the objective is no mean over layers."""
        layers, values = self._problem.num_layers, self._values(placement)
        objective_L = values.objective_L if objective_L is None else objective_L
        if objective_L is None:
            return None
        over_L = np.zeros(layers)
        if self._caps_L is not None:
            over_L = np.maximum(values.imbalance_L - self._caps_L - CAP_ROUNDING, 0.0).round(4)
        moves_L, limit = self._moves_L(placement), np.inf if self._ties is None else self._ties.most_moves
        excess_L = np.maximum(moves_L - limit, 0.0)
        value_L = objective_L / layers + self._price_L(placement)
        return [((float(excess_L[x]), float(over_L[x])), float(value_L[x]), float(moves_L[x])) for x in range(layers)]

    def _values(self, placement: Placement) -> "_Values":
        """Evaluated once for every placement."""
        key = placement.slot_to_expert.tobytes()
        if key not in self._known:
            self._known[key] = _evaluated(self._problem, placement, self._trace)
        return self._known[key]

    def _moves_L(self, placement: Placement) -> np.ndarray:
        if self._ties is None:
            return np.zeros(placement.num_layers)
        return self._ties.moves(placement.slot_to_expert, placement.rank_of_slot)

    def _excess(self, placement: Placement) -> float:
        limit = np.inf if self._ties is None else self._ties.most_moves
        return float(np.maximum(self._moves_L(placement) - limit, 0.0).sum())

    def _price_L(self, placement: Placement) -> np.ndarray:
        """(L,) objective units for the moves of each layer."""
        if self._ties is None or not self._ties.price_LE.any():
            return np.zeros(placement.num_layers)
        fetched_LE = (self._ties.new_LER & (placement.copies_LER > 0)).sum(axis=2)
        return np.asarray((fetched_LE * self._ties.price_LE).sum(axis=1))


class _Values(NamedTuple):
    """The objective, the imbalance of each layer, and the objective by layer where it is a mean over them."""

    objective: float
    imbalance_L: np.ndarray
    objective_L: np.ndarray | None


def _evaluated(problem: Problem, placement: Placement, trace: RoutingTrace | None) -> _Values:
    if trace is None:
        imbalance_L = load_imbalance(problem, placement)
        return _Values(float(imbalance_L.mean()), imbalance_L, imbalance_L)
    evaluation = problem.evaluate(placement, trace)
    name, objective, _ = measured(problem, evaluation)
    by_layer = None
    if name == "imbalance":
        by_layer = evaluation.imbalance_L
    elif name == "traffic" and problem.mode == "dispatch-combine":
        by_layer = evaluation.ranks_per_token_L + problem.node_weight * evaluation.nodes_per_token_L
    elif name == "seconds" and problem.mode == "dispatch-combine":
        by_layer = evaluation.seconds_L * len(evaluation.seconds_L)
    imbalance_L = evaluation.imbalance_L
    if trace is not problem.trace and not placement.has_replicas:
        imbalance_L = load_imbalance(problem, placement)  # of all tokens: nothing to choose, hence nothing to replay
    return _Values(objective, imbalance_L, by_layer)


def _better(key: tuple[tuple[float, ...], float], than: tuple[tuple[float, ...], float]) -> bool:
    if key[0] != than[0]:
        return key[0] < than[0]
    return key[1] < than[1] - SAME * max(abs(than[1]), abs(key[1]))
