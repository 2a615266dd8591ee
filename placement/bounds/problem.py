"""Proven lower bounds on what any placement of a problem can cost, printed with every result.

Each bound holds for the tokens (or loads) of the problem and for all placements that respect its slots and its load
cap; limits on moves, which only forbid more, are ignored. A held-out figure may cross a bound, it is another trace.

* imbalance: mean over layers of `least_imbalance` (closed forms of `load`).
* traffic: `copies`, from d and dn per layer and stayed tokens per boundary (`layers`): the better of the closed forms
  of `traffic` and, while the time lasts, the semidefinite relaxation of `relaxation`.
* seconds: `seconds`, every term of the cost model at its own bound.

Shape letters: L MoE layers.
"""

from typing import NamedTuple

import numpy as np

from moeplace.placement.bounds.certificate import Proof
from moeplace.placement.bounds.copies import least_traffic
from moeplace.placement.bounds.layers import layer_bounds
from moeplace.placement.bounds.load import least_imbalance
from moeplace.placement.bounds.seconds import least_seconds
from moeplace.placement.problem import Problem
from moeplace.placement.search.packing import packed_imbalance


class Proven(NamedTuple):
    """Lower bounds by name, and the proofs that closed forms do not give."""

    bounds: dict[str, float]
    proofs: list[Proof]


def problem_bounds(problem: Problem, *, time_limit: float, caps_L: np.ndarray | None = None) -> dict[str, float]:
    """The bounds of `prove` alone."""
    return prove(problem, time_limit=time_limit, caps_L=caps_L).bounds


def prove(problem: Problem, *, time_limit: float, caps_L: np.ndarray | None = None) -> Proven:
    """Lower bounds on "imbalance" and, where tokens are known, on "traffic" and "seconds".

    Traffic is `objective.traffic`: of serving ranks and nodes per token in `dispatch-combine`, of copies per token in
    `coherent` mode, both at the prices of links; 0 in `allgather`.

    Args:
        problem: the problem.
        time_limit: seconds; the amount of work follows from it, the clock only cuts in.
        caps_L: (L,) imbalance that each layer is held to, at least as large as what any accepted placement has; by
            default the larger of `max_imbalance` and what packing reaches.
    """
    layers = range(problem.num_layers)
    bounds = {"imbalance": float(np.mean([least_imbalance(problem, layer) for layer in layers]))}
    trace = problem.trace
    if trace is None:
        return Proven(bounds, [])
    held_L = held_imbalance(problem) if caps_L is None else caps_L
    by_layer = layer_bounds(problem, trace, time_limit=time_limit, caps_L=held_L)
    bounds["traffic"] = least_traffic(problem, trace, by_layer)
    bounds["seconds"] = least_seconds(problem, trace, by_layer)
    return Proven(bounds, by_layer.proofs)


def held_imbalance(problem: Problem) -> np.ndarray | None:
    """(L,) imbalance each layer is held to: the larger of the cap and what packing reaches; None without a cap."""
    if problem.max_imbalance is None:
        return None
    return np.array([max(problem.max_imbalance, packed_imbalance(problem, x)) for x in range(problem.num_layers)])
