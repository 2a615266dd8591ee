"""Ties of a layer to the placement in force: what each expert costs on each rank, and how many may move.

A move is an expert on a rank that did not hold it before. One table says which are: warm starts, prices and caps on
moves of every search come from it. The start is the placement in force itself, or, where the cluster has changed, the
valid placement with the fewest moves: an assignment of experts to slots of ranks that hold them.

Shape letters: L MoE layers, E experts of a layer, R ranks, S slots per layer.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeplace.placement.placement import EMPTY_SLOT, Placement, slot_starts
from moeplace.placement.problem import Problem
from moeplace.placement.search.swaps import Near, no_ties
from moeplace.profiling.errors import InfeasibleError


@dataclass(frozen=True, eq=False)
class Ties:
    """Ties of all layers.

    Attributes:
        rows_LS: (L, S) int32 the start, valid for the problem's cluster.
        new_LER: (L, E, R) bool, whether expert e on rank r is a move.
        price_LE: (L, E) float64 objective units for each move of an expert.
        most_moves: of a layer; infinite without a cap.
        stay_LS: (L, S) int32 the start before its layers were mended for a load cap, None = as `rows_LS`. Searches end
            in other places from there, often better ones.
    """

    rows_LS: np.ndarray
    new_LER: np.ndarray
    price_LE: np.ndarray
    most_moves: float
    stay_LS: np.ndarray | None = None

    @property
    def bind(self) -> bool:
        """Whether moves are limited or priced; else the start is only a start."""
        return bool(np.isfinite(self.most_moves) or self.price_LE.any())

    def start(self, layer: int, number: int) -> np.ndarray:
        """(S,) int32 where a run begins in a layer: even numbers at the mended row, odd ones at the row before that."""
        rows_LS = self.rows_LS if self.stay_LS is None or number % 2 == 0 else self.stay_LS
        row_S: np.ndarray = rows_LS[layer]
        return row_S

    def near(self, layer: int, tokens_per_unit: float) -> Near:
        """The ties of one layer for the swap kernels.

        Args:
            layer: MoE layer.
            tokens_per_unit: what one unit of the problem's objective is in the kernel's objective, a sum over tokens.
        """
        experts, ranks = self.new_LER.shape[1:]
        if not self.bind:
            return no_ties(ranks)
        slots = max(self.rows_LS.shape[1], experts)
        new_SR = np.zeros((slots, ranks), np.uint8)
        new_SR[:experts] = self.new_LER[layer]
        bias_SR = np.zeros((slots, ranks))
        bias_SR[:experts] = self.new_LER[layer] * self.price_LE[layer][:, None] * tokens_per_unit
        return Near(bias_SR, new_SR, self.most_moves)

    def moves(self, slots_LS: np.ndarray, rank_of_slot: np.ndarray) -> np.ndarray:
        """(L,) moves of some layers' slots; `slots_LS` may have any number of slots."""
        layer, slot = np.nonzero(slots_LS >= 0)
        fetched = self.new_LER[layer, slots_LS[layer, slot], rank_of_slot[slot]]
        return np.bincount(layer, fetched, minlength=len(slots_LS)).astype(np.int64)


def ties_of(problem: Problem, *, wide: bool = False) -> Ties | None:
    """The problem's ties to its previous placement, None where there is none.

    Args:
        problem: the problem.
        wide: under a global replica budget, rows as wide as its layout, if the placement in force keeps to the budget.

    Raises:
        InfeasibleError: the change of cluster alone needs more moves than allowed.
    """
    previous = problem.previous
    if previous is None:
        return None
    held_LER = held_before(previous, problem.num_ranks)
    rows_LS = _start_rows(problem, held_LER, wide)
    limit = np.inf if problem.max_moves is None else float(problem.max_moves)
    ties = Ties(rows_LS, ~held_LER, problem.move_price * problem.expert_bytes.astype(np.float64), limit)
    needed_L = ties.moves(rows_LS, np.repeat(np.arange(problem.num_ranks), _slots_of_rank(problem, rows_LS)))
    if (needed_L > limit).any() and problem.replica_budget == "per-layer":
        layer = int(needed_L.argmax())
        raise InfeasibleError(
            f"MoE layer {layer} needs {needed_L[layer]} moves for this change of cluster, "
            f"but max moves is {problem.max_moves}"
        )
    return ties


def held_before(previous: Placement, num_ranks: int) -> np.ndarray:
    """(L, E, R) bool: whether a rank of the cluster held an expert; a rank that joined held nothing."""
    held_LER = np.zeros((*previous.copies_LER.shape[:2], num_ranks), bool)
    both = min(previous.num_ranks, num_ranks)
    held_LER[:, :, :both] = previous.copies_LER[:, :, :both] > 0
    return held_LER


def fewest_moves(held_ER: np.ndarray, slots_R: np.ndarray, load_E: np.ndarray) -> np.ndarray:
    """(S,) int32 slots of a layer: every expert once, on a rank that holds it wherever an assignment can; then, in
    slots that are left, further experts that the rank holds, heaviest first. Exact where replicas are not asked for.

    Args:
        held_ER: (E, R) bool, the experts of each rank.
        slots_R: (R,) slots of each rank.
        load_E: (E,) loads.
    """
    experts, ranks = held_ER.shape
    rank_I = np.repeat(np.arange(ranks), np.minimum(slots_R, experts))
    expert_J, item_J = linear_sum_assignment(held_ER[:, rank_I].astype(np.float64), maximize=True)
    chosen_ER = np.zeros((experts, ranks), bool)
    chosen_ER[expert_J, rank_I[item_J]] = True
    row_S = np.full(int(slots_R.sum()), EMPTY_SLOT, np.int32)
    for rank, (start, size) in enumerate(zip(slot_starts(slots_R), slots_R, strict=True)):
        others = np.flatnonzero(held_ER[:, rank] & ~chosen_ER[:, rank])
        others = others[np.argsort(-load_E[others], kind="stable")]
        members = np.concatenate([np.flatnonzero(chosen_ER[:, rank]), others])[:size]
        row_S[start : start + len(members)] = np.sort(members)
    return row_S


def first_ranks(row_S: np.ndarray, rank_of_slot: np.ndarray, num_experts: int) -> np.ndarray:
    """(S,) int64 rank of each entry of a search without replicas: an expert's first slot, then every slot left over."""
    rank_S = np.full(len(row_S), -1, np.int64)
    left = np.ones(len(row_S), bool)
    for expert in range(num_experts):
        slot = int(np.flatnonzero(row_S == expert)[0])
        rank_S[expert], left[slot] = rank_of_slot[slot], False
    rank_S[num_experts:] = rank_of_slot[left]
    return rank_S


def _start_rows(problem: Problem, held_LER: np.ndarray, wide: bool) -> np.ndarray:
    slots_R = problem.cluster.slots_of_rank
    if wide and problem.replica_budget == "global" and _within_budget(problem, held_LER):
        slots_R = problem.layout.slots_of_rank
    rows = []
    for layer, count in enumerate(problem.experts_per_layer):
        rows.append(fewest_moves(held_LER[layer, :count], slots_R, problem.load_LE[layer, :count]))
    return np.stack(rows)


def _within_budget(problem: Problem, held_LER: np.ndarray) -> bool:
    """Whether the placement in force keeps to the replica budget of the whole model."""
    on_rank_LR = held_LER.sum(axis=1)
    fits = (on_rank_LR <= problem.layout.slots_of_rank).all()
    return bool(fits and (on_rank_LR.sum(axis=0) <= problem.num_layers * problem.cluster.slots_of_rank).all())


def _slots_of_rank(problem: Problem, rows_LS: np.ndarray) -> np.ndarray:
    wide = rows_LS.shape[1] == problem.layout.num_slots
    return problem.layout.slots_of_rank if wide else problem.cluster.slots_of_rank
