"""Load caps kept under the rule `balanced`, whose loads are near those of `moeplace`'s rule, mostly closer together.

Searches follow `moeplace`'s rule. Where `balanced` leaves a layer above its cap all the same, the layer is mended under
a cap that is lower by what it exceeds, until it holds; at last also from packing, which keeps nearly any cap and gives
up what the layer has saved.

Shape letters: L MoE layers, S slots per layer.
"""

import numpy as np

from moeplace.placement.cost.replica_rule import BALANCED
from moeplace.placement.problem import CAP_ROUNDING, Problem
from moeplace.placement.solvers.replicas.repair import keep_caps

ROUNDS = 4
"""Most attempts."""
_FURTHER = 1.25
"""Of what a layer exceeds, how much lower the next attempt aims: moves change both rules' loads about alike."""
_LEAST = 0.001


def keep_caps_by_rule(
    problem: Problem, slots_LS: np.ndarray, caps_L: np.ndarray, rng: np.random.Generator, stop: np.ndarray
) -> np.ndarray:
    """`keep_caps` under the rule of `moeplace`, or under `balanced` where that is the problem's; arguments as there."""
    if problem.replica_rule is not BALANCED:
        return keep_caps(problem, slots_LS, caps_L, rng, stop)
    kept_LS, tried_LS, aim_L = slots_LS, slots_LS, caps_L
    least_L = np.full(problem.num_layers, np.inf)
    for attempt in range(ROUNDS):
        excess_L = problem.evaluate(problem.placement(tried_LS)).imbalance_L - caps_L
        better_L = excess_L < least_L
        kept_LS = np.where(better_L[:, None], tried_LS, kept_LS)
        least_L = np.where(better_L, excess_L, least_L)
        over_L = least_L > CAP_ROUNDING
        if not over_L.any() or stop[0]:
            break
        aim_L = np.where(over_L, np.maximum(aim_L - _FURTHER * np.maximum(excess_L, _LEAST), 1.0), np.inf)
        tried_LS = keep_caps(problem, kept_LS, aim_L, rng, stop, packs=attempt == ROUNDS - 2)
    return kept_LS
