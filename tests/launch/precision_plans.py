"""Files of precisions for the shipped model."""

from pathlib import Path

import numpy as np

from moeplace.placement.tiers.precision import PrecisionCosts, PrecisionPlan, save_precision
from moeplace.runtime.experts.rounding import PRECISIONS


def random_plan(
    path: Path, seed: int, *, layers: int = 6, experts: int = 16, unit: int = 1, choice: int | None = None
) -> PrecisionPlan:
    """Any precision for each expert of the shipped model, or one for all of another, as a file.

    They take 8, 4, 2 and 1 units of bytes."""
    draw = np.random.default_rng(seed)
    shape = (layers, experts, len(PRECISIONS))
    costs = PrecisionCosts(
        PRECISIONS, np.broadcast_to([8 * unit, 4 * unit, 2 * unit, unit], shape).astype(np.int64),
        draw.random(shape) * np.array([0, 1, 1, 1]), np.full(layers, experts),
    )  # fmt: skip
    choice_LE = draw.integers(0, len(PRECISIONS), shape[:2]) if choice is None else np.full(shape[:2], choice)
    error = costs.error_of(choice_LE)
    plan = PrecisionPlan(costs, choice_LE, np.array([7]), error, error / 2)
    save_precision(path, plan)
    return plan
