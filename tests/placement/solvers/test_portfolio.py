"""The portfolio's parts do what they are for: caps of chains, hedge, alignment of nodes, caps that compete, prices."""

from typing import Any

import numpy as np
import pytest

from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.placement import Placement
from moeplace.placement.problem import Problem
from moeplace.placement.rebalancing.packing import pack
from moeplace.placement.search.alignment import align_ranks
from moeplace.placement.search.hedge import risk_matrix
from moeplace.placement.solve import solve
from moeplace.placement.solvers.layer.search import LayerSearch
from moeplace.placement.solvers.lpt import solve_lpt
from moeplace.placement.solvers.schedule import search_layers
from moeplace.placement.solvers.seconds import fastest
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.instances import skewed_trace

GO_ON = np.zeros(1, np.uint8)


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_keeps_its_cap(seed: int) -> None:
    """No layer of a chain exceeds the larger of the cap and what packing reaches, though staying would pay."""
    trace = skewed_trace(seed, tokens=1500, layers=3, experts=16, top_k=1)
    cluster = Cluster.uniform(4, slots_per_rank=4)
    loose = Problem.from_trace(trace, cluster, mode="coherent", objective="traffic")
    tight = loose.replace(max_imbalance=1.05)
    free, kept = (p.evaluate(solve(p, time_limit=0.5).placement).imbalance_L for p in (loose, tight))
    allowed = [max(1.05, (np.bincount(pack(load, cluster.slots_of_rank), load) * 4 / load.sum()).max())
               for load in tight.load_LE]  # fmt: skip
    assert (free > np.array(allowed) + 1e-3).any()
    assert (kept <= np.array(allowed) + 1e-9).all()


def test_experts_hot_in_the_same_sequences_cost_more_together() -> None:
    """Two pairs of equal loads: 0 and 1 are hot in the same sequences, 2 and 3 in the others."""
    ids = np.array([[[2 * (sequence % 2) + token % 2]] for sequence in range(16) for token in range(10)])
    trace = RoutingTrace(ids, np.array([4]), sequence_ids=np.repeat(np.arange(16), 10))
    risk_SS = risk_matrix(trace, trace.layer(0), np.array([0, 0, 1, 1]), 0.1)
    # x - n p = +-2.5 in every sequence, alike for a pair and opposite for the others; a pair together varies as packed.
    np.testing.assert_allclose(risk_SS / risk_SS[0, 0], np.kron([[1, -1], [-1, 1]], np.ones((2, 2))))
    assert 2 * risk_SS[:2, :2].sum() ** 2 == pytest.approx(0.1 * 160)


def test_a_layer_is_searched_with_its_hedge() -> None:
    """What a search minimises is traffic and hedge, and the hedge of real sequences is not zero."""
    trace = skewed_trace(4, tokens=400, layers=1, experts=8).replace(sequence_ids=np.arange(400) // 20)
    problem = Problem.from_trace(trace, Cluster.uniform(2, slots_per_rank=4), objective="traffic", max_imbalance=1.5)
    without, hedged = (LayerSearch(problem, 0, 1.5, weight, GO_ON).penalised(np.arange(8) % 2) for weight in (0.0, 0.1))
    placement = problem.placement(np.array([[0, 2, 4, 6, 1, 3, 5, 7]]))
    assert without == pytest.approx(400 * problem.evaluate(placement).ranks_per_token)
    assert hedged > without + 1.0


def test_whole_nodes_are_renamed_so_that_tokens_stay() -> None:
    """Tokens of ranks 0 1 | 2 3 go to 3 2 | 1 0: both nodes and the ranks inside them change names."""
    flow_RR = np.zeros((4, 4))
    flow_RR[[0, 1, 2, 3], [3, 2, 1, 0]] = [50, 40, 30, 20]
    names_LR = align_ranks(flow_RR[None], Cluster.uniform(4, slots_per_rank=2, ranks_per_node=2))
    assert names_LR.tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]


@pytest.mark.parametrize(
    ("hardest", "asked"), [(None, [1.01, 1.05, 1.15, None]), (1.1, [1.01, 1.05, 1.1]), (1.0, [1.0])]
)
def test_several_caps_compete_for_the_shortest_step(hardest: float | None, asked: list[Any]) -> None:
    """Every cap up to the user's gets an equal share of the time."""
    problem = Problem.from_trace(
        skewed_trace(0, experts=8), Cluster.uniform(2, slots_per_rank=4), max_imbalance=hardest
    )
    caps, shares = [], []

    def search(part: Problem, budget: Budget, cap: float | None, share: float, ties: Any) -> Any:
        caps.append(cap)
        shares.append(share)
        return [np.tile(np.arange(8), (part.num_layers, 1))], False

    fastest(problem, Budget(1e9), search)
    assert caps == asked
    assert sum(shares) == pytest.approx(1.0)


@pytest.mark.clock(0.1)
@pytest.mark.parametrize(("share", "moves"), [(0.9, True), (1.1, False)])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_price_is_weighed_against_a_mean_over_layers(layers: int, share: float, moves: bool) -> None:
    """Mending a layer takes two moves and gains 1 rank per token there, hence 1 / L of the objective."""
    trace = RoutingTrace(np.tile(np.array([[[0, 2]], [[1, 3]]] * 8), (1, layers, 1)), np.full(layers, 4))
    cluster = Cluster.uniform(2, slots_per_rank=2)
    previous = Placement(
        np.tile([0, 1, 2, 3], (layers, 1)), cluster.slots_of_rank, cluster.node_of_rank, np.full(layers, 4)
    )
    price = share / (2 * layers)
    problem = Problem.from_trace(trace, cluster, objective="traffic", previous=previous, move_price=price)
    found = solve(problem, time_limit=0.3).placement
    assert problem.evaluate(found).ranks_per_token == (1.0 if moves else 2.0)


@pytest.mark.usefixtures("still_clock")
def test_work_that_there_is_time_for_is_done() -> None:
    """No time passes: nothing is cut, and every layer is better than packed."""
    trace = skewed_trace(5, tokens=300, layers=2, experts=16)
    problem = Problem.from_trace(trace, Cluster.uniform(4, slots_per_rank=4), objective="traffic")
    found, cut = search_layers(problem, Budget(0.05), None, 0.05)
    assert not cut
    packed = problem.placement(solve_lpt(problem, Budget(1.0)).slot_to_expert)
    plan = problem.placement(np.stack([row_S for _, row_S in found]))
    assert problem.evaluate(plan).ranks_per_token < 0.98 * problem.evaluate(packed).ranks_per_token
