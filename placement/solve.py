"""solve(): validate, search, confirm by `evaluate`, bound."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from moeplace.placement.bounds.certificate import certificate
from moeplace.placement.bounds.problem import held_imbalance, prove
from moeplace.placement.budget import Budget, Spread
from moeplace.placement.objective import load_imbalance, measure, measured
from moeplace.placement.placement import Placement
from moeplace.placement.problem import CAP_ROUNDING, Problem
from moeplace.placement.result import Draft, SolveResult, Status
from moeplace.placement.solvers import Solver, get_solver
from moeplace.placement.solvers.previous import keep_close, moved_summary
from moeplace.placement.solvers.replicas.drawn import applies as is_drawn
from moeplace.placement.solvers.replicas.drawn import keep_drawn_caps
from moeplace.placement.solvers.replicas.running import keep_caps_by_rule
from moeplace.placement.solvers.spare import count_empty_again
from moeplace.placement.statement import state
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.profiling.kernel_cache import compile_once

OPTIMAL_GAP = 1e-9
PUBLISHED = frozenset({"index-order", "round-robin", "eplb", "exflow-ilp", "moetuner-ilp"})
"""Solvers that are compared as they were published: they know no cap, and their placements are not mended."""
_BOUND_SHARE = 0.2
_ROUNDING = 1e-7


class BoundError(MoeplaceError):
    """A bound above its objective: an internal error, never a proof."""


def solve(
    problem: Problem,
    *,
    solver: str = "auto",
    time_limit: float = 10.0,
    seed: int = 0,
    report: Callable[[float], None] = lambda share: None,
    spread: Spread | None = None,
) -> SolveResult:
    """Find a placement and prove how good it is.

    Args:
        problem: what to solve; its trace (or loads) is what the placement is fitted to.
        solver: a name of `moeplace.placement.solvers.SOLVERS`.
        time_limit: seconds for search and bound together.
        seed: of all random draws.
        report: called with the share of the work done (0..1).
        spread: searches layers elsewhere that do not depend on each other (dispatch-combine, or several experts per
            token). Their work is what it would be here: the placement is the same, sooner.

    Raises:
        InputError: the solver is unknown, or the time limit not positive.
        BoundError: a bound exceeds the objective, which is an internal error.
    """
    if not time_limit > 0:
        raise InputError(f"time limit ({time_limit} s) must be positive")
    search = get_solver(solver)
    compile_once()
    started = time.monotonic()
    budget = Budget(time_limit * (1 - _BOUND_SHARE), seed, started, report, spread)
    asked, caps_L = problem, held_imbalance(problem)
    problem, draft = _drafted(problem, search, budget, caps_L, time_limit, mend=solver not in PUBLISHED)
    placement = problem.placement(draft.slot_to_expert)
    name, objective, values, imbalance_L = _measured(problem, placement)
    broken = broken_cap(imbalance_L, caps_L) or broken_survival(problem, placement)
    bounded = problem.replace(max_imbalance=None) if broken else problem
    left = max(time_limit - budget.elapsed, 0.05 * time_limit)
    bounds, proofs = prove(bounded, time_limit=left, caps_L=None if broken else caps_L)
    claim = _claim(draft, objective, bounds.get(name, 0.0), keeps_all=not broken)
    _check_bounds(name, objective, claim.lower_bound, values, bounds)
    return SolveResult(
        placement=placement,
        solver=solver,
        seed=seed,
        objective_name=name,
        objective=objective,
        lower_bound=objective if claim.is_proven else claim.lower_bound,
        gap=0.0 if claim.is_proven else claim.gap,
        status=claim.status,
        seconds=time.monotonic() - started,
        bounds={key: value for key, value in bounds.items() if key in values},
        values=values,
        history=draft.history,
        moved=moved_summary(problem, placement),
        notes=draft.notes + ((broken,) if broken else ()),
        statement=state(asked, objective=name, caps_L=None if broken else caps_L),
        certificate=certificate(proofs, by_search=claim.by_search),
    )


class _Claim(NamedTuple):
    """How good a placement may be said to be."""

    lower_bound: float
    gap: float
    status: Status
    by_search: bool
    """Whether it was the search that proved it, and not a bound."""

    @property
    def is_proven(self) -> bool:
        return self.status == "optimal"


def _claim(draft: Draft, objective: float, bound: float, *, keeps_all: bool) -> _Claim:
    """What search and bound prove together; a search proves nothing of a placement that breaks a constraint."""
    lower = max(draft.lower_bound or 0.0, bound) if keeps_all else bound
    gap = (objective - lower) / objective if objective > 0 else 0.0
    proven = keeps_all and (draft.status == "optimal" or gap <= OPTIMAL_GAP)
    status: Status = "optimal" if proven else "feasible" if draft.status == "optimal" else draft.status
    return _Claim(lower, gap, status, lower > bound or (proven and gap > OPTIMAL_GAP))


def _drafted(
    asked: Problem, search: Solver, budget: Budget, caps_L: np.ndarray | None, time_limit: float, *, mend: bool
) -> tuple[Problem, Draft]:
    """(the problem of the draft's own slots, what the solver found: near the previous placement and within caps)."""
    problem, draft = asked, search(asked, budget)
    if asked.previous is not None:
        draft = keep_close(asked, draft, caps_L, time_limit)
    if asked.replica_budget == "global":
        problem, draft = with_layout(asked, draft)
    if caps_L is not None and mend:
        with budget.alarm(1.05 * time_limit + 0.5 - budget.elapsed) as stop:
            draft = within_caps(asked, draft, caps_L, budget.rng(0), stop)
    return problem, draft


def within_caps(
    problem: Problem, draft: Draft, caps_L: np.ndarray, rng: np.random.Generator, stop: np.ndarray
) -> Draft:
    """The draft with layers mended whose replicas break a cap by the problem's rule; not where moves are counted."""
    if problem.trace is None or problem.max_moves is not None or problem.move_price > 0:
        return draft
    if is_drawn(problem):
        if draft.slot_to_expert.shape[1] != problem.cluster.num_slots:  # shared out over layers
            return draft
        slots_LS = keep_drawn_caps(problem, draft.slot_to_expert, caps_L, stop)
    else:
        slots_LS = keep_caps_by_rule(problem, draft.slot_to_expert, caps_L, rng, stop)
    return replace(draft, slot_to_expert=slots_LS, notes=count_empty_again(draft.notes, slots_LS))


def with_layout(problem: Problem, draft: Draft) -> tuple[Problem, Draft]:
    """The problem of filling the draft's own slots, with a note if its solver does not share replicas out."""
    if draft.slot_to_expert.shape[1] == problem.layout.num_slots:
        return problem.replace(cluster=problem.layout, replica_budget="per-layer"), draft
    note = "replicas were shared out per layer: only auto shares them over layers, in dispatch-combine mode"
    return problem.replace(replica_budget="per-layer"), replace(draft, notes=(*draft.notes, note))


def _measured(problem: Problem, placement: Placement) -> tuple[str, float, dict[str, float], np.ndarray]:
    """`measure`, and the imbalance of each layer, from one replay."""
    if problem.trace is None:
        return (*measure(problem, placement), load_imbalance(problem, placement))
    evaluation = problem.evaluate(placement)
    return (*measured(problem, evaluation), evaluation.imbalance_L)


def _check_bounds(
    name: str, objective: float, lower: float, values: dict[str, float], bounds: dict[str, float]
) -> None:
    """A bound above what was measured proves a fault in this program, not a placement.

    Raises:
        BoundError: a bound exceeds the value that it bounds.
    """
    pairs = [(name, objective, lower), *((key, value, bounds.get(key, 0.0)) for key, value in values.items())]
    for what, value, bound in pairs:
        if bound > value * (1 + _ROUNDING) + _ROUNDING * lower:
            raise BoundError(
                f"internal error: the proven bound on {what} ({bound:.9g}) exceeds its value ({value:.9g}); "
                "please report this problem"
            )


def broken_cap(imbalance_L: np.ndarray, caps_L: np.ndarray | None) -> str:
    """A sentence if a layer exceeds the cap on imbalance (some published models have none), else ""."""
    if caps_L is None:
        return ""
    over_L = imbalance_L - caps_L
    if (over_L <= CAP_ROUNDING).all():
        return ""
    layer = int(over_L.argmax())
    return (
        f"the cap on imbalance is not kept: MoE layer {layer} has {imbalance_L[layer]:.4f}, allowed are "
        f"{caps_L[layer]:.4f}; the bounds are those without a cap"
    )


def broken_survival(problem: Problem, placement: Placement) -> str:
    """A sentence if some expert would be lost with `survive` ranks (published models know no such thing), else ""."""
    if not problem.survive:
        return ""
    ranks_LE = placement.replica_counts
    on_node = [placement.copies_LER[:, :, placement.node_of_rank == n].any(axis=2) for n in range(placement.num_nodes)]
    nodes_LE = np.sum(on_node, axis=0)
    for held_LE, wanted, what in (
        (ranks_LE, problem.survive + 1, "ranks"),
        (nodes_LE, min(problem.survive + 1, placement.num_nodes), "nodes"),
    ):
        too_few = (ranks_LE > 0) & (held_LE < wanted)
        if too_few.any():
            layer, expert = np.argwhere(too_few)[0]
            return (
                f"not every expert survives {problem.survive} lost ranks: expert {expert} of MoE layer {layer} is on "
                f"{held_LE[layer, expert]} of {wanted} {what}; the bounds are those without a cap"
            )
    return ""
