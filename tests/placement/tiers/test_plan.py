"""Plans with tiers: brute force, the exact model and the search agree; bounds hold; rows are kept."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.memory import HOST, HostCompute, HostTier, Memory
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.tiers.demand import Demand, count_demand
from moeplace.placement.tiers.evaluation import evaluate_tiers
from moeplace.placement.tiers.exact import solve_exactly
from moeplace.placement.tiers.joint import plan_tiers
from moeplace.placement.tiers.policy import Policy
from moeplace.placement.tiers.replicas import without_replicas
from moeplace.placement.tiers.residency import RESIDENCIES, with_residency
from moeplace.placement.tiers.terms import TierTerms
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_trace

EXPERT = ExpertTime(fixed=2.0, per_token=0.25, per_activated=1.0)
CALIBRATION = Calibration(
    intra=replace(Calibration().intra, latency=0.0, bandwidth=1e30), expert=EXPERT, other_seconds_per_layer=5.0
)
LOAD = 20.0


def instance(
    seed: int, *, layers: int = 1, experts: int = 4, ranks: int = 2, fast: int = 2, transit: int = 1, tokens: int = 24
) -> tuple[RoutingTrace, Placement, Cluster, StepShape]:
    trace = skewed_trace(seed, tokens=tokens, layers=layers, experts=experts, top_k=2)
    slots = experts // ranks
    memory = Memory(HostTier(bandwidth=1 / LOAD), fast_slots=np.full(ranks, fast), transit=transit)
    cluster = Cluster.uniform(ranks, slots_per_rank=slots).replace(memory=memory)
    start = index_order(np.full(layers, experts), np.full(ranks, slots), np.zeros(ranks, int))
    return trace, start, cluster, StepShape(batch=3, hidden_size=1, kv_dim=0)


def brute_force(trace: RoutingTrace, cluster: Cluster, *, experts: int, room: int, batch: int) -> float:
    """Least mean seconds of one layer's steps, over all ranks of experts and all residents, counted from the ids."""
    ids = np.asarray(trace.topk_ids)[:, 0]
    length = len(ids) // batch
    steps = [np.bincount(ids[s : batch * length : length].reshape(-1), minlength=experts) for s in range(length)]
    least, half = np.inf, experts // 2
    for first in itertools.combinations(range(experts), half):
        sides = [set(first), set(range(experts)) - set(first)]
        kept_of = [[set(kept) for n in range(room + 1) for kept in itertools.combinations(side, n)] for side in sides]
        for kept in itertools.product(*kept_of):
            total = 0.0
            for counts in steps:
                ends = []
                for side, resident in zip(sides, kept, strict=True):
                    asked = [e for e in side if counts[e]]
                    computing = sum(EXPERT.per_activated + EXPERT.per_token * counts[e] for e in asked)
                    misses = sum(e not in resident for e in asked)
                    ends.append(max(computing, misses * LOAD + EXPERT.per_activated if misses else 0.0))
                total += max(ends)
            least = min(least, total / length)
    return least


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_model_is_brute_force(seed: int, dated_seed: int) -> None:
    """One layer, two ranks: every assignment and every residency."""
    for each in (seed, dated_seed + seed):
        trace, start, cluster, shape = instance(each)
        demand = count_demand(trace, batch=shape.batch)
        found, seconds, proven = solve_exactly(
            demand, start, cluster=cluster, expert=EXPERT, expert_bytes=1.0, time_limit=20, unit=0.25
        )
        assert proven
        assert seconds == pytest.approx(brute_force(trace, cluster, experts=4, room=1, batch=3))
        assert (found.tier_LER == 0).sum() <= 2


def surrogate(demand: Demand, placement: Placement) -> float:
    """Mean seconds of all layers' experts without the fixed part, as the search has it, straight from its words."""
    total = 0.0
    for layer, asked in enumerate(demand.layers):
        for step in range(demand.steps):
            ends = [0.0]
            for rank in range(placement.num_ranks):
                computing = loading = 0.0
                for expert in range(placement.num_experts):
                    pairs = range(asked.first_E[expert], asked.first_E[expert + 1])
                    tokens = sum(int(asked.tokens_N[n]) for n in pairs if asked.step_N[n] == step)
                    tier = placement.tier_LER[layer, expert, rank]
                    if tokens and tier >= 0:
                        computing += EXPERT.per_activated + EXPERT.per_token * tokens
                        loading += LOAD * (tier > 0)
                ends += [computing, loading + EXPERT.per_activated if loading else 0.0]
            total += max(ends)
    return total / demand.steps


@pytest.mark.parametrize("seed", range(3))
def test_the_search_is_near_the_optimum(seed: int, dated_seed: int) -> None:
    """Two layers that trade rows: never below the exact model's value, within 6 % of it."""
    for each in (seed, dated_seed + seed):
        trace, start, cluster, shape = instance(each, layers=2, experts=4, ranks=2, fast=1, transit=1, tokens=21)
        demand = count_demand(trace, batch=shape.batch)
        exact, least, proven = solve_exactly(
            demand, start, cluster=cluster, expert=EXPERT, expert_bytes=1.0, time_limit=5, unit=0.25
        )
        assert surrogate(demand, exact) == pytest.approx(least)
        terms = TierTerms(cluster, shape, mode="allgather", calibration=CALIBRATION)
        plan = plan_tiers(trace, start, Policy("pinned"), terms, seed=each % 1000)
        if plan.found_by == "joint":
            value = surrogate(demand, plan.placement)
            if proven:
                assert least - 1e-9 <= value <= least * 1.06
        assert plan.lower_bound is not None
        for placement in (plan.placement, exact, start.replace(tier=np.full(start.slot_to_expert.shape, HOST))):
            walked = evaluate_tiers(trace, placement, Policy("pinned"), terms).seconds
            assert walked >= plan.lower_bound * (1 - 1e-12)
        assert plan.evaluation.seconds <= min(
            evaluate_tiers(
                trace, with_residency(start, trace, terms.memory, by=by, batch=3, expert_bytes=1.0), Policy("pinned"),
                terms,
            ).seconds
            for by in ("load", "activation")
        )  # fmt: skip


@pytest.mark.parametrize("policy", [Policy("pinned"), Policy("lru")], ids=lambda policy: policy.label)
def test_plans_keep_slots_and_rows(policy: Policy, dated_seed: int) -> None:
    """Every expert once, as many slots a rank as before, no more residents than rows; same seed, same plan."""
    trace, start, cluster, shape = instance(dated_seed, layers=3, experts=8, ranks=4, fast=1, transit=2, tokens=60)
    terms = TierTerms(cluster, shape, mode="allgather", calibration=CALIBRATION)
    plan = plan_tiers(trace, start, policy, terms, seed=3)
    again = plan_tiers(trace, start, policy, terms, seed=3)
    assert plan.placement.equals(again.placement)
    assert (plan.placement.replica_counts == 1).all()
    assert np.array_equal(plan.placement.copies_LER.sum(axis=1), start.copies_LER.sum(axis=1))
    assert ((plan.placement.tier_LER == 0).sum(axis=(0, 1)) <= 3 * 1 - 2).all()
    assert (plan.lower_bound is None) == (policy.name != "pinned")


def test_hosts_that_compute_have_no_bound() -> None:
    """What the bound does not cover is not bounded."""
    trace, start, cluster, shape = instance(1)
    assert cluster.memory is not None
    memory = replace(cluster.memory, host=replace(cluster.memory.host, compute=HostCompute(1.0, 1.0)))
    terms = TierTerms(cluster.replace(memory=memory), shape, mode="allgather", calibration=CALIBRATION)
    assert plan_tiers(trace, start, Policy(), terms).lower_bound is None
    with pytest.raises(InputError, match="no memory tiers"):
        TierTerms(cluster.replace(memory=None), shape)


def replicated(seed: int) -> Placement:
    """Eight experts on two ranks of six slots: four replicas, drawn."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(3):
        order = draw.permutation(8)
        rows.append([*order[:6], *order[6:], *draw.permutation(order[:6])[:4]])
    return Placement(np.array(rows), np.array([6, 6]), np.zeros(2, int), np.full(3, 8))


def test_replicas_come_back_only_where_they_pay(dated_seed: int) -> None:
    """Where loads are what a step waits for, rows go to other experts, and no plan is worse than with all replicas;
    bounds hold for all of them."""
    for seed in (0, dated_seed):
        trace, _, cluster, shape = instance(seed, layers=3, experts=8, ranks=2, fast=3, transit=2, tokens=60)
        assert cluster.memory is not None
        start, cluster = replicated(seed), cluster.replace(slots_of_rank=np.array([6, 6]))
        terms = TierTerms(cluster, shape, mode="allgather", calibration=CALIBRATION)
        plan = plan_tiers(trace, start, Policy(), terms)
        for by in ("load", "activation"):
            draft = with_residency(start, trace, cluster.memory, by=by, batch=shape.batch, expert_bytes=1.0)
            judged = evaluate_tiers(trace, draft, Policy(), terms)
            assert plan.evaluation.seconds <= judged.seconds
            assert plan.lower_bound is not None
            assert plan.lower_bound <= judged.seconds * (1 + 1e-9)
        assert ((plan.placement.tier_LER == 0).sum(axis=(0, 1)) <= 3 * 3 - 2).all()
        assert (plan.placement.replica_counts >= 1).all()


def test_a_replica_pays_where_computing_is_what_steps_wait_for() -> None:
    """One expert has nearly all tokens and loads are quick: two ranks share them, for the row of somebody unwanted."""
    ids = np.zeros((66, 1, 1), int)  # lanes of 11 tokens: those of a step are at home on both ranks
    ids[::6, 0, 0] = np.arange(11) % 3 + 1
    trace = RoutingTrace(ids, np.array([4]))
    memory = Memory(HostTier(bandwidth=1e3), fast_slots=np.full(2, 3), transit=1)
    cluster = Cluster.uniform(2, slots_per_rank=4).replace(memory=memory)
    start = Placement(np.array([[0, 1, -1, -1, 2, 3, -1, -1]]), np.array([4, 4]), np.zeros(2, int), np.array([4]))
    calibration = replace(CALIBRATION, expert=ExpertTime(0.0, 1.0, 0.0))
    shape = StepShape(batch=6, hidden_size=1, kv_dim=0)
    terms = TierTerms(cluster, shape, mode="dispatch-combine", calibration=calibration)
    plan = plan_tiers(trace, start, Policy(), terms)
    assert plan.found_by == "joint and 1 replicas"
    assert plan.placement.replica_counts[0].tolist() == [2, 1, 1, 1]
    assert (plan.placement.tier_LER[0, 0] == 0).all()
    assert plan.lower_bound is not None
    assert plan.lower_bound <= plan.evaluation.seconds


def test_giving_up_replicas_keeps_one_slot_of_each(dated_seed: int) -> None:
    """Of its own slots, whoever is asked for; ranks are asked for about alike."""
    start = replicated(dated_seed)
    asked_LE = np.random.default_rng(dated_seed).random((3, 8))
    bare = without_replicas(start, asked_LE)
    assert (bare.replica_counts == 1).all()
    kept = bare.slot_to_expert >= 0
    assert np.array_equal(bare.slot_to_expert[kept], start.slot_to_expert[kept])


@pytest.mark.parametrize("by", RESIDENCIES)
def test_residency_by_a_figure_fills_every_rank(by: str) -> None:
    """As many residents as there is room for on each rank; by load, the heaviest of the rank."""
    trace, start, cluster, _ = instance(5, layers=3, experts=8, ranks=2, fast=2, transit=2, tokens=80)
    assert cluster.memory is not None
    found = with_residency(start, trace, cluster.memory, by=by, batch=3, expert_bytes=1.0)
    assert (found.tier_LER == 0).sum(axis=(0, 1)).tolist() == [4, 4]
    if by == "load":
        load_LE = np.stack(
            [np.bincount(np.asarray(trace.topk_ids)[:, layer].ravel(), minlength=8) for layer in range(3)]
        )
        for rank in range(2):
            kept, backed = (load_LE[found.tier_LER[:, :, rank] == tier] for tier in (0, HOST))
            assert kept.min() >= backed.max()
