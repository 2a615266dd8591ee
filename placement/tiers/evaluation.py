"""evaluate_tiers(): what a placement costs where experts do not fit, by a walk of the trace under a policy.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k, R ranks, U ways in which an expert is found.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeplace.placement.cost.evaluation import Terms
from moeplace.placement.cost.replay import Replay
from moeplace.placement.cost.replica_rule import ChooseRanks, home_ranks
from moeplace.placement.cost.seconds import kv_exchange_seconds, predict_step, seconds_outside_experts
from moeplace.placement.cost.steps import cut_lanes
from moeplace.placement.memory import HOST, RESIDENT, Memory
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.placement.tiers.bound import belady_hit_rate
from moeplace.placement.tiers.fast import CACHED, PINNED, Fast, Link
from moeplace.placement.tiers.policy import SCORE_WEIGHT, Policy
from moeplace.placement.tiers.rows import FastRows, share_out
from moeplace.placement.tiers.terms import TierTerms
from moeplace.placement.tiers.walk import USES, Pace, Routing, Rule, Steps, Tally, walk
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace

MOST_ROUTED = 50_000_000
"""(token, layer, expert) of a walk; beyond, the first steps of every lane are walked."""


@dataclass(frozen=True, eq=False)
class TierEvaluation:
    """What a step costs, and why.

    Attributes:
        policy: label of the policy.
        mode: execution mode.
        batch: tokens of a step.
        steps: steps walked.
        seconds: of a step.
        resident_seconds: of a step with every expert in fast memory.
        hit_rate: share of activated experts (per rank and step) that were in fast memory when their layer began.
        shares: by way of being found (`USES`), of all activated experts; they add to 1.
        belady_hit_rate: bound on the share that any policy without foresight of the next layer can find (see `bound`).
        link_bytes: bytes over all links per step.
        link_busy: busiest link's share of time.
        uses_LRU: (L, R, U) int64 activated experts by layer, rank and way.
        loads_LR: (L, R) int64 loads begun over all steps, those in vain included.
        seconds_L: (L,) seconds of a step by layer.
        waited_LR: (L, R) seconds per step by which a rank took longer than with everything in fast memory.
    """

    policy: str
    mode: Mode
    batch: int
    steps: int
    seconds: float
    resident_seconds: float
    hit_rate: float
    shares: dict[str, float]
    belady_hit_rate: float | None
    link_bytes: float
    link_busy: float
    uses_LRU: np.ndarray = field(repr=False)
    loads_LR: np.ndarray = field(repr=False)
    seconds_L: np.ndarray = field(repr=False)
    waited_LR: np.ndarray = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """The scalar figures, ready for JSON."""
        names = ["policy", "mode", "batch", "steps", "seconds", "resident_seconds", "hit_rate", "shares"]
        names += ["belady_hit_rate", "link_bytes", "link_busy"]
        return {name: getattr(self, name) for name in names}


def evaluate_tiers(
    trace: RoutingTrace,
    placement: Placement,
    policy: Policy,
    terms: TierTerms,
    *,
    steps: int | None = None,
    seed: int = 0,
    with_bound: bool = True,
) -> TierEvaluation:
    """Walk `trace` under `placement` and `policy`.

    Args:
        trace: the tokens to judge by.
        placement: with tiers, or without: then every expert is backed by the host and caches start empty.
        policy: what stays, what is fetched ahead.
        terms: the cluster with its memory tiers, and what `evaluate` takes beside it.
        steps: most steps to walk, None = as many as MOST_ROUTED allows.
        seed: of the predictor's errors.
        with_bound: whether Belady's hit rate is worked out, which takes longer than the walk; else None.

    Raises:
        InputError: as `evaluate` raises; replicas in `coherent` mode, whose choice follows tokens that move, are not
            priced.
    """
    memory = terms.memory
    counted, prices = terms.count(trace, placement)
    if placement.has_replicas and counted.mode == "coherent":
        raise InputError(
            "memory tiers with replicas are not priced in mode coherent; dispatch-combine and allgather are"
        )
    size_LE = _sizes(trace, placement, terms)
    rows = share_out(placement, memory, policy, expert_bytes=_largest(placement, size_LE))
    walked = _walked(trace, prices.shape.batch, steps)
    routing = _route(trace, placement, terms.rule.on(placement, prices.shape.batch))
    fast, link = _start(rows), _link(placement, memory, size_LE)
    tally = _nothing_yet(*rows.free_LR.shape)
    pace = _pace(placement, memory, counted, prices, walked)
    walk(routing, walked, pace, _rule(policy, placement, seed), fast, link, tally)
    found_U = tally.uses_LRU.sum(axis=(0, 1))
    activated, seconds = max(int(found_U.sum()), 1), float(tally.seconds_L.sum())
    return TierEvaluation(
        policy=policy.label,
        mode=counted.mode,
        batch=walked.width,
        steps=walked.walked,
        seconds=seconds / walked.walked + kv_exchange_seconds(counted, prices.cluster, prices.shape),
        resident_seconds=predict_step(counted, prices.cluster, prices.shape, prices.calibration),
        hit_rate=float(found_U[:3].sum() / activated),
        shares={name: float(share) for name, share in zip(USES, found_U / activated, strict=True)},
        belady_hit_rate=belady_hit_rate(routing, walked, rows) if with_bound else None,
        link_bytes=float(link.bytes_R.sum() / walked.walked),
        link_busy=float(link.busy_R.max() / seconds) if seconds else 0.0,
        uses_LRU=tally.uses_LRU,
        loads_LR=link.loads_LR,
        seconds_L=tally.seconds_L / walked.walked,
        waited_LR=tally.waited_LR / walked.walked,
    )


def _sizes(trace: RoutingTrace, placement: Placement, terms: TierTerms) -> np.ndarray:
    """(L, E) float64 bytes of each expert.

    Raises:
        InputError: those of the terms are for other experts.
    """
    shape = (placement.num_layers, placement.num_experts)
    if terms.bytes_LE is None:
        return np.full(shape, mean_expert_bytes(trace))
    if terms.bytes_LE.shape != shape:
        raise InputError(
            f"bytes of experts are for {terms.bytes_LE.shape} layers and experts, the placement for {shape}"
        )
    return terms.bytes_LE.astype(np.float64)


def _largest(placement: Placement, size_LE: np.ndarray) -> np.ndarray:
    """(R,) bytes of the largest expert of each rank."""
    return np.where(placement.tier_LER >= 0, size_LE[:, :, None], 1.0).max(axis=(0, 1))


def mean_expert_bytes(trace: RoutingTrace) -> float:
    """Bytes of an expert, mean over those that exist; 1 where the trace does not say."""
    if trace.expert_bytes is None:
        return 1.0
    stated = np.asarray(trace.expert_bytes)
    return float(stated[stated > 0].mean()) if (stated > 0).any() else 1.0


def _walked(trace: RoutingTrace, batch: int, steps: int | None) -> Steps:
    lanes = cut_lanes(trace.num_tokens, batch)
    most = max(MOST_ROUTED // (lanes.width * trace.num_layers * trace.top_k), 1) if steps is None else steps
    return Steps(lanes.width, lanes.length, min(most, lanes.length))


def _route(trace: RoutingTrace, placement: Placement, choose: ChooseRanks) -> Routing:
    layers, tokens, top_k = trace.num_layers, trace.num_tokens, trace.top_k
    near_T = home_ranks(tokens, placement.num_ranks) if placement.has_replicas else np.full(tokens, -1, np.int32)
    ids_LTK, rank_LTK = np.empty((layers, tokens, top_k), np.int16), np.empty((layers, tokens, top_k), np.int16)
    rank_TK = np.empty((tokens, top_k), np.int32)
    for layer in range(layers):
        ids_LTK[layer] = trace.layer(layer)
        choose(layer, ids_LTK[layer], near_T, rank_TK)
        rank_LTK[layer] = rank_TK
    weights = trace.topk_weights
    weight_LTK = np.empty((layers, 0, top_k), np.float32)
    if weights is not None:
        weight_LTK = np.ascontiguousarray(np.asarray(weights, np.float32).transpose(1, 0, 2))
    return Routing(ids_LTK, rank_LTK, weight_LTK, placement.rank_of_expert)


def _start(rows: FastRows) -> Fast:
    state_LRE = np.where(rows.pinned_LRE, PINNED, np.where(rows.first_LRE, CACHED, 0)).astype(np.int8)
    shape = state_LRE.shape
    return Fast(
        state_LRE=state_LRE,
        ready_LRE=np.zeros(shape),
        fresh_LRE=np.zeros(shape, np.bool_),
        value_LRE=np.zeros(shape),
        touched_LRE=np.zeros(shape),
        room_LR=rows.free_LR.copy(),
        used_LR=(state_LRE == CACHED).sum(axis=2),
        transit_RW=np.zeros((shape[1], rows.transit)),
        row_LRE=np.zeros(shape, np.int64),
    )


def _link(placement: Placement, memory: Memory, size_LE: np.ndarray) -> Link:
    tier_LRE = placement.tier_LER.transpose(0, 2, 1)
    size_LRE = np.repeat(size_LE[:, None], placement.num_ranks, axis=1)
    load_LRE = memory.load_seconds(HOST, size_LRE)
    for tier in np.unique(tier_LRE[tier_LRE > HOST]).tolist():
        load_LRE[tier_LRE == tier] = memory.load_seconds(tier, size_LRE[tier_LRE == tier])
    ranks, places = placement.num_ranks, 4 * placement.num_experts
    return Link(
        load_LRE=load_LRE,
        size_LRE=size_LRE,
        free_R=np.zeros(ranks),
        looked_R=np.zeros(ranks),
        layer_RQ=np.zeros((ranks, places), np.int64),
        expert_RQ=np.zeros((ranks, places), np.int64),
        since_RQ=np.zeros((ranks, places)),
        length_R=np.zeros(ranks, np.int64),
        ahead_layer_R=np.full(ranks, -1),
        ahead_expert_R=np.zeros(ranks, np.int64),
        begun_R=np.zeros(ranks),
        pieces=memory.pieces,
        spared_R=np.zeros(ranks),
        loads_LR=np.zeros((placement.num_layers, ranks), np.int64),
        busy_R=np.zeros(ranks),
        bytes_R=np.zeros(ranks),
    )


def _nothing_yet(layers: int, ranks: int) -> Tally:
    return Tally(np.zeros((layers, ranks, len(USES)), np.int64), np.zeros(layers), np.zeros((layers, ranks)))


def _pace(placement: Placement, memory: Memory, counted: Replay, prices: Terms, walked: Steps) -> Pace:
    expert, compute = prices.calibration.expert, memory.host.compute
    return Pace(
        outside_L=seconds_outside_experts(counted, prices.cluster, prices.shape, prices.calibration),
        fixed=expert.fixed,
        per_token=expert.per_token * prices.shape.batch / walked.width,
        per_activated=expert.per_activated,
        wake=memory.host.wake,
        speed_R=prices.cluster.speed_of_rank,
        host_per_expert=np.inf if compute is None else compute.per_expert,
        host_per_token=0.0 if compute is None else compute.per_token,
        on_host_LRE=np.isin(placement.tier_LER.transpose(0, 2, 1), (RESIDENT, HOST)),
    )


def _rule(policy: Policy, placement: Placement, seed: int) -> Rule:
    predictor = policy.predictor
    ahead_J = np.empty(0)
    if predictor is not None:
        ahead_J = predictor.accuracy ** np.arange(1.0, predictor.depth + 1)
    return Rule(policy.eviction, 1.0 - SCORE_WEIGHT, ahead_J, placement.experts_per_layer, seed)
