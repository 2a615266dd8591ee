"""plan_tiers(): ranks and residency together, from a placement that knows no tiers.

1. Residency by activation on the placement that is given.
2. Layer by layer, experts change seats (`seating`): rank and residency at once.
3. On every rank, layers trade resident rows, while one gains more by a row than another loses.
4. 2 and 3 again.
5. Where there are spare slots, replicas of the most wanted experts take rows of the least wanted residents, as long as
   the walk of the fitted tokens gets shorter.
6. By that walk, the best of what was found and of simpler residencies.

Shape letters: L MoE layers, E experts per layer, R ranks, S slots per layer, X seats.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.evaluation import count
from moeplace.placement.cost.replica_rule import MOEPLACE, ReplicaRule
from moeplace.placement.cost.seconds import kv_exchange_seconds, seconds_outside_experts
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.memory import HOST, RESIDENT, Memory
from moeplace.placement.modes import Mode
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.placement.tiers.bound import pinned_seconds_bound
from moeplace.placement.tiers.demand import Demand, count_demand
from moeplace.placement.tiers.evaluation import TierEvaluation, evaluate_tiers, mean_expert_bytes
from moeplace.placement.tiers.policy import Policy
from moeplace.placement.tiers.replicas import with_replicas, without_replicas
from moeplace.placement.tiers.residency import with_residency
from moeplace.placement.tiers.seating import Asked, Seats, gains, seat
from moeplace.profiling.errors import InputError
from moeplace.profiling.parallel import thread_pool
from moeplace.profiling.traces.trace import RoutingTrace

MOST_PAIRS = 32_768
"""(step, expert) pairs of a layer that a search looks at: more steps are walked at the end, but change no seat."""
ROUNDS = 3
TRIES_PER_SEAT = 200
"""Swaps tried per seat and round: what half a minute of one core allows at 26 layers of 64 experts."""
HEAT = 0.05
"""Share of a layer's seconds that a swap may cost at the start."""


@dataclass(frozen=True, eq=False)
class TierPlan:
    """A placement with tiers, and what it is worth on the tokens it was fitted to.

    Attributes:
        placement: with tiers.
        policy: to run it with.
        found_by: "joint", "joint and N replicas", or the simpler residency that was better.
        evaluation: of it.
        lower_bound: proven seconds of a step for any placement that pins (see `bound`); None where hosts compute or
            experts are fetched ahead, which it does not cover.
        seconds: wall time.
    """

    placement: Placement
    policy: Policy
    found_by: str
    evaluation: TierEvaluation
    lower_bound: float | None
    seconds: float


def plan_tiers(
    trace: RoutingTrace,
    start: Placement,
    policy: Policy,
    *,
    cluster: Cluster,
    mode: Mode | None = None,
    shape: StepShape,
    calibration: Calibration | None = None,
    rule: ReplicaRule = MOEPLACE,
    seed: int = 0,
    deadline: float = float("inf"),
    report: Callable[[float], None] = lambda share: None,
) -> TierPlan:
    """Plan ranks and residency for `trace`.

    More arguments than the interface of a style allows, because they are those of `evaluate_tiers` and a search's.

    Args:
        trace: tokens to fit to.
        start: a placement of every expert; replicas are given up for the search, and come back where they pay.
        policy: what the plan is to be run with.
        cluster: with memory tiers.
        mode, shape, calibration, rule: as `evaluate_tiers` takes them.
        seed: of the search.
        deadline: moment of `time.monotonic` after which no further round begins.
        report: called with the share of the work done.

    Raises:
        InputError: the cluster has no memory tiers, or as `evaluate_tiers` raises.
    """
    began = time.monotonic()
    memory = cluster.memory
    if memory is None:
        raise InputError("the cluster has no memory tiers: its file needs the tables [fast] and [host]")
    size = mean_expert_bytes(trace)
    calibration = calibration or Calibration(cluster.intra, cluster.inter)
    demand = count_demand(trace, batch=shape.batch, most_steps=_most_steps(trace, shape.batch))
    drafts = {
        by: with_residency(start, trace, memory, by=by, batch=shape.batch, expert_bytes=size)
        for by in ("load", "activation")
    }
    terms: dict[str, Any] = {
        "cluster": cluster, "mode": mode, "shape": shape, "calibration": calibration, "rule": rule, "with_bound": False,
    }  # fmt: skip
    judged = {name: evaluate_tiers(trace, draft, policy, **terms) for name, draft in drafts.items()}
    asked_LE = demand.activation_LE
    bare = without_replicas(start, asked_LE) if start.has_replicas else start
    first = drafts["activation"]
    if start.has_replicas:
        first = with_residency(bare, trace, memory, by="activation", batch=shape.batch, expert_bytes=size)
    search = _Search(first, demand, cluster, memory, calibration, size)
    for round_ in range(ROUNDS):
        if time.monotonic() > deadline:
            break
        search.seat_layers(seed + round_, heat=HEAT / 2**round_)
        search.trade_rows()
        report((round_ + 1) / (ROUNDS + 1))
    drafts["joint"] = search.placement(bare)
    judge = lambda draft: evaluate_tiers(trace, draft, policy, **terms)  # noqa: E731
    judged["joint"] = judge(drafts["joint"])
    if (mode or start.mode) != "coherent":  # whose choice among replicas follows tokens that move
        rows = [memory.rows(rank, layers=start.num_layers, expert_bytes=size) for rank in range(start.num_ranks)]
        _add_replicas(drafts, judged, judge, asked_LE, np.array(rows) - memory.transit)
    best = min(judged, key=lambda name: judged[name].seconds)
    bound = None
    if policy.name == "pinned" and policy.predictor is None and memory.host.compute is None:
        bound = _lower_bound(trace, drafts[best], cluster, memory, mode, shape, calibration, rule, size)
    return TierPlan(drafts[best], policy, best, judged[best], bound, time.monotonic() - began)


def _add_replicas(
    drafts: dict[str, Placement],
    judged: dict[str, TierEvaluation],
    judge: Callable[[Placement], TierEvaluation],
    asked_LE: np.ndarray,
    room_R: np.ndarray,
) -> None:
    """More and more replicas, while a step gets shorter."""
    least, count = judged["joint"].seconds, 1
    while (more := with_replicas(drafts["joint"], asked_LE, room_R, count)) is not None:
        name = f"joint and {(more.replica_counts - 1).clip(0).sum()} replicas"
        drafts[name], judged[name] = more, judge(more)
        if judged[name].seconds >= least or count >= asked_LE.shape[1]:
            return
        least, count = judged[name].seconds, 2 * count


def _most_steps(trace: RoutingTrace, batch: int) -> int:
    """Steps that ask for about MOST_PAIRS experts of a layer, were every choice of a token another one."""
    return max(MOST_PAIRS // min(batch * trace.top_k, trace.num_experts), 1)


def _lower_bound(
    trace: RoutingTrace,
    placement: Placement,
    cluster: Cluster,
    memory: Memory,
    mode: Mode | None,
    shape: StepShape,
    calibration: Calibration,
    rule: ReplicaRule,
    size: float,
) -> float:
    """Bound on a step of any placement: no exchange of rows, what a layer costs beside them, and the experts."""
    counted, terms = count(
        trace, placement, mode=mode, cluster=cluster, shape=shape, calibration=calibration, rule=rule
    )
    silent = counted.without_traffic()
    outside = seconds_outside_experts(silent, terms.cluster, terms.shape, terms.calibration).sum()
    layers, ranks = placement.num_layers, placement.num_ranks
    room = sum(memory.rows(rank, layers=layers, expert_bytes=size) - memory.transit for rank in range(ranks))
    experts = pinned_seconds_bound(
        count_demand(trace, batch=shape.batch),
        room=room,
        load_seconds=memory.load_seconds(HOST, size),
        expert=calibration.expert,
        speed_R=cluster.speed_of_rank,
    )
    return float(outside) + kv_exchange_seconds(silent, terms.cluster, terms.shape) + experts


class _Search:
    """The seats of all layers."""

    def __init__(
        self,
        start: Placement,
        demand: Demand,
        cluster: Cluster,
        memory: Memory,
        calibration: Calibration,
        expert_bytes: float,
    ) -> None:
        self.steps = demand.steps
        load_E = np.full(start.num_experts, memory.load_seconds(HOST, expert_bytes))
        last = calibration.expert.per_activated
        self.asked = [
            Asked(layer.first_E, layer.step_N, layer.seconds(calibration.expert), load_E, last)
            for layer in demand.layers
        ]
        tier = np.zeros(start.slot_to_expert.shape, np.int8) if start.tier is None else start.tier
        self.seats = [
            Seats(
                start.rank_of_slot,
                (row == RESIDENT) & (slots != EMPTY_SLOT),
                slots.astype(np.int64),
                1.0 / cluster.speed_of_rank,
            )  # an empty seat has no row
            for row, slots in zip(tier, start.slot_to_expert, strict=True)
        ]

    def seat_layers(self, seed: int, *, heat: float) -> None:
        """Let the experts of every layer change seats."""

        def work(layer: int) -> None:
            asked, seats = self.asked[layer], self.seats[layer]
            tries = TRIES_PER_SEAT * len(seats.rank_X)
            rng = np.random.default_rng((seed, layer))
            now = seat(asked, seats, self.steps, 0, 0.0, rng)
            seat(asked, seats, self.steps, tries, heat * now, rng)

        with thread_pool() as pool:
            list(pool.map(work, range(len(self.seats))))

    def trade_rows(self) -> None:
        """On every rank, give resident rows to the layers that gain most by them."""
        gain_LX = [gains(asked, seats, self.steps) for asked, seats in zip(self.asked, self.seats, strict=True)]
        for rank in range(len(self.seats[0].pace_R)):
            for _ in range(sum(int((seats.rank_X == rank).sum()) for seats in self.seats)):
                taker, giver = self._best_trade(gain_LX, rank)
                if taker is None or giver is None or gain_LX[taker[0]][taker[1]] <= -gain_LX[giver[0]][giver[1]]:
                    break
                for layer, seat_x in (taker, giver):
                    self.seats[layer].resident_X[seat_x] ^= True
                for layer in {taker[0], giver[0]}:
                    gain_LX[layer] = gains(self.asked[layer], self.seats[layer], self.steps)

    def _best_trade(
        self, gain_LX: list[np.ndarray], rank: int
    ) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
        """(layer, seat) of the rank that gains most by a row, and that loses least by giving one up."""
        taker = giver = None
        most, least = 0.0, np.inf
        for layer, (gain_X, seats) in enumerate(zip(gain_LX, self.seats, strict=True)):
            mine = (seats.rank_X == rank) & (seats.expert_X >= 0)
            backed, kept = np.flatnonzero(mine & ~seats.resident_X), np.flatnonzero(mine & seats.resident_X)
            if len(backed) and gain_X[backed].max() > most:
                most = float(gain_X[backed].max())
                taker = (layer, int(backed[gain_X[backed].argmax()]))
            if len(kept) and -gain_X[kept].max() < least:
                least = float(-gain_X[kept].max())
                giver = (layer, int(kept[gain_X[kept].argmax()]))
        return taker, giver

    def placement(self, like: Placement) -> Placement:
        """The placement that the seats make."""
        slots = np.stack([seats.expert_X for seats in self.seats]).astype(np.int32)
        resident = np.stack([seats.resident_X for seats in self.seats])
        tier = np.where(resident | (slots == EMPTY_SLOT), RESIDENT, HOST).astype(np.int8)
        return like.replace(slot_to_expert=slots, tier=tier)
