"""Balance over steps: plans for loads of several cautions, judged layer by layer on the steps that were recorded.

An engine waits in every step for its busiest rank, so what counts is the sum over steps of the busiest rank's load, and
not the busiest rank of the sum. An expert whose load varies is therefore planned with some of its standard deviation
on top; how much is decided by trying. The published load is one step: then there is one plan.

Shape letters: T steps, L MoE layers, E experts of a layer, R ranks, S slots per layer.
"""

from dataclasses import replace

import numpy as np

from moeplace.placement.policy.answer import Answer
from moeplace.placement.policy.request import Request
from moeplace.placement.rebalancing.plan import Plan, plan
from moeplace.profiling.kernel_cache import njit

CAUTIONS = (0.0, 0.5, 1.0)
"""Standard deviations on top of the mean load that are tried."""
TIE = 3e-4
"""Imbalances this near are equal: the plan that moves less is taken."""


def balance(request: Request) -> Answer:
    """The map that balances the recorded steps best, within the limits of the request.

    Raises:
        InputError, InfeasibleError: of `rebalancing.plan`.
    """
    load_TLE, planned_TLE = request.load_TLE, request.with_some_load().load_TLE
    cautions = CAUTIONS if len(load_TLE) > 1 else CAUTIONS[:1]
    mean_LE = planned_TLE.mean(axis=0)
    deviation_LE = planned_TLE.std(axis=0) if len(cautions) > 1 else np.zeros_like(mean_LE)
    share = replace(request, time_limit=request.time_limit / len(cautions))
    plans = [_plan(share, mean_LE + caution * deviation_LE) for caution in cautions]
    imbalance_PL = np.stack([imbalance_over_steps(load_TLE, each.slot_to_expert, request.ranks) for each in plans])
    moves_PL = np.stack([each.moves_L for each in plans])
    best_L = _best(imbalance_PL, moves_PL)
    rows = np.arange(len(best_L))
    return Answer(
        np.stack([each.slot_to_expert for each in plans])[best_L, rows],
        moves_PL[best_L, rows],
        np.where(load_TLE.any(axis=(0, 2)), plans[0].bound_L, 1.0),  # the least for the sum of steps is one for steps
        imbalance_PL[best_L, rows],
        np.stack([each.across_L for each in plans])[best_L, rows],
    )


def _plan(request: Request, load_LE: np.ndarray) -> Plan:
    return plan(
        load_LE,
        ranks=request.ranks,
        slots_per_rank=request.slots_per_rank,
        nodes=request.nodes,
        groups=request.groups,
        previous=request.previous,
        max_moves=request.max_moves,
        max_moves_per_rank=request.max_moves_per_rank,
        max_moves_across_nodes=request.max_moves_across_nodes,
        move_price=request.move_price,
        time_limit=request.time_limit,
    )


def _best(imbalance_PL: np.ndarray, moves_PL: np.ndarray) -> np.ndarray:
    """(L,) index of the plan with the least imbalance; of those that tie the one that moves least, then the first."""
    ties_PL = imbalance_PL <= imbalance_PL.min(axis=0) * (1.0 + TIE)
    return np.where(ties_PL, moves_PL, np.iinfo(np.int64).max).argmin(axis=0)


def imbalance_over_steps(load_TLE: np.ndarray, slots_LS: np.ndarray, ranks: int) -> np.ndarray:
    """(L,) sum over steps of the busiest rank's load over the sum of mean loads; 1 without load."""
    busiest_L = _busiest(load_TLE, slots_LS.astype(np.int64), ranks)
    mean_L = load_TLE.sum(axis=(0, 2)) / ranks
    return np.divide(busiest_L, mean_L, out=np.ones(len(mean_L)), where=mean_L > 0)


@njit(cache=True, nogil=True)
def _busiest(load_TLE, slots_LS, ranks):  # type: ignore[no-untyped-def]
    """(L,) sum over steps of the busiest rank's load, an expert's load split evenly over its slots."""
    steps, layers, experts = load_TLE.shape
    per_rank = slots_LS.shape[1] // ranks
    busiest_L, count_E = np.zeros(layers), np.zeros(experts, np.int64)
    for layer in range(layers):
        count_E[:] = 0
        for expert in slots_LS[layer]:
            if expert >= 0:
                count_E[expert] += 1
        for t in range(steps):
            most = 0.0
            for r in range(ranks):
                time = 0.0
                for s in range(r * per_rank, (r + 1) * per_rank):
                    expert = slots_LS[layer, s]
                    if expert >= 0:
                        time += load_TLE[t, layer, expert] / count_E[expert]
                most = max(most, time)
            busiest_L[layer] += most
    return busiest_L
