"""What no cache and no residency can beat.

**Hits**: Belady's rule on each rank and layer by itself. A rank asks each layer for a set of experts per step. Rows of
a layer that hold what was used before, and one row through which others pass, find no more of them than a cache with
one row more that evicts what is used farthest in the future (Belady 1966) and gets its first contents for nothing.
Experts fetched ahead for the very step are beyond it.

**Seconds**, where residents stay, others are loaded when asked for, and hosts compute none: in a step the busiest link
carries at least the mean, so a layer takes at least fixed + (backed experts asked for) x load / R; and likewise fixed +
computing / R. Which experts are resident is left open but for their number over all ranks and layers: at best those
that most steps ask for. A replica changes nothing in this: an expert with no resident slot is loaded by some rank, and
two ranks that share its tokens compute it twice.

Shape letters: L MoE layers, R ranks, E experts per layer, A experts asked for in a step.
"""

import numpy as np

from moeplace.placement.cost.calibration import ExpertTime
from moeplace.placement.tiers.demand import Demand
from moeplace.placement.tiers.rows import FastRows
from moeplace.placement.tiers.walk import Routing, Steps
from moeplace.profiling.scores.kernels import belady_hits


def belady_hit_rate(routing: Routing, steps: Steps, rows: FastRows) -> float:
    """Bound on the share of activated experts (per rank and step) that were in fast memory when asked for."""
    layers, ranks, experts = rows.first_LRE.shape
    size_LR = rows.free_LR + rows.pinned_LRE.sum(axis=2)
    starts, hits, asked = np.zeros(1, np.int64), 0, 0
    for layer in range(layers):
        wanted_RSE = asked_experts(routing, steps, layer, ranks, experts)
        for rank, wanted_SE in enumerate(wanted_RSE):
            sets_SA = _as_rows(wanted_SE)
            size = int(size_LR[layer, rank]) + 1
            by_size = belady_hits(sets_SA, starts, experts, size)[0]
            hits += int(by_size[:size].sum())
            asked += int(by_size[size])
    return hits / max(asked, 1)


def asked_experts(routing: Routing, steps: Steps, layer: int, ranks: int, experts: int) -> np.ndarray:
    """(R, S, E) bool: which experts of a layer each rank computes in each walked step."""
    token_SB = np.arange(steps.walked)[:, None] + np.arange(steps.width) * steps.length
    ids, rank = routing.ids_LTK[layer][token_SB], routing.rank_LTK[layer][token_SB]
    step, lane, k = np.nonzero(ids >= 0)
    wanted_RSE = np.zeros((ranks, steps.walked, experts), np.bool_)
    wanted_RSE[rank[step, lane, k], step, ids[step, lane, k]] = True
    return wanted_RSE


def _as_rows(wanted_SE: np.ndarray) -> np.ndarray:
    """(S, A) int32 the experts of each step, -1 = no more."""
    steps = len(wanted_SE)
    width = max(int(wanted_SE.sum(axis=1).max(initial=0)), 1)
    rows_SA = np.full((steps, width), -1, np.int32)
    step, expert = np.nonzero(wanted_SE)
    place = np.arange(len(step)) - np.searchsorted(step, step)
    rows_SA[step, place] = expert
    return rows_SA


def pinned_seconds_bound(
    demand: Demand, *, room: int, load_seconds: float, expert: ExpertTime, speed_R: np.ndarray
) -> float:
    """Least mean seconds of all layers' experts together, of the steps of `demand`; see the module.

    Args:
        demand: every step that is to be served.
        room: experts that all ranks together keep resident, over all layers.
        load_seconds: of one expert.
        expert: what computing costs.
        speed_R: (R,) relative speeds.
    """
    asked = np.sort(demand.activation_LE.reshape(-1))[::-1]
    loading = asked[room:].sum() * load_seconds / len(speed_R)
    computing = sum(layer.seconds(expert).sum() for layer in demand.layers) / demand.steps / speed_R.sum()
    return float(len(demand.layers) * expert.fixed + max(loading, computing))
