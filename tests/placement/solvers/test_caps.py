"""Load caps with replicas, judged by `evaluate`: what is feasible is kept, in every mode, at any number of ranks."""

import numpy as np
import pytest

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.replica_choice import choose_ranks
from moeplace.placement.problem import Problem
from moeplace.placement.search.packing import pack_slots
from moeplace.placement.solve import solve
from moeplace.placement.solvers.replicas.repair import keep_caps
from moeplace.placement.solvers.replicas.rule import follow_owners, replay, rule_on, unserved
from moeplace.placement.solvers.replicas.seats import find_holders
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_trace
from tests.placement.random_placements import random_placement
from tests.seeds import TODAY


@pytest.mark.parametrize("seed", [0, 1, 2, TODAY])
@pytest.mark.parametrize("ranks", [4, 70])
def test_the_searches_rule_is_the_runtimes(seed, ranks):
    """Ranks of every token as `choose_ranks` has them, wherever tokens are; owners as `evaluate` follows them."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    trace = skewed_trace(seed, tokens=150, layers=1, experts=2 * ranks, top_k=4, ragged=0.1)
    node_R = np.arange(ranks) // (ranks // 2)
    placement = random_placement(
        rng, layers=1, experts=2 * ranks, slots_of_rank=[3] * ranks, node_of_rank=node_R.tolist()
    )
    ids_TK, near_T = trace.layer(0).astype(np.int16), rng.integers(-1, ranks, 150).astype(np.int32)
    wanted_TK = np.empty((150, 4), np.int32)
    choose_ranks(ids_TK, placement.copies_LER[0], node_R, near_T, np.arange(150), wanted_TK)
    rule = rule_on(ids_TK, node_R, 0.5, near_T)
    served = unserved(rule)
    replay(rule, find_holders(placement.slot_to_expert[0], placement.rank_of_slot, 2 * ranks, ranks), served)
    assert np.array_equal(served.rank_TK, wanted_TK)
    for t, row in enumerate(wanted_TK):
        used = set(row[row >= 0].tolist())
        assert served.cost_T[t] == len(used) + 0.5 * len({int(node_R[r]) for r in used})
    for t, owner in enumerate(follow_owners(served.rank_TK, near_T.astype(np.int16), ranks)):
        counts = np.bincount(wanted_TK[t][wanted_TK[t] >= 0], minlength=ranks)
        most = counts.max()
        expected = near_T[t] if not most or (near_T[t] >= 0 and counts[near_T[t]] == most) else int(counts.argmax())
        assert owner == expected


def problem_of(seed: int, mode: str, ranks: int, slots: int, **options: object) -> Problem:
    trace = skewed_trace(seed, tokens=800, layers=2, experts=24, top_k=3)
    return Problem.from_trace(
        trace, Cluster.uniform(ranks, slots_per_rank=slots), mode=mode, objective="traffic", **options
    )


@pytest.mark.parametrize("seed", [0, 1, TODAY])
@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent"])
@pytest.mark.parametrize(("ranks", "slots"), [(4, 8), (6, 5), (3, 16)])
def test_broken_layers_are_mended(seed, mode, ranks, slots):
    """From random replicas: the loads by `evaluate` end within 1.12 of even, and layers that kept the cap stay."""
    print("seed", seed)
    problem = problem_of(seed, mode, ranks, slots, max_imbalance=1.12)
    rng = np.random.default_rng(seed)
    start = random_placement(
        rng, layers=2, experts=24, slots_of_rank=[slots] * ranks, node_of_rank=[0] * ranks
    ).slot_to_expert
    caps_L = np.full(2, 1.12)
    kept_LS = keep_caps(problem, start, caps_L, rng, np.zeros(1, np.uint8))
    assert (problem.evaluate(problem.placement(kept_LS)).imbalance_L <= caps_L + 1e-6).all()
    if problem.evaluate(problem.placement(start)).imbalance_L[0] <= 1.12:
        assert np.array_equal(kept_LS[0], start[0])


@pytest.mark.clock(0.1)
@pytest.mark.parametrize("solver", ["auto", "lpt", "cp-sat"])
@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent", "allgather"])
def test_solvers_keep_caps(solver, mode):
    """What packing keeps by `evaluate`, every solver that knows caps keeps."""
    problem = problem_of(TODAY, mode, 4, 8)
    packed_LS = np.stack([pack_slots(problem, layer) for layer in range(2)])
    cap = max(1.1, float(problem.evaluate(problem.placement(packed_LS)).imbalance_L.max()))
    result = solve(problem.replace(max_imbalance=cap), solver=solver, time_limit=1.0)
    assert problem.evaluate(result.placement).imbalance_L.max() <= cap + 1e-6
    assert not [note for note in result.notes if "cap on imbalance" in note]


@pytest.mark.clock(0.1)
@pytest.mark.parametrize("solver", ["auto", "lpt"])
def test_more_ranks_than_a_word_has_bits(solver):
    """96 experts on 72 ranks x 2 slots, the heaviest needing several: the cap holds by the runtime's rule."""
    print("seed", TODAY)
    rng = np.random.default_rng(TODAY)
    taste = np.log(rng.lognormal(0, 0.8, 96)) + rng.gumbel(size=(6000, 1, 96))
    trace = RoutingTrace(np.argsort(-taste, axis=2)[:, :, :4], np.full(1, 96))
    cluster = Cluster.uniform(72, slots_per_rank=2, ranks_per_node=8)
    problem = Problem.from_trace(trace, cluster, objective="traffic", max_imbalance=1.3)
    result = solve(problem, solver=solver, time_limit=1.0)
    assert not [note for note in result.notes if "cap on imbalance" in note]
    assert problem.evaluate(result.placement).imbalance_L.max() <= 1.3 + 1e-6


@pytest.mark.parametrize("seed", [0, 1, TODAY])
@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent", "allgather"])
def test_shared_out_replicas_keep_caps_and_budget(mode, seed):
    """What keeps a cap with the cluster's own slots in every layer keeps it where replicas are shared out to layers."""
    print("seed", seed)
    problem = problem_of(seed, mode, 4, 8)
    packed_LS = np.stack([pack_slots(problem, layer) for layer in range(2)])
    cap = max(1.1, float(problem.evaluate(problem.placement(packed_LS)).imbalance_L.max()))
    result = solve(problem.replace(max_imbalance=cap, replica_budget="global"), time_limit=1.0)
    assert problem.evaluate(result.placement).imbalance_L.max() <= cap + 1e-6
    assert not [note for note in result.notes if "cap on imbalance" in note]
    held = result.placement.slot_to_expert >= 0
    on_rank_R = [held[:, result.placement.slots_on(rank)].sum() for rank in range(4)]
    assert max(on_rank_R) <= 2 * 8
