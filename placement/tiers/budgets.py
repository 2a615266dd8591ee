"""What more fast memory is worth: hit rate and seconds of a step against the budget, under some policies.

At every budget the experts that most steps ask for are resident, as many as it holds beside its rows for transit.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moeplace.placement.cost.evaluation import require_same_cluster, require_same_model
from moeplace.placement.memory import Memory
from moeplace.placement.placement import Placement
from moeplace.placement.tiers.evaluation import TierEvaluation, evaluate_tiers, mean_expert_bytes
from moeplace.placement.tiers.policy import Policy
from moeplace.placement.tiers.residency import expert_figures, keep_highest
from moeplace.placement.tiers.terms import TierTerms
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True)
class BudgetPoint:
    """One budget under one policy.

    Attributes:
        budget: share of a rank's slots that its fast memory has rows for.
        fast_slots: rows per layer and rank, transit included, mean over ranks.
        policy: label.
        hit_rate: share of activated experts that are in fast memory when their layer begins.
        belady_hit_rate: what no cache without foresight exceeds; None = not worked out.
        seconds: of a step.
        times_active: rows per layer over the experts that a layer of a rank activates in a step, mean over both.
    """

    budget: float
    fast_slots: float
    policy: str
    hit_rate: float
    belady_hit_rate: float | None
    seconds: float
    times_active: float

    def summary(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def sweep_budgets(
    trace: RoutingTrace,
    placement: Placement,
    policies: Sequence[Policy],
    budgets: Sequence[float],
    terms: TierTerms,
    *,
    fit: RoutingTrace,
    steps: int | None = None,
    report: Callable[[float], None] = lambda share: None,
) -> list[BudgetPoint]:
    """Walk `trace` at every budget under every policy; ranks stay, residency is chosen anew.

    Args:
        trace: tokens to judge by.
        placement: where experts are; its tiers do not count.
        policies: to compare; the bound on hits is worked out with the first.
        budgets: shares of a rank's slots, above 0 and up to 1.
        terms: of every walk; the budget of their memory is replaced.
        fit: tokens that residency is chosen by.
        steps: as `evaluate_tiers` takes them.
        report: called with the share of the work done.

    Raises:
        InputError: a budget holds no more than the rows for transit, or as `evaluate_tiers` raises.
    """
    require_same_model(trace, placement)
    require_same_cluster(terms.cluster, placement)
    figure_LE, size = expert_figures(fit, by="activation", batch=terms.shape.batch, seed=0), mean_expert_bytes(trace)
    points = []
    for number, budget in enumerate(budgets):
        given = _with_budget(terms.memory, placement, budget)
        draft = keep_highest(placement, figure_LE, given, expert_bytes=size)
        for policy in policies:
            judged = evaluate_tiers(
                trace, draft, policy, terms.with_memory(given), steps=steps, with_bound=policy is policies[0]
            )
            points.append(_point(budget, given, judged))
        report((number + 1) / len(budgets))
    return points


def _with_budget(memory: Memory, placement: Placement, budget: float) -> Memory:
    """The same tiers, with rows for a share of every rank's slots, at least one a layer."""
    rows_R = np.maximum(np.round(budget * placement.slots_of_rank), 1).astype(np.int64)
    if rows_R.min() * placement.num_layers <= memory.transit:
        raise InputError(
            f"a budget of {budget:.3g} of all experts gives a rank {rows_R.min() * placement.num_layers} rows, which "
            f"must be more than its {memory.transit} for transit"
        )
    return Memory(memory.host, fast_slots=rows_R, disk=memory.disk, transit=memory.transit, pieces=memory.pieces)


def _point(budget: float, memory: Memory, judged: TierEvaluation) -> BudgetPoint:
    layers, ranks, _ = judged.uses_LRU.shape
    active = float(judged.uses_LRU.sum()) / (judged.steps * layers * ranks)
    assert memory.fast_slots is not None
    rows = float(memory.fast_slots.mean())
    return BudgetPoint(
        budget, rows, judged.policy, judged.hit_rate, judged.belady_hit_rate, judged.seconds, rows / max(active, 1e-12)
    )
