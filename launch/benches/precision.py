"""`moeplace bench precision`: experts in fewer bits, what they spoil, and whether the prediction orders plans rightly.

1. One exact pass over calibration text: the error of every expert in every precision.
2. For every budget a plan of least predicted error, and beside it every expert alike in the best precision that fits.
3. Other text through engines that read experts as each plan says: how far logits are from the exact ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeplace.placement.placement import Placement
from moeplace.placement.tiers.precision import (
    PrecisionCosts,
    PrecisionPlan,
    bytes_by_rank,
    plan_precision,
    save_precision,
)
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.experts.precision_meter import PrecisionMeter
from moeplace.runtime.experts.rounding import precisions_below, stored_bytes
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.precisions.rounded_checkpoint import RoundedCheckpoint


@dataclass(frozen=True)
class PrecisionOptions:
    """See `moeplace bench precision --help`."""

    model: Path
    calibration: tuple[tuple[int, ...], ...]
    others: tuple[tuple[int, ...], ...]
    budgets: tuple[float, ...]
    placement: Placement | None = None
    out: Path | None = None


def precision_bench(
    options: PrecisionOptions, *, report: Callable[[float], None] = lambda share: None
) -> dict[str, Any]:
    """Run it in this process.

    Raises:
        InputError: the experts are quantised already, a budget is too small, or the placement is for another model.
    """
    torch.set_num_threads(1)
    checkpoint = Checkpoint(options.model)
    if checkpoint.layout is not None:
        raise InputError(f"{options.model} has quantised experts: they are served as they are")
    engine = _engine(checkpoint, options)
    placement = engine.placement if options.placement is None else options.placement
    checkpoint.check_placement(placement)
    costs = measure_costs(engine, checkpoint, options.calibration)
    exact = _score(engine, options.others)
    whole_R = bytes_by_rank(costs, placement, np.zeros(costs.bytes_LEP.shape[:2], np.int64))
    plans = [plan_precision(costs, placement, np.floor(budget * whole_R)) for budget in options.budgets]
    if options.out is not None:
        save_precision(options.out, plans[0])
    runs = []
    for number, (budget, plan) in enumerate(zip(options.budgets, plans, strict=True)):
        for name, one in (("plan", plan), ("all alike", _all_alike(costs, placement, budget * whole_R))):
            if one is not None:
                runs.append({"budget": budget, "choice": name, **_judged(options, one, exact)})
        report((number + 1) / len(options.budgets))
    return {
        "conditions": {
            "benchmark": "precision", "model": str(options.model), "ranks": placement.num_ranks,
            "calibration_tokens": sum(map(len, options.calibration)), "judged_tokens": sum(map(len, options.others)),
            "exact_bytes": int(whole_R.sum()), "precisions": list(costs.names),
        },
        "runs": runs,
        "rank_correlation": rank_correlation(sorted({(r["predicted_error"], r["logit_error"]) for r in runs})),
    }  # fmt: skip


def measure_costs(engine: Engine, checkpoint: Checkpoint, sequences: Sequence[Sequence[int]]) -> PrecisionCosts:
    """Errors from one exact pass of an engine of one rank; bytes of the checkpoint's own number type."""
    runtime, names = engine.executor.runtime, precisions_below(checkpoint.expert(0, 0)["down"].dtype)
    meter = PrecisionMeter(runtime.experts, engine.placement.slot_to_expert, names)
    runtime.computation.observer = meter
    try:
        _score(engine, sequences)
    finally:
        runtime.computation.observer = None
    bytes_LEP = np.zeros(meter.spoiled_LEP.shape, np.int64)
    for layer in range(len(bytes_LEP)):
        parts = checkpoint.expert(layer, 0)
        bytes_LEP[layer] = [stored_bytes(parts, precision) for precision in names]
    return PrecisionCosts(names, bytes_LEP, meter.error_LEP, checkpoint.experts_per_layer)


def _engine(checkpoint: Checkpoint, options: PrecisionOptions) -> Engine:
    longest = max(map(len, (*options.calibration, *options.others)))
    limits = EngineLimits(max_sequences=4, max_length=longest + 2, max_prefill_tokens=4 * longest)
    return Engine(checkpoint, mode="allgather", dtype=torch.float32, limits=limits)


def _score(engine: Engine, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    return engine.score(sequences, prompt_lengths=[len(sequence) for sequence in sequences])


def _judged(options: PrecisionOptions, plan: PrecisionPlan, exact: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What a plan promises, and what it does to logits: root mean square over that of the exact ones, centred."""
    checkpoint = RoundedCheckpoint(options.model, *plan.chosen)
    ours = _score(_engine(checkpoint, options), options.others)
    pairs = [(_centred(a), _centred(b)) for a, b in zip(ours, exact, strict=True)]
    spoiled = sum(float((a - b).square().sum()) for a, b in pairs)
    square = sum(float(b.square().sum()) for _, b in pairs)
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in pairs]).double().mean()
    return {
        "bytes": int(plan.bytes_R.sum()), "experts": plan.counts(), "predicted_error": plan.error,
        "lower_bound": plan.lower_bound, "logit_error": (spoiled / square) ** 0.5, "same_token": float(same),
    }  # fmt: skip


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits.double() - logits.double().mean(-1, keepdim=True)


def _all_alike(costs: PrecisionCosts, placement: Placement, budget_R: np.ndarray) -> PrecisionPlan | None:
    """Every expert in the precision of most bytes that fits everywhere; None where that is the exact one or none."""
    for p in range(1, len(costs.names)):
        choice_LE = np.full(costs.bytes_LEP.shape[:2], p)
        bytes_R = bytes_by_rank(costs, placement, choice_LE)
        if (bytes_R <= budget_R).all():
            error = float(costs.error_LEP[:, :, p].sum())
            return PrecisionPlan(costs, choice_LE, bytes_R, error, 0.0)
    return None


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's: 1 = both order plans alike; None for fewer than two different plans."""
    if len({pair[0] for pair in pairs}) < 2 or len({pair[1] for pair in pairs}) < 2:
        return None
    ranks = []
    for figures in zip(*pairs, strict=True):
        below = [sum(other < one for other in figures) + (figures.count(one) - 1) / 2 for one in figures]
        ranks.append(np.array(below))
    return float(np.corrcoef(np.stack(ranks))[0, 1])
