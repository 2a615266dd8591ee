"""Searches and `solve`: validity, exact deltas, planted optima, determinism, caps, re-solving."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.placement.cluster import Cluster
from moeplace.placement.migration.relabel import moves
from moeplace.placement.modes import MODES
from moeplace.placement.objective import load_imbalance
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.rebalancing.balancing import rebalance_layer
from moeplace.placement.rebalancing.packing import pack, pack_with_replicas
from moeplace.placement.search.annealing import seed_state
from moeplace.placement.search.layout import padded_transitions
from moeplace.placement.search.nets import connectivity, layer_nets
from moeplace.placement.search.swaps import anneal_layer
from moeplace.placement.solve import solve
from moeplace.placement.solvers.chain.search import Chain, Cooling, anneal_chain, attraction, descend_chain, untied
from moeplace.profiling.errors import InfeasibleError, InputError
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_problem, skewed_trace
from tests.placement.oracles import best_traffic, chain_cost, traffic_of

GO_ON = np.zeros(1, np.uint8)
"""A flag that never stops a kernel."""


def planted_trace(
    noise: float, *, experts: int = 16, ranks: int = 4, layers: int = 4, tokens: int = 800
) -> RoutingTrace:
    """Tokens of R hidden blocks per layer, renamed at random in every layer; `noise` of the tokens route anywhere."""
    rng = np.random.default_rng(7)
    names = np.stack([rng.permutation(experts) for _ in range(layers)])
    block = rng.integers(0, ranks, tokens)
    size = experts // ranks
    inside = np.argsort(rng.random((tokens, layers, size)), axis=2)[:, :, :2]
    ids = block[:, None, None] * size + inside
    anywhere = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :2]
    ids = np.where((rng.random((tokens, layers)) < noise)[:, :, None], anywhere, ids)
    ids = np.take_along_axis(np.broadcast_to(names, (tokens, layers, experts)), ids, axis=2)
    return RoutingTrace(ids, np.full(layers, experts), sequence_ids=np.arange(tokens) // 10)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), nodes=st.sampled_from([[0, 0, 0, 0], [0, 0, 1, 1]]))
def test_annealing_keeps_exact_account(seed, nodes):
    """The cost an annealing run reports is the cost of what it returns, counted anew; slots per rank are kept."""
    trace = skewed_trace(seed, tokens=60, layers=1, experts=11, top_k=3, ragged=0.2)
    nets = layer_nets(trace.layer(0), 12)
    rank_S, node_R = np.arange(12) % 4, np.array(nodes)
    weight = 2.5 if node_R.any() else 0.0
    cost = anneal_layer(
        nets, rank_S, node_R, np.full(4, np.inf), node_weight=weight, sweeps=5, hot=0.5, stop=GO_ON,
        state=seed_state(np.random.default_rng(seed)),
    )  # fmt: skip
    assert cost == pytest.approx(connectivity(nets, rank_S, node_R, weight))
    assert np.bincount(rank_S).tolist() == [3, 3, 3, 3]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_chain_keeps_exact_account(seed):
    """The tables after a chain run are those computed anew from its result, and descent never worsens."""
    problem = skewed_problem(
        seed, ranks=3, slots=2, mode="coherent", trace={"experts": 6, "layers": 4, "top_k": 1, "tokens": 80}
    )
    flow, cost_RR = padded_transitions(problem), problem.cluster.cost_RR
    rank_LS = np.tile(np.arange(6) % 3, (4, 1))
    before = chain_cost(rank_LS, flow, cost_RR)
    descend_chain(rank_LS, flow, cost_RR, np.zeros((4, 6, 3)))
    assert chain_cost(rank_LS, flow, cost_RR) <= before
    table = attraction(rank_LS, flow, cost_RR)
    limits, loads = np.full((4, 3), np.inf), problem.load_LE.copy()
    chain = Chain(flow, cost_RR, loads, limits, np.zeros((4, 6, 6)), *untied(6, 3))
    state = seed_state(np.random.default_rng(seed))
    anneal_chain(rank_LS, chain, table, Cooling(5.0, 0.1, 0, 121, 3000, np.zeros(len(rank_LS))), GO_ON, state)
    np.testing.assert_allclose(table, attraction(rank_LS, flow, cost_RR))
    assert (np.sort(rank_LS, axis=1) == np.repeat(np.arange(3), 2)).all()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), mode=st.sampled_from(["dispatch-combine", "coherent"]), top_k=st.sampled_from([1, 2]))
def test_bound_optimum_heuristic(seed, mode, top_k):
    """lower bound <= brute-force optimum <= solved, and tiny instances are solved to the optimum."""
    problem = skewed_problem(seed, ranks=2, slots=2, mode=mode, trace={"top_k": top_k, "tokens": 30})
    optimum = best_traffic(problem)
    result = solve(problem, time_limit=0.3, seed=seed)
    assert result.objective == pytest.approx(traffic_of(problem, problem.evaluate(result.placement)))
    assert result.lower_bound <= optimum + 1e-9
    assert result.objective >= optimum - 1e-9
    if mode == "dispatch-combine" or top_k == 1:
        assert result.objective == pytest.approx(optimum)


@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent"])
def test_planted_partition_is_recovered(mode):
    """Without noise the hidden blocks are found: one rank per token, and every token stays on it."""
    problem = Problem.from_trace(
        planted_trace(0.0), Cluster.uniform(4, slots_per_rank=4), mode=mode, objective="traffic"
    )
    evaluation = problem.evaluate(solve(problem, time_limit=2.0).placement)
    assert evaluation.ranks_per_token == 1.0
    assert evaluation.stay_rate == 1.0


def test_identity_path_stays():
    """Tokens that keep one expert index through all layers, renamed per layer: the stay rate is 1."""
    rng = np.random.default_rng(0)
    names = np.stack([rng.permutation(12) for _ in range(6)])
    path = rng.integers(0, 12, 600)
    trace = RoutingTrace(names[:, path].T[:, :, None], np.full(6, 12))
    problem = Problem.from_trace(trace, Cluster.uniform(3, slots_per_rank=4), mode="coherent", objective="traffic")
    result = solve(problem, time_limit=2.0)
    assert problem.evaluate(result.placement).stay_rate == 1.0
    assert result.status == "optimal"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", ["traffic", "seconds"])
@pytest.mark.parametrize(("slots", "per_node"), [(4, None), (5, 2), ([3, 4, 5, 5], None)])
def test_every_kind_of_problem_is_solved(mode, objective, slots, per_node):
    """All modes and objectives, with replicas, nodes and unequal slots: valid, confirmed by evaluate, bounded."""
    problem = Problem.from_trace(
        planted_trace(0.3, tokens=300), Cluster.uniform(4, slots_per_rank=slots, ranks_per_node=per_node),
        mode=mode, objective=objective, max_imbalance=None if isinstance(slots, list) else 1.3,
    )  # fmt: skip
    result = solve(problem, time_limit=0.4)
    assert result.lower_bound <= result.objective * (1 + 1e-9)
    assert set(result.bounds) == set(result.values)
    assert all(result.bounds[name] <= result.values[name] * (1 + 1e-9) for name in result.bounds)


def test_same_seed_same_placement():
    """Two runs agree slot by slot; another seed is allowed to differ."""
    problem = Problem.from_trace(planted_trace(0.5), Cluster.uniform(4, slots_per_rank=4), objective="traffic")
    first, second = (solve(problem, time_limit=1.5, seed=3) for _ in range(2))
    assert "time_limit" in (first.status, second.status) or first.placement.equals(second.placement)


def test_cap_holds_on_the_fitted_tokens():
    """No layer exceeds the larger of the cap and what packing reaches for it."""
    trace = skewed_trace(5, tokens=2000, layers=3, experts=16, top_k=2)
    cluster = Cluster.uniform(4, slots_per_rank=4)
    problem = Problem.from_trace(trace, cluster, objective="traffic", max_imbalance=1.05)
    imbalance_L = problem.evaluate(solve(problem, time_limit=1.0).placement).imbalance_L
    for layer, load in enumerate(problem.load_LE):
        packed = np.bincount(pack(load, cluster.slots_of_rank), load)
        assert imbalance_L[layer] <= max(1.05, packed.max() / packed.mean()) + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    loads=st.lists(st.integers(0, 100), min_size=3, max_size=12),
    ranks=st.integers(2, 4),
    extra=st.integers(0, 3),
)
def test_packing_is_valid_and_no_worse_than_graham(loads, ranks, extra):
    """Every expert has a slot, no rank holds one twice, and the maximum is within 4/3 of average plus largest."""
    slots = -(-len(loads) // ranks) + extra
    load_E = np.array(loads, float)
    row = pack_with_replicas(load_E, np.full(ranks, slots), np.ones(ranks))
    per_rank = row.reshape(ranks, slots)
    assert set(row[row >= 0].tolist()) == set(range(len(loads)))
    for held in per_rank:
        held = held[held >= 0]
        assert len(set(held.tolist())) == len(held)
    copies = np.bincount(row[row >= 0], minlength=len(loads))
    time_R = [(load_E[h[h >= 0]] / copies[h[h >= 0]]).sum() for h in per_rank]
    assert max(time_R) <= load_E.sum() / ranks + load_E.max() + 1e-9


def test_rebalance_keeps_to_its_moves():
    """After drift at most M experts are fetched, and the imbalance falls."""
    rng = np.random.default_rng(2)
    load_E = rng.lognormal(size=64)
    capacity_R, speed_R = np.full(8, 9), np.ones(8)
    row = pack_with_replicas(load_E, capacity_R, speed_R)
    drifted = load_E * np.exp(0.1 * rng.standard_normal(64))

    def imbalance(slots):
        part = drifted / np.bincount(slots, minlength=64)
        time_R = part[slots].reshape(8, 9).sum(axis=1)
        return time_R.max() / time_R.mean()

    for limit in (0, 3, 8):
        new = row.copy()
        made = rebalance_layer(new, drifted, capacity_R, speed_R, max_moves=limit)
        fetched = sum(
            len(set(n) - set(o)) for n, o in zip(new.reshape(8, 9).tolist(), row.reshape(8, 9).tolist(), strict=True)
        )
        assert fetched == made <= limit
        assert imbalance(new) <= imbalance(row)


def test_previous_placement_limits_moves():
    """`max_moves` holds for every layer, a price that nothing pays keeps the placement, and traffic does not worsen."""
    trace = planted_trace(0.4)
    cluster = Cluster.uniform(4, slots_per_rank=4)
    start = solve(Problem.from_trace(trace, cluster, objective="traffic"), solver="index-order", time_limit=1)
    problem = Problem.from_trace(trace, cluster, objective="traffic", previous=start.placement, max_moves=4)
    result = solve(problem, time_limit=1.0)
    assert moves(start.placement, result.placement).max() <= 4
    assert result.moved is not None
    assert result.moved["moves_per_layer_most"] <= 4
    assert result.objective <= start.objective
    dear = solve(problem.replace(max_moves=None, move_price=1e9), time_limit=0.5)
    assert dear.placement.equals(start.placement)


def test_loads_alone_are_balanced():
    """Without tokens the objective is the mean imbalance with even split, and replicas bring it near 1."""
    load_LE = np.random.default_rng(0).lognormal(size=(3, 32))
    problem = Problem.from_load(load_LE, Cluster.uniform(4, slots_per_rank=10))
    result = solve(problem, time_limit=1.0)
    assert result.objective_name == "imbalance"
    assert result.objective == pytest.approx(load_imbalance(problem, result.placement).mean())
    assert 1.0 <= result.objective <= 1.01


def test_infeasible_problems_say_by_how_much():
    """Too few slots, too few ranks for survival, or more moves than allowed: the sentence names the number."""
    trace = skewed_trace(1, experts=6)
    with pytest.raises(InfeasibleError, match=r"needs 6 slots .* have 4 slots: 2 are missing"):
        Problem.from_trace(trace, Cluster.uniform(2, slots_per_rank=2))
    with pytest.raises(InfeasibleError, match="3 ranks, there are 2"):
        Problem.from_trace(trace, Cluster.uniform(2, slots_per_rank=9), survive=2)
    with pytest.raises(InfeasibleError, match="no rank can hold an expert twice"):
        Problem.from_trace(trace, Cluster(np.zeros(2, int), np.array([12, 1]), np.ones(2)), survive=1)
    with pytest.raises(InputError, match="at least 1"):
        Problem.from_trace(trace, Cluster.uniform(2, slots_per_rank=3), max_imbalance=0.9)


@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent"])
@pytest.mark.parametrize("per_node", [None, 2])
def test_every_expert_survives_a_lost_rank(mode, per_node):
    """survive=1: every expert is on two ranks, on two nodes where there are two."""
    cluster = Cluster.uniform(4, slots_per_rank=9, ranks_per_node=per_node)
    trace = planted_trace(0.3, tokens=300)
    trace = trace if mode == "dispatch-combine" else trace.primary()
    problem = Problem.from_trace(trace, cluster, mode=mode, objective="traffic", survive=1)
    copies_LER = solve(problem, time_limit=0.5).placement.copies_LER
    assert (copies_LER.sum(axis=2) >= 2).all()
    if per_node:
        by_node = copies_LER.reshape(*copies_LER.shape[:2], 2, 2).any(axis=3)
        assert by_node.all()


def test_more_slots_do_not_worsen_the_stay_rate():
    """Copies in coherent mode are kept only where they keep tokens in place."""
    trace = planted_trace(0.5, layers=3).primary()
    values = []
    for slots in (4, 6):
        cluster = Cluster.uniform(4, slots_per_rank=slots)
        result = solve(Problem.from_trace(trace, cluster, mode="coherent", objective="traffic"), time_limit=1.0)
        values.append(result.objective)
    assert values[1] <= values[0] + 1e-9


@pytest.mark.parametrize(("light", "moves"), [(1, True), (1000, False)])
def test_a_move_is_priced_by_the_bytes_of_the_experts_that_move(light: int, moves: bool) -> None:
    """Experts 0 and 2, 1 and 3 belong together: what light experts can do is not priced like heavy ones."""
    trace = RoutingTrace(np.array([[[0, 2]], [[1, 3]]] * 8), np.array([4]), expert_bytes=[[1000, light, light, 1000]])
    cluster = Cluster.uniform(2, slots_per_rank=2)
    previous = Placement(np.array([[0, 1, 2, 3]]), cluster.slots_of_rank, cluster.node_of_rank, np.array([4]))
    problem = Problem.from_trace(trace, cluster, objective="traffic", previous=previous, move_price=0.01)
    found = solve(problem, time_limit=2.0).placement
    assert problem.evaluate(found).ranks_per_token == (1.0 if moves else 2.0)
