"""The verifier's values are the evaluator's, although neither knows the other; and what is illegal is called so."""

import json

import numpy as np
import pytest

from moeplace.placement.budget import Budget
from moeplace.placement.cluster import Cluster
from moeplace.placement.cost.replica_rule import get_rule
from moeplace.placement.objective import measure
from moeplace.placement.problem import Problem
from moeplace.placement.solvers import get_solver
from moeplace.placement.statement import state
from moeplace.placement.verification.claims import AGREEMENT, _at_most, _same
from moeplace.placement.verification.legality import broken_caps, broken_rules
from moeplace.placement.verification.statement import Statement
from moeplace.placement.verification.values import values_of
from moeplace.profiling.errors import FormatError
from tests.placement.instances import skewed_trace
from tests.seeds import FIXED_AND_TODAY

SPEEDS = np.array([1.0, 1.0, 0.5, 2.0])


def stated(problem: Problem, objective: str = "traffic", caps_L: np.ndarray | None = None) -> Statement:
    """The statement, through JSON."""
    return Statement.from_document(json.loads(json.dumps(state(problem, objective=objective, caps_L=caps_L))))


def distances(seed: int) -> np.ndarray:
    """(4, 4) random and symmetric."""
    upper = np.triu(np.random.default_rng(seed).uniform(1, 4, (4, 4)), 1)
    return upper + upper.T


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize("mode", ["dispatch-combine", "coherent", "allgather"])
@pytest.mark.parametrize("rule", ["moeplace", "balanced", "hash", "random", "nearest-static"])
def test_values_agree(seed: int, mode: str, rule: str) -> None:
    """Traffic, seconds and imbalance, with and without replicas, nodes, speeds and distances, ragged or not."""
    for slots in (4, 5, [6, 4, 5, 4]):
        ragged = 0.3 if seed % 2 else 0.0
        trace = skewed_trace(seed, tokens=150, layers=3, experts=16, top_k=1 + seed % 3, ragged=ragged)
        cluster = Cluster.uniform(4, slots_per_rank=slots, ranks_per_node=[4, 2, 1][seed % 3])
        if slots == 5:
            cluster = cluster.replace(speed_of_rank=SPEEDS, distance_RR=distances(seed) if seed % 2 else None)
        problem = Problem.from_trace(trace, cluster, mode=mode, replica_rule=get_rule(rule))
        placement = problem.placement(get_solver("lpt")(problem, Budget(1.0)).slot_to_expert)
        _, _, expected = measure(problem, placement)
        found = values_of(stated(problem), trace, placement.slot_to_expert, placement.slots_of_rank)
        assert found.by_name == pytest.approx(expected, rel=1e-9), (seed, slots)


def test_values_of_loads_agree() -> None:
    """Loads alone: an expert's load is split evenly over its slots."""
    load_LE = np.random.default_rng(3).integers(1, 90, (3, 16))
    problem = Problem.from_load(load_LE, Cluster.uniform(4, slots_per_rank=5))
    placement = problem.placement(get_solver("eplb")(problem, Budget(1.0)).slot_to_expert)
    found = values_of(stated(problem), problem.load_LE, placement.slot_to_expert, placement.slots_of_rank)
    assert found.by_name["imbalance"] == pytest.approx(measure(problem, placement)[1], rel=1e-12)


def legal_case(**options: object) -> tuple[Statement, np.ndarray, np.ndarray]:
    """(statement, (1, 6) slots, (3,) slots per rank) of four experts, two of them twice."""
    trace = skewed_trace(0, layers=1, experts=4)
    problem = Problem.from_trace(trace, Cluster.uniform(3, slots_per_rank=2), **options)
    return stated(problem), np.array([[0, 1, 2, 3, 0, 1]]), np.array([2, 2, 2])


def test_a_legal_placement_breaks_nothing() -> None:
    statement, slots_LS, slots_R = legal_case()
    assert broken_rules(statement, slots_LS, slots_R) == []


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([0, 0, 2, 3, 0, 1], "holds expert 0 twice"),
        ([0, 1, 2, -1, 0, 1], "expert 3 has no slot"),
        ([0, 1, 2, 4, 0, 1], "outside"),
        ([-2, 1, 2, 3, 0, 1], "outside"),
    ],
)
def test_broken_rows_are_told(row: list[int], says: str) -> None:
    """One sentence names the rule and the layer."""
    statement, _, slots_R = legal_case()
    (sentence,) = broken_rules(statement, np.array([row]), slots_R)
    assert says in sentence
    assert "MoE layer 0" in sentence


def test_an_expert_on_too_few_ranks_does_not_survive() -> None:
    trace = skewed_trace(0, layers=1, experts=3)
    statement = stated(Problem.from_trace(trace, Cluster.uniform(3, slots_per_rank=2), survive=1))
    slots_R = np.array([2, 2, 2])
    assert broken_rules(statement, np.array([[0, 1, 1, 2, 2, 0]]), slots_R) == []
    assert "expert 0 does not survive" in broken_rules(statement, np.array([[0, 1, 1, 2, 2, -1]]), slots_R)[0]


def test_other_slots_and_ranks_are_told() -> None:
    statement, slots_LS, _ = legal_case()
    assert "slots per rank" in broken_rules(statement, slots_LS, np.array([3, 2, 1]))[0]
    assert "ranks" in broken_rules(statement, slots_LS, np.array([3, 3]))[0]
    assert "layers" in broken_rules(statement, np.repeat(slots_LS, 2, axis=0), np.array([2, 2, 2]))[0]


def test_shared_slots_count_over_all_layers() -> None:
    """With a global budget layers may have more slots than the cluster, but no rank more than its share of all."""
    trace = skewed_trace(0, layers=2, experts=4)
    problem = Problem.from_trace(trace, Cluster.uniform(2, slots_per_rank=3), replica_budget="global")
    statement = stated(problem)
    slots_R = np.array([4, 4])
    fair = np.array([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, -1, -1, 2, 3, -1, -1]])
    greedy = np.array([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, -1, 2, 3, -1, -1]])
    assert broken_rules(statement, fair, slots_R) == []
    assert "more experts over all layers" in broken_rules(statement, greedy, slots_R)[0]


def test_caps_at_the_limit_and_beyond() -> None:
    problem = Problem.from_trace(skewed_trace(0, layers=2, experts=4), Cluster.uniform(2, slots_per_rank=2))
    statement = stated(problem, caps_L=np.array([1.1, 1.2]))
    assert broken_caps(statement, np.array([1.1, 1.2])) == []
    (sentence,) = broken_caps(statement, np.array([1.1, 1.20001]))
    assert "MoE layer 1" in sentence


@pytest.mark.parametrize("key", ["mode", "cluster", "shape", "calibration", "experts_per_layer"])
def test_a_statement_without_a_key_is_refused(key: str) -> None:
    problem = Problem.from_trace(skewed_trace(0, layers=2, experts=4), Cluster.uniform(2, slots_per_rank=2))
    document = state(problem, objective="traffic", caps_L=None)
    del document[key]
    with pytest.raises(FormatError, match=key):
        Statement.from_document(document)


@pytest.mark.parametrize("found", [-3.0, 0.0, 1e-4, 20.0])
def test_claims_hold_up_to_rounding(found: float) -> None:
    """Other machines round otherwise: a share of the value, next to nothing where it is 0; a bound may be lower."""
    little = AGREEMENT * max(abs(found), 1e-9)
    for stated, same, at_most in ((0.5, True, True), (-0.5, True, True), (1.5, False, False), (-1.5, False, True)):
        assert _same("x", found + stated * little, found).holds is same
        assert _at_most("x", found + stated * little, found).holds is at_most
