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

import numpy as np

from moeplace.placement.cost.seconds import kv_exchange_seconds, seconds_outside_experts
from moeplace.placement.memory import HOST, RESIDENT
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.placement.tiers.bound import pinned_seconds_bound
from moeplace.placement.tiers.demand import Demand, count_demand
from moeplace.placement.tiers.evaluation import TierEvaluation, evaluate_tiers, mean_expert_bytes
from moeplace.placement.tiers.policy import Policy
from moeplace.placement.tiers.replicas import with_replicas, without_replicas
from moeplace.placement.tiers.residency import with_residency
from moeplace.placement.tiers.seating import Asked, Seats, gains, seat
from moeplace.placement.tiers.terms import TierTerms
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
    terms: TierTerms,
    *,
    seed: int = 0,
    report: Callable[[float], None] = lambda share: None,
) -> TierPlan:
    """Plan ranks and residency for `trace`.

    Args:
        trace: tokens to fit to.
        start: a placement of every expert; replicas are given up for the search, and come back where they pay.
        policy: what the plan is to be run with.
        terms: what it is walked under.
        seed: of the search.
        report: called with the share of the work done.

    Raises:
        InputError: as `evaluate_tiers` raises.
    """
    began = time.monotonic()
    memory, batch, size = terms.memory, terms.shape.batch, mean_expert_bytes(trace)
    demand = count_demand(trace, batch=batch, most_steps=_most_steps(trace, batch))

    def keep(placement: Placement, by: str) -> Placement:
        return with_residency(placement, trace, memory, by=by, batch=batch, expert_bytes=size)

    def judge(placement: Placement) -> TierEvaluation:
        return evaluate_tiers(trace, placement, policy, terms, with_bound=False)

    drafts = {by: keep(start, by) for by in ("load", "activation")}
    judged = {name: judge(draft) for name, draft in drafts.items()}
    bare, first = start, drafts["activation"]
    if start.has_replicas:
        bare = without_replicas(start, demand.activation_LE)
        first = keep(bare, "activation")
    search = _Search(first, demand, terms, size)
    for round_ in range(ROUNDS):
        search.seat_layers(seed + round_, heat=HEAT / 2**round_)
        search.trade_rows()
        report((round_ + 1) / (ROUNDS + 1))
    drafts["joint"] = search.placement(bare)
    judged["joint"] = judge(drafts["joint"])
    if (terms.mode or start.mode) != "coherent":  # whose choice among replicas follows tokens that move
        rows = [memory.rows(rank, layers=start.num_layers, expert_bytes=size) for rank in range(start.num_ranks)]
        _add_replicas(drafts, judged, judge, demand.activation_LE, np.array(rows) - memory.transit)
    best = min(judged, key=lambda name: judged[name].seconds)
    bound = None
    if policy.name == "pinned" and policy.predictor is None and memory.host.compute is None:
        bound = _lower_bound(trace, drafts[best], terms, size)
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


def _lower_bound(trace: RoutingTrace, placement: Placement, terms: TierTerms, size: float) -> float:
    """Bound on a step of any placement: no exchange of rows, what a layer costs beside them, and the experts."""
    (counted, prices), memory = terms.count(trace, placement), terms.memory
    silent = counted.without_traffic()
    outside = seconds_outside_experts(silent, prices.cluster, prices.shape, prices.calibration).sum()
    layers, ranks = placement.num_layers, placement.num_ranks
    room = sum(memory.rows(rank, layers=layers, expert_bytes=size) - memory.transit for rank in range(ranks))
    experts = pinned_seconds_bound(
        count_demand(trace, batch=terms.shape.batch),
        room=room,
        load_seconds=memory.load_seconds(HOST, size),
        expert=terms.expert,
        speed_R=terms.cluster.speed_of_rank,
    )
    return float(outside) + kv_exchange_seconds(silent, prices.cluster, prices.shape) + experts


class _Search:
    """The seats of all layers."""

    def __init__(self, start: Placement, demand: Demand, terms: TierTerms, expert_bytes: float) -> None:
        self.steps = demand.steps
        load_E = np.full(start.num_experts, terms.memory.load_seconds(HOST, expert_bytes))
        self.asked = [
            Asked(layer.first_E, layer.step_N, layer.seconds(terms.expert), load_E, terms.expert.per_activated)
            for layer in demand.layers
        ]
        tier = np.zeros(start.slot_to_expert.shape, np.int8) if start.tier is None else start.tier
        self.seats = [
            Seats(
                start.rank_of_slot,
                (row == RESIDENT) & (slots != EMPTY_SLOT),
                slots.astype(np.int64),
                1.0 / terms.cluster.speed_of_rank,
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
