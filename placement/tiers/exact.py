"""Small instances exactly: ranks and residency of all layers in one CP-SAT model.

    x[l,e,r]    expert e of layer l is on rank r
    y[l,e,r]    it is there, and resident
    t[l,s]      time of step s in layer l

    minimise    sum of t
    subject to  sum_r x[l,e,r] = 1,  sum_e x[l,e,r] <= slots of r,  y <= x,  sum_{l,e} y[l,e,r] <= rows of r
                t[l,s] >= sum_e c[l,s,e] x[l,e,r]                                     computing on every rank
                t[l,s] >= sum_f a[l,s,f] load (x - y)[l,f,r] + last (x - y)[l,e,r]    loading, for each e asked for

the seconds that `seating` searches by, c[l,s,e] being those of computing (0 where step s does not ask for e) and a = 1
where it asks. Times are whole numbers of `unit` seconds.

Shape letters: L MoE layers, E experts per layer, R ranks, S steps.
"""

from typing import Any

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import ExpertTime
from moeplace.placement.memory import HOST, RESIDENT, Memory
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.placement.solvers.exact.optimizers import cp_model
from moeplace.placement.tiers.demand import Demand, LayerDemand

UNIT = 1e-8
"""Seconds that the model counts in: a thousandth of what computing an expert takes."""


def solve_exactly(
    demand: Demand,
    like: Placement,
    *,
    cluster: Cluster,
    expert: ExpertTime,
    expert_bytes: float,
    time_limit: float,
    unit: float = UNIT,
    seed: int = 0,
) -> tuple[Placement, float, bool]:
    """The best placement of experts with one slot each; its seconds beside the fixed part; whether it is proven.

    Args:
        demand: the steps.
        like: a placement of the same shape; its experts are placed anew.
        cluster: with memory tiers.
        expert: what computing costs.
        expert_bytes: of one expert.
        time_limit: seconds.
        unit: seconds that times are rounded to.
        seed: of the solver.
    """
    memory = cluster.memory
    assert memory is not None
    model, terms = cp_model.CpModel(), _Terms(cluster, memory, expert, expert_bytes, unit)
    ranks, held, resident, total = range(cluster.num_ranks), [], [], []
    for layer, asked in enumerate(demand.layers):
        experts = range(int(like.experts_per_layer[layer]))
        x = [[model.new_bool_var(f"x{layer},{e},{r}") for r in ranks] for e in experts]
        y = [[model.new_bool_var(f"y{layer},{e},{r}") for r in ranks] for e in experts]
        for e in experts:
            model.add_exactly_one(x[e])
            for r in ranks:
                model.add_implication(y[e][r], x[e][r])
        for r in ranks:
            model.add(sum(x[e][r] for e in experts) <= int(cluster.slots_of_rank[r]))
        total += [_time_of_step(model, terms, _asked(asked, s), x, y) for s in range(demand.steps)]
        held.append(x)
        resident.append(y)
    for r in ranks:
        rows = memory.rows(r, layers=len(demand.layers), expert_bytes=expert_bytes) - memory.transit
        model.add(sum(y[e][r] for y in resident for e in range(len(y))) <= rows)
    model.minimize(sum(total))
    engine = cp_model.CpSolver()
    engine.parameters.max_time_in_seconds, engine.parameters.random_seed = time_limit, seed
    engine.parameters.num_workers = 1
    status = engine.solve(model)
    assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE), "every expert fits somewhere, backed"
    chosen = [[[engine.value(v) for v in row] for row in x] for x in held]
    kept = [[[engine.value(v) for v in row] for row in y] for y in resident]
    seconds = engine.objective_value * unit / demand.steps
    return _seated(like, chosen, kept), seconds, status == cp_model.OPTIMAL


class _Terms:
    """What things cost in whole units."""

    def __init__(self, cluster: Cluster, memory: Memory, expert: ExpertTime, size: float, unit: float) -> None:
        self.load = round(memory.load_seconds(HOST, size) / unit)
        self.last = round(expert.per_activated / unit)
        self._expert, self._speed_R, self._unit = expert, cluster.speed_of_rank, unit

    def computing(self, tokens: int, rank: int) -> int:
        seconds = self._expert.per_activated + self._expert.per_token * tokens
        return round(seconds / self._speed_R[rank] / self._unit)


def _asked(layer: LayerDemand, step: int) -> dict[int, int]:
    """Expert -> tokens of one step."""
    pairs = np.flatnonzero(layer.step_N == step)
    expert = np.searchsorted(layer.first_E, pairs, side="right") - 1
    return dict(zip(expert.tolist(), layer.tokens_N[pairs].tolist(), strict=True))


def _time_of_step(model: "cp_model.CpModel", terms: _Terms, asked: dict[int, int], x: list, y: list) -> Any:  # type: ignore[type-arg]
    """A variable that is at least what every rank takes."""
    most = sum(max(terms.computing(n, r) for r in range(len(x[0]))) + terms.load for n in asked.values()) + terms.last
    time = model.new_int_var(0, most, "")
    for r in range(len(x[0])):
        model.add(time >= sum(terms.computing(n, r) * x[e][r] for e, n in asked.items()))
        loading = sum(terms.load * (x[e][r] - y[e][r]) for e in asked)
        for e in asked:
            model.add(time >= loading + terms.last * (x[e][r] - y[e][r]))
    return time


def _seated(like: Placement, held: list, resident: list) -> Placement:  # type: ignore[type-arg]
    """The placement in which ranks hold and keep what the model says."""
    slots = np.full(like.slot_to_expert.shape, EMPTY_SLOT, np.int32)
    tier = np.full(slots.shape, RESIDENT, np.int8)
    for layer, ranks_of in enumerate(held):
        for rank in range(like.num_ranks):
            experts = [e for e, on_rank in enumerate(ranks_of) if on_rank[rank]]
            first = like.slots_on(rank).start
            slots[layer, first : first + len(experts)] = experts
            tier[layer, first : first + len(experts)] = [
                RESIDENT if resident[layer][e][rank] else HOST for e in experts
            ]
    return like.replace(slot_to_expert=slots, tier=tier)
