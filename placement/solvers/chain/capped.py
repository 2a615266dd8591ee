"""One layer given its neighbours, exactly: an assignment problem with a load cap as side constraint.

    min  sum_e cost[e, r(e)]    s.t.  slots_r experts on rank r,  sum of loads on r <= limit_r

Without the cap it is a linear assignment. Prices lambda_r >= 0 on load give the Lagrangian bound

    L(lambda) = min assignment of cost + lambda load  -  sum lambda limit

driven up by subgradient steps; each assignment on the way is repaired by swaps into one that keeps the cap. What gap is
left is closed by CP-SAT where OR-tools is installed; the answer says whether it is proven.

Shape letters: R ranks, S slots (experts, then empty slots without load).
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

STEPS = 40
"""Subgradient steps: more of them move the bound by less than rounding on layers of 32 to 64 experts."""
REPAIRED = 4
"""Of so many assignments above the limits one is repaired: repairing takes longer than assigning."""
DETERMINISTIC_SECONDS = 0.1
"""CP-SAT's own measure of work, so that the same layer ends the same way on every machine."""
_LEAST = 1e-6


class Assigned(NamedTuple):
    """(S,) rank of each entry, its cost, the bound, and whether both meet."""

    rank_S: np.ndarray
    cost: float
    bound: float

    @property
    def proven(self) -> bool:
        return self.cost <= self.bound + _LEAST


def assign_capped(
    cost_SR: np.ndarray, load_S: np.ndarray, limit_R: np.ndarray, start_S: np.ndarray, *, close: bool = True
) -> Assigned:
    """The best assignment found, never worse than `start_S` if that keeps the limits; where nothing that keeps them is
    found, `start_S` itself with a bound of minus infinity.

    Args:
        cost_SR: cost of each entry on each rank, whole numbers if CP-SAT shall close the gap.
        load_S: load of each entry.
        limit_R: most load of each rank.
        start_S: present ranks; every rank keeps its number of entries.
        close: use CP-SAT for what is left.
    """
    columns, entries = np.sort(start_S), np.arange(len(start_S))
    mended_S = repaired(start_S, cost_SR, load_S, limit_R)
    best_S = start_S if mended_S is None else mended_S
    best = np.inf if mended_S is None else float(cost_SR[entries, best_S].sum())
    price_R, bound = np.zeros(len(limit_R)), -np.inf
    for step in range(STEPS):
        priced_SR = cost_SR + load_S[:, None] * price_R
        rows, slots = linear_sum_assignment(priced_SR[:, columns])
        rank_S = np.empty(len(start_S), np.int64)
        rank_S[rows] = columns[slots]
        dual = float(priced_SR[entries, rank_S].sum() - price_R @ limit_R)
        bound = max(bound, dual)
        over_R = np.bincount(rank_S, load_S, minlength=len(limit_R)) - limit_R
        keeps = bool((over_R <= 0).all())
        mended_S = rank_S if keeps else repaired(rank_S, cost_SR, load_S, limit_R) if step % REPAIRED == 0 else None
        if mended_S is not None and float(cost_SR[entries, mended_S].sum()) < best - _LEAST:
            best_S, best = mended_S, float(cost_SR[entries, mended_S].sum())
        over_R = np.where((over_R > 0) | (price_R > 0), over_R, 0.0)
        square = float(over_R @ over_R)
        if best <= _ceiling(bound, cost_SR) + _LEAST or square <= 0:
            break
        price_R = np.maximum(price_R + (1.5 * 0.93**step) * _distance(best, dual) / square * over_R, 0.0)
    if np.isinf(best):  # nothing keeps the limits so far: CP-SAT may know better
        best = float(cost_SR[entries, best_S].sum())
        return _closed(Assigned(best_S, best, -np.inf), cost_SR, load_S, limit_R) if close else Assigned(
            best_S, best, -np.inf)  # fmt: skip
    found = Assigned(best_S, best, min(best, _ceiling(bound, cost_SR)))
    return found if found.proven or not close else _closed(found, cost_SR, load_S, limit_R)


def _distance(best: float, dual: float) -> float:
    """From the bound to what is known, a guess where nothing is."""
    return max(best - dual, 1.0) if np.isfinite(best) else max(0.05 * abs(dual), 1.0)


def _ceiling(bound: float, cost_SR: np.ndarray) -> float:
    """A bound on whole numbers, rounded up."""
    whole = bool((cost_SR == np.rint(cost_SR)).all())
    return float(np.ceil(bound - 1e-6)) if whole and np.isfinite(bound) else bound


def repaired(rank_S: np.ndarray, cost_SR: np.ndarray, load_S: np.ndarray, limit_R: np.ndarray) -> np.ndarray | None:
    """The assignment after swaps that take load off ranks above their limits, cheapest per load; None if they fail."""
    rank_S, entries = rank_S.copy(), np.arange(len(rank_S))
    load_R = np.bincount(rank_S, load_S, minlength=len(limit_R))
    for _ in range(2 * len(rank_S)):
        over_R = np.maximum(load_R - limit_R, 0.0)
        if not over_R.any():
            return rank_S
        own_S = cost_SR[entries, rank_S]
        worse_SS = cost_SR[:, rank_S] + cost_SR[:, rank_S].T - own_S[:, None] - own_S
        amount_SS = load_S[:, None] - load_S
        left_SS = np.maximum(load_R[rank_S][:, None] - amount_SS - limit_R[rank_S][:, None], 0.0)
        right_SS = np.maximum(load_R[rank_S] + amount_SS - limit_R[rank_S], 0.0)
        relief_SS = over_R[rank_S][:, None] + over_R[rank_S] - left_SS - right_SS
        useful_SS = (relief_SS > 1e-9) & (rank_S[:, None] != rank_S)
        if not useful_SS.any():
            return None
        score_SS = np.where(useful_SS, (worse_SS + 1.0) / np.maximum(relief_SS, 1e-9), np.inf)
        a, b = np.unravel_index(int(score_SS.argmin()), score_SS.shape)
        load_R[rank_S[a]] -= amount_SS[a, b]
        load_R[rank_S[b]] += amount_SS[a, b]
        rank_S[a], rank_S[b] = rank_S[b], rank_S[a]
    return None


def _closed(found: Assigned, cost_SR: np.ndarray, load_S: np.ndarray, limit_R: np.ndarray) -> Assigned:
    """CP-SAT from what was found; the same again where it is not installed or finds nothing better."""
    if not (cost_SR == np.rint(cost_SR)).all() or not (load_S == np.rint(load_S)).all():
        return found
    try:
        from moeplace.placement.solvers.exact.optimizers import cp_model
    except ModuleNotFoundError:
        return found
    slots, ranks = cost_SR.shape
    model = cp_model.CpModel()
    x: list[list[Any]] = [[model.new_bool_var(f"x{e}_{r}") for r in range(ranks)] for e in range(slots)]
    size_R = np.bincount(found.rank_S, minlength=ranks)
    for e in range(slots):
        model.add_exactly_one(x[e])
        for r in range(ranks):
            model.add_hint(x[e][r], int(found.rank_S[e] == r))
    for r in range(ranks):
        model.add(sum(x[e][r] for e in range(slots)) == int(size_R[r]))
        model.add(sum(int(load_S[e]) * x[e][r] for e in range(slots)) <= int(np.floor(limit_R[r] + 1e-6)))
    price = sum(int(cost_SR[e, r]) * x[e][r] for e in range(slots) for r in range(ranks))
    if np.isfinite(found.bound):
        model.add(price >= int(np.ceil(found.bound - 1e-6)))
    model.minimize(price)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers, solver.parameters.random_seed = 1, 0
    solver.parameters.max_deterministic_time = DETERMINISTIC_SECONDS
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return found
    bound = max(found.bound, float(solver.best_objective_bound))
    if np.isfinite(found.bound) and solver.objective_value >= found.cost - _LEAST:
        return Assigned(found.rank_S, found.cost, min(bound, found.cost))
    rank_S = np.array([next(r for r in range(ranks) if solver.boolean_value(x[e][r])) for e in range(slots)])
    return Assigned(rank_S, float(cost_SR[np.arange(slots), rank_S].sum()), bound)
