"""SolveResult: a placement, how good it is proven to be, and how it was found."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from moeplace.placement.placement import Placement

Status = Literal["optimal", "feasible", "time_limit", "infeasible"]


@dataclass(frozen=True, eq=False)
class Draft:
    """What a solver hands in; `solve` evaluates and bounds it.

    Attributes:
        slot_to_expert: (L, S) integers, -1 = empty slot.
        status: "optimal" only if proven for the problem's own objective, "time_limit" if stopped by the clock.
        lower_bound: a proven bound on the problem's objective, if the solver has one of its own.
        history: (seconds since the start, objective as the solver sees it) of every improvement.
        notes: what the user should know, one sentence each.
    """

    slot_to_expert: np.ndarray
    status: Status = "feasible"
    lower_bound: float | None = None
    history: tuple[tuple[float, float], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SolveResult:
    """Outcome of `solve`; every figure is on the tokens (or loads) that the problem was given.

    Attributes:
        placement: the best placement found.
        solver, seed: what found it.
        objective_name: "seconds", "traffic" or "imbalance".
        objective: its value, computed by `evaluate`, never by the solver.
        lower_bound: proven lower bound on the objective over all placements of the problem.
        gap: (objective - lower_bound) / objective, 0 when both are 0.
        status: "optimal", "feasible" (ended by itself), "time_limit" (best so far).
        seconds: wall time.
        bounds: proven lower bounds on "traffic" and "imbalance" separately.
        values: the placement's values of what `bounds` bounds.
        history: improvements over time.
        moved: None, or the comparison with the previous placement: `moves` (slots fetched per layer, mean),
            `bytes`, `least_bytes`.
        notes: remarks for the user.
        statement: the problem as plain data, see `placement.statement`.
        certificate: what proves the bounds beside closed forms, see `bounds.certificate`.
        promise: of imbalance on unseen sequences, see `studies.promise`; None where none was asked for.
    """

    placement: Placement
    solver: str
    seed: int
    objective_name: str
    objective: float
    lower_bound: float
    gap: float
    status: Status
    seconds: float
    bounds: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    history: tuple[tuple[float, float], ...] = ()
    moved: dict[str, float] | None = None
    notes: tuple[str, ...] = ()
    statement: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] = field(default_factory=dict)
    promise: dict[str, Any] | None = None

    def summary(self) -> dict[str, Any]:
        """The entry `solver` of a placement file."""
        names = ("seed", "seconds", "status", "objective_name", "objective", "lower_bound", "gap", "bounds", "values")
        document = {"name": self.solver, **{name: getattr(self, name) for name in names}}
        if self.moved is not None:
            document["moved"] = self.moved
        if self.promise is not None:
            document["promise"] = self.promise
        if self.notes:
            document["notes"] = list(self.notes)
        return document
