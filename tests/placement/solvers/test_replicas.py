"""Searches over replicas: the bits against the replay, budgets over layers, survival, even ties."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.replica_choice import NUM_ORDERS, preference_orders
from moeplace.placement.problem import Problem
from moeplace.placement.search.annealing import seed_state
from moeplace.placement.search.layout import UNLIMITED
from moeplace.placement.search.nets import layer_nets
from moeplace.placement.search.swaps import Near, no_ties
from moeplace.placement.solve import solve
from moeplace.placement.solvers.layer.search import Effort, LayerSearch
from moeplace.placement.solvers.replicas.bit_search import anneal_bits
from moeplace.placement.solvers.replicas.budget import search_budget, share_out
from moeplace.placement.solvers.replicas.exact_search import Schedule
from moeplace.placement.solvers.replicas.search import ReplicaSearch
from moeplace.placement.solvers.replicas.seats import seat
from moeplace.placement.solvers.replicas.token_bits import bit_state, token_bits
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_problem, skewed_trace
from tests.placement.random_placements import random_placement
from tests.seeds import FIXED_AND_TODAY

GO_ON = np.zeros(1, np.uint8)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_orders_prefer_no_rank(ranks):
    """Each order names every rank once, and of any two ranks each comes first in half of the orders."""
    orders_PR = preference_orders(ranks)
    assert (np.sort(orders_PR, axis=1) == np.arange(ranks)).all()
    place_PR = np.argsort(orders_PR, axis=1)
    for g, h in itertools.combinations(range(ranks), 2):
        assert (place_PR[:, g] < place_PR[:, h]).sum() == NUM_ORDERS // 2


def test_ties_are_split_evenly_between_any_two_ranks():
    """All experts on the same two ranks, neighbours or not: each serves half of the tokens."""
    trace = skewed_trace(0, tokens=4000, layers=1, experts=3, top_k=1)
    for pair in itertools.combinations(range(4), 2):
        row = np.full((4, 3), -1)
        row[list(pair)] = np.arange(3)
        problem = Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=3))
        load_R = problem.evaluate(problem.placement(row.reshape(1, -1))).load_LR[0]
        assert load_R[list(pair)] == pytest.approx([2000, 2000], abs=100)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), extra=st.integers(1, 5), nodes=st.sampled_from([1, 2]), top_k=st.integers(1, 2))
def test_bits_are_the_replay(seed, extra, nodes, top_k):
    """With at most two experts a token the bits count what a replay counts; on nodes nearly so."""
    trace = skewed_trace(seed, tokens=200, layers=1, experts=10, top_k=top_k, ragged=0.1)
    placement = random_placement(
        np.random.default_rng(seed), layers=1, experts=10, slots_of_rank=[3, 3, 2, 2 + extra],
        node_of_rank=[0, 0, nodes - 1, nodes - 1],
    )  # fmt: skip
    cluster = Cluster(placement.node_of_rank, placement.slots_of_rank, np.ones(4))
    problem = Problem.from_trace(trace, cluster)
    bits = token_bits(trace.layer(0), cluster.num_slots, 4)
    slots_S = placement.slot_to_expert[0].copy()
    weight = 1.5 if nodes > 1 else 0.0
    seats = seat(slots_S, cluster.first_slots, cluster.num_slots, 10)
    cost, load_R = anneal_bits(
        bits, seats, bit_state(bits, seats, cluster.node_of_rank, weight), np.full(4, UNLIMITED),
        np.zeros((cluster.num_slots,) * 2), Schedule(0.0, 0.0, 60.0), no_ties(4), GO_ON,
        seed_state(np.random.default_rng(seed)),
    )  # fmt: skip
    after = problem.evaluate(problem.placement(slots_S[None]))
    before = problem.evaluate(placement)
    # On nodes a token may prefer its home where bits take a node that is in use anyway.
    judged = 200 * (after.ranks_per_token + weight * after.nodes_per_token)
    assert cost == pytest.approx(judged, rel=1e-9 if nodes == 1 else 0.1)
    np.testing.assert_allclose(load_R, after.load_LR[0], atol=0 if nodes == 1 else 25)
    slack = 1e-9 if nodes == 1 else 0.1 * judged / 200
    assert judged / 200 <= before.ranks_per_token + weight * before.nodes_per_token + slack


def replica_search(problem: Problem, limit_R: np.ndarray) -> ReplicaSearch:
    assert problem.trace is not None
    nets = layer_nets(problem.trace.layer(0), problem.cluster.num_slots)
    return ReplicaSearch(problem, 0, nets, limit_R, limit_R, GO_ON)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), cap=st.sampled_from([1.05, 1.2, None]))
def test_copies_never_worsen_a_layer(seed, cap):
    """The search ends at or below the value of its start, which it reports as the replay counts it."""
    problem = skewed_problem(
        seed, ranks=4, slots=4, trace={"tokens": 300, "layers": 1, "experts": 12, "top_k": 3}, max_imbalance=cap
    )
    plain_S = np.full(16, -1, np.int32)
    plain_S[np.arange(12) // 3 * 4 + np.arange(12) % 3] = np.arange(12)
    limit = UNLIMITED if cap is None else cap * problem.load_LE.sum() / 4
    search = replica_search(problem, np.full(4, limit))
    value, slots_S = search.run(plain_S, 0.1, 0.01, np.random.default_rng(seed))
    assert value <= search.value(plain_S) + 1e-9
    evaluation = problem.evaluate(problem.placement(slots_S[None]))
    over = np.maximum(evaluation.load_LR[0] - limit, 0).sum()
    assert value == pytest.approx(300 * evaluation.ranks_per_token + 1e3 * over)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_ties_count_in_what_a_tied_run_chooses(seed: int) -> None:
    """It reports replay and bias of its row, and is as good as its first start, however dear new places are."""
    print("seed", seed)
    problem = skewed_problem(seed, ranks=4, slots=4, trace={"tokens": 300, "layers": 1, "experts": 12, "top_k": 3})
    start_S = random_placement(np.random.default_rng(seed), layers=1, experts=12, slots_of_rank=[4] * 4)
    row_S, rank_S = start_S.slot_to_expert[0].astype(np.int32), np.repeat(np.arange(4), 4)
    new_ER = np.ones((16, 4), np.uint8)
    new_ER[row_S, rank_S] = 0
    search = replica_search(problem, np.full(4, UNLIMITED))
    for dear in (0.0, 2.0, 40.0):
        near = Near(dear * new_ER, new_ER, 8.0)
        value, slots_S = search.run_tied([row_S], near, 0.1, 0.01, np.random.default_rng(seed))
        held = slots_S >= 0
        bias = near.bias_ER[slots_S[held], rank_S[held]].sum()
        assert value == pytest.approx(search.value(slots_S) + bias)
        assert value <= search.value(row_S) + 1e-9


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.integers(0, 20), min_size=4, max_size=4), min_size=1, max_size=4),
    low=st.integers(-2, 0),
)
def test_shares_are_the_best_of_all(values, low):
    """The knapsack over layers agrees with trying every way to share out, and keeps the total."""
    value_LS = np.array(values, float)
    steps = range(low, low + 4)
    step_L = share_out(value_LS, steps)
    assert step_L.sum() <= 0
    best = min(
        sum(value_LS[layer, s - low] for layer, s in enumerate(chosen))
        for chosen in itertools.product(steps, repeat=len(values))
        if sum(chosen) <= 0
    )
    assert value_LS[np.arange(len(values)), step_L - low].sum() == best


def uneven_layers(seed: int, tokens: int = 240) -> RoutingTrace:
    """A layer whose tokens use any two experts, and one whose tokens use one expert: copies save nothing there."""
    rng = np.random.default_rng(seed)
    pairs = np.argsort(rng.random((tokens, 8)), axis=1)[:, :2]
    alone = np.stack([rng.integers(0, 8, tokens), np.full(tokens, -1)], axis=1)
    return RoutingTrace(np.stack([pairs, alone], axis=1), np.full(2, 8))


@pytest.mark.parametrize("seed", range(3))
def test_global_budget_goes_where_it_pays(seed):
    """Layers without gain give their slots away: fewer ranks per token than per layer, no rank holds more experts."""
    trace, cluster = uneven_layers(seed), Cluster.uniform(4, slots_per_rank=3)
    problem = Problem.from_trace(trace, cluster, objective="traffic", replica_budget="global")

    def search(part, layers, share):
        searches = [LayerSearch(part, layer, None, 0.0, GO_ON) for layer in layers]
        return [each.run(Effort(sweeps=20, copy_seconds=0.02), np.random.default_rng(seed)) for each in searches]

    slots_LS = search_budget(problem, search)
    shared = problem.evaluate(problem.placement(slots_LS))
    plain = problem.replace(replica_budget="per-layer")
    each = plain.evaluate(plain.placement(np.stack([row for _, row in search(plain, [0, 1], 1.0)])))
    assert shared.ranks_per_token < each.ranks_per_token
    used_LR = (slots_LS >= 0).reshape(2, 4, -1).sum(axis=2)
    assert (used_LR.sum(axis=0) <= 2 * 3).all()
    assert used_LR[0].sum() > used_LR[1].sum()


def test_global_budget_is_solved_and_bounded():
    """`solve` returns the widest layer's slots, keeps every rank's total and proves a bound over all ways to share."""
    problem = Problem.from_trace(
        uneven_layers(0), Cluster.uniform(4, slots_per_rank=3), objective="traffic", replica_budget="global"
    )
    result = solve(problem, time_limit=1.0)
    assert result.placement.num_slots == problem.layout.num_slots == 20
    assert result.lower_bound <= result.objective + 1e-9
    assert ((result.placement.slot_to_expert >= 0).reshape(2, 4, -1).sum(axis=(0, 2)) <= 2 * 3).all()


def test_global_budget_elsewhere_is_per_layer():
    """Solvers that share nothing out keep the cluster's slots and say so; an unknown budget is refused."""
    problem = Problem.from_trace(
        uneven_layers(0), Cluster.uniform(4, slots_per_rank=3), objective="traffic", replica_budget="global"
    )
    result = solve(problem, solver="lpt", time_limit=1.0)
    assert result.placement.num_slots == 12
    assert any("per layer" in note for note in result.notes)
    with pytest.raises(InputError, match="replica budget 'some' must be one of per-layer, global"):
        problem.replace(replica_budget="some")


@pytest.mark.parametrize(("mode", "top_k"), [("dispatch-combine", 2), ("coherent", 2), ("coherent", 1)])
@pytest.mark.parametrize("per_node", [None, 2])
def test_survival_searches_traffic(mode, top_k, per_node):
    """With every expert on two ranks (and nodes), tokens travel less than under copies packed by load alone."""
    trace = skewed_trace(3, tokens=600, layers=3, experts=12, top_k=top_k)
    cluster = Cluster.uniform(4, slots_per_rank=7, ranks_per_node=per_node)
    problem = Problem.from_trace(trace, cluster, mode=mode, objective="traffic", survive=1)
    packed, searched = (solve(problem, solver=name, time_limit=0.8) for name in ("lpt", "auto"))
    assert not [note for note in searched.notes if "survive" in note]
    assert searched.objective <= packed.objective + 1e-9
    copies_LER = searched.placement.copies_LER
    assert (copies_LER.sum(axis=2) >= 2).all()
    if per_node:
        assert copies_LER.reshape(3, 12, 2, 2).any(axis=3).all()
