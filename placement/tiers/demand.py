"""Demand: which experts each step of a trace asks for, and what the answer costs by where they are.

Shape letters: L MoE layers, E experts per layer, R ranks, S steps, N pairs (step, expert) of a layer, by expert.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplace.placement.cost.calibration import ExpertTime
from moeplace.placement.cost.steps import cut_lanes
from moeplace.profiling.traces.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class LayerDemand:
    """One layer.

    Attributes:
        first_E: (E + 1,) int64, where the pairs of each expert begin.
        step_N: (N,) int64 step of each pair.
        tokens_N: (N,) int64 tokens of the step for the expert.
    """

    first_E: np.ndarray
    step_N: np.ndarray
    tokens_N: np.ndarray

    def seconds(self, expert: ExpertTime) -> np.ndarray:
        """(N,) seconds of each pair on a device of speed 1."""
        return expert.per_activated + expert.per_token * self.tokens_N


@dataclass(frozen=True, eq=False)
class Demand:
    """All layers.

    Attributes:
        layers: one each.
        steps: S.
    """

    layers: list[LayerDemand]
    steps: int

    @cached_property
    def activation_LE(self) -> np.ndarray:
        """(L, E) share of steps that ask for an expert."""
        return np.stack([np.diff(layer.first_E) for layer in self.layers]) / self.steps

    @property
    def active_experts(self) -> float:
        """Experts of a layer that a step asks for, on all ranks together, mean over steps and layers."""
        return float(self.activation_LE.sum(axis=1).mean())


def count_demand(trace: RoutingTrace, *, batch: int, most_steps: int | None = None) -> Demand:
    """The demand of a trace's steps, or of `most_steps` of them, evenly spread."""
    lanes = cut_lanes(trace.num_tokens, batch)
    step_S = np.arange(lanes.length)
    if most_steps is not None and most_steps < lanes.length:
        step_S = np.arange(most_steps) * lanes.length // most_steps
    token_SB = step_S[:, None] + np.arange(lanes.width) * lanes.length
    layers = []
    for layer in range(trace.num_layers):
        ids_SA = np.asarray(trace.layer(layer))[token_SB].reshape(len(step_S), -1).astype(np.int64)
        step, place = np.nonzero(ids_SA >= 0)
        pair, tokens = np.unique(ids_SA[step, place] * len(step_S) + step, return_counts=True)
        expert, step_N = np.divmod(pair, len(step_S))
        layers.append(LayerDemand(np.searchsorted(expert, np.arange(trace.num_experts + 1)), step_N, tokens))
    return Demand(layers, len(step_S))
