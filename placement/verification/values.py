"""The values of a placement by its statement: traffic, imbalance and seconds, from tokens; imbalance alone from loads.

Shape letters: L MoE layers, E experts, R ranks, S slots.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.placement.verification.counting import count
from moeplace.placement.verification.objective import imbalance, seconds, traffic
from moeplace.placement.verification.statement import Statement
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class Values:
    """Objectives by name, and the imbalance of each layer (L,)."""

    by_name: dict[str, float]
    imbalance_L: np.ndarray


def values_of(statement: Statement, tokens: RoutingTrace | np.ndarray, slots_LS: np.ndarray, slots_R: np.ndarray
              ) -> Values:  # fmt: skip
    """Compute them.

    Args:
        statement: the problem.
        tokens: a trace, or (L, E) loads.
        slots_LS: (L, S) a legal placement.
        slots_R: (R,) its slots per rank.
    """
    if isinstance(tokens, np.ndarray):
        imbalance_L = imbalance(statement, _even_load(tokens, slots_LS, slots_R))
        return Values({"imbalance": float(imbalance_L.mean())}, imbalance_L)
    counts = count(statement, tokens, slots_LS, slots_R)
    imbalance_L = imbalance(statement, counts.load_LR)
    by_name = {
        "traffic": traffic(statement, counts),
        "imbalance": float(imbalance_L.mean()),
        "seconds": seconds(statement, counts),
    }
    return Values(by_name, imbalance_L)


def _even_load(load_LE: np.ndarray, slots_LS: np.ndarray, slots_R: np.ndarray) -> np.ndarray:
    """(L, R) load of each rank when each expert's load is split evenly over its slots."""
    rank_S, rows = np.repeat(np.arange(len(slots_R)), slots_R), []
    for load_E, row_S in zip(load_LE, slots_LS, strict=True):
        filled = row_S >= 0
        part_E = load_E / np.maximum(np.bincount(row_S[filled], minlength=len(load_E)), 1)
        rows.append(np.bincount(rank_S[filled], part_E[row_S[filled]], minlength=len(slots_R)))
    return np.stack(rows)
