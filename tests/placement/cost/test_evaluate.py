"""The evaluation against a reference in plain Python, and its closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.evaluation import evaluate
from moeplace.placement.cost.replica_rule import get_rule
from moeplace.placement.cost.steps import StepShape, step_of_token
from moeplace.placement.modes import MODES, Mode
from moeplace.placement.objective import measure
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.problem import Problem
from moeplace.placement.solve import solve
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from tests.placement.cost.reference import Setting, cost
from tests.placement.instances import skewed_trace
from tests.placement.random_placements import random_placement
from tests.seeds import FIXED_AND_TODAY


def figures_of(trace: RoutingTrace, placement: Placement, setting: Setting) -> dict[str, float]:
    """The reference's figures."""
    ids = [trace.layer(layer).tolist() for layer in range(trace.num_layers)]
    return cost(
        [list(rows) for rows in zip(*ids, strict=True)],
        placement.slot_to_expert.tolist(),
        placement.slots_of_rank.tolist(),
        placement.node_of_rank.tolist(),
        setting,
    )


def random_case(rng: np.random.Generator) -> tuple[RoutingTrace, Placement, Cluster, StepShape, Calibration, Setting]:
    """A small trace, placement, cluster and cost model, with what the reference needs of them."""
    nodes = [[0], [0, 0, 0], [0, 0, 1], [0, 1, 1, 2], [0, 0, 1, 1], [0, 1, 2]][rng.integers(6)]
    top_k, layers, experts = int(rng.integers(1, 5)), int(rng.integers(1, 4)), 6
    trace = skewed_trace(
        int(rng.integers(10_000)), tokens=int(rng.integers(1, 24)), layers=layers, experts=experts, top_k=top_k,
        ragged=float(rng.choice([0.0, 0.4])),
    )  # fmt: skip
    sizes = [int(x) for x in rng.integers(3, 6, len(nodes))] if len(nodes) > 1 else [experts]
    placement = random_placement(
        rng, layers=layers, experts=experts, slots_of_rank=sizes, node_of_rank=nodes,
        fill=float(rng.choice([0.0, 0.6, 1.0])),
    )  # fmt: skip
    speeds = [1.0] * len(nodes) if rng.random() < 0.5 else (0.5 + rng.random(len(nodes))).tolist()
    intra, inter = (float(rng.uniform(0, 1e-4)), float(rng.uniform(1e8, 1e10))), (3e-5, float(rng.uniform(1e8, 1e10)))
    shared = float(rng.choice([np.inf, 1.5 * inter[1]]))
    expert = tuple(rng.uniform(0, 1e-5, 3).tolist())
    mode, rule = MODES[rng.integers(3)], ["moeplace", "hash", "nearest-static"][rng.integers(3)]
    batch = int(rng.choice([1, 2, 5, 256]))
    cluster = Cluster(np.array(nodes), np.array(sizes), np.array(speeds))
    calibration = Calibration(Link(*intra), Link(*inter, shared), ExpertTime(*expert), 2e-6)
    setting = Setting(
        mode, batch, 2 * 64, 2 * 24, speeds, intra, inter, shared, expert, overhead=2e-6, rule=rule  # type: ignore[arg-type]
    )  # fmt: skip
    return trace, placement, cluster, StepShape(batch, 64, 2, 24), calibration, setting


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_agrees_with_the_reference(seed: int) -> None:
    """Every figure equals the token-by-token reference: replicas and rules, ragged top-k, nodes, speeds, modes."""
    rng = np.random.default_rng(seed)
    for number in range(60):
        trace, placement, cluster, shape, calibration, setting = random_case(rng)
        mode: Mode = setting.mode  # type: ignore[assignment]
        rule = get_rule(setting.rule)
        result = evaluate(
            trace, placement, mode=mode, cluster=cluster, shape=shape, calibration=calibration, rule=rule
        ).summary()
        for name, value in figures_of(trace, placement, setting).items():
            assert result[name] == pytest.approx(value, rel=1e-9, abs=1e-12), f"case {number}: {name}, {setting}"


def test_top1_coherent_copies_are_one_minus_stay_rate():
    """With one expert a token, a copy crosses exactly where the token does not stay."""
    trace = skewed_trace(3, tokens=200, layers=5, experts=8, top_k=1)
    placement = index_order(np.full(5, 8), np.full(4, 2), np.zeros(4, int), mode="coherent")
    result = evaluate(trace, placement)
    assert result.copies_per_token == pytest.approx(1 - result.stay_rate)
    assert result.collectives_per_layer == 1.0


def test_uniform_routing_meets_the_closed_form():
    """Random k-sets in index order: d = R (1 - C(E - C, K) / C(E, K)), stay = 1/R."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((4000, 3, 16)), axis=2)[:, :, :4]
    trace = RoutingTrace(ids, np.full(3, 16))
    result = evaluate(trace, index_order(np.full(3, 16), np.full(4, 4), np.zeros(4, int)))
    expected = 4 * (1 - (12 * 11 * 10 * 9) / (16 * 15 * 14 * 13))
    assert result.ranks_per_token == pytest.approx(expected, abs=0.02)
    assert result.stay_rate == pytest.approx(0.25, abs=0.02)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), mode=st.sampled_from(MODES))
def test_order_of_experts_and_tokens_does_not_matter(seed, mode):
    """Renaming experts in trace and placement, or doubling the trace, changes no mean."""
    trace = skewed_trace(seed, tokens=20, layers=2, experts=6, top_k=2)
    rng = np.random.default_rng(seed)
    placement = random_placement(rng, layers=2, experts=6, slots_of_rank=[3, 3], fill=0.0)
    names = rng.permutation(6)
    renamed = trace.replace(topk_ids=names[trace.topk_ids])
    moved = placement.replace(
        slot_to_expert=np.where(placement.slot_to_expert < 0, -1, names[placement.slot_to_expert])
    )
    doubled = trace.replace(topk_ids=np.concatenate([trace.topk_ids] * 2))
    first = evaluate(trace, placement, mode=mode).summary()
    for other in (evaluate(renamed, moved, mode=mode), evaluate(doubled, placement, mode=mode)):
        for name in ("ranks_per_token", "copies_per_token", "stay_rate", "imbalance_mean"):
            assert other.summary()[name] == pytest.approx(first[name])


def test_steps_are_lanes_of_consecutive_tokens():
    """11 tokens in 3 lanes: lane i reads tokens 3i, 3i+1, 3i+2; two tokens fill no step."""
    assert step_of_token(11, 3).tolist() == [0, 1, 2] * 3 + [-1, -1]
    assert step_of_token(2, 256).tolist() == [0, 0]


def test_slower_links_cost_more_and_one_rank_costs_no_exchange():
    """Prediction grows with latency and falls with bandwidth; one rank has no collectives."""
    trace = skewed_trace(1, tokens=100, layers=2, experts=4, top_k=2)
    placement = index_order(np.full(2, 4), np.full(2, 2), np.zeros(2, int))
    fast = Cluster.uniform(2, slots_per_rank=2, intra=Link(1e-6, 1e12))
    slow = fast.replace(intra=Link(1e-3, 1e6))
    assert (
        evaluate(trace, placement, cluster=slow).predicted_seconds
        > evaluate(trace, placement, cluster=fast).predicted_seconds
    )
    alone = evaluate(trace, index_order(np.full(2, 4), np.array([4]), np.zeros(1, int)))
    assert (alone.collectives_per_layer, alone.copies_per_token, alone.ranks_per_token) == (0.0, 0.0, 1.0)


def test_refuses_another_model():
    """A placement for other layers or experts is refused by name."""
    trace = skewed_trace(1, experts=4)
    with pytest.raises(InputError, match="another model: experts_per_layer"):
        evaluate(trace, index_order(np.full(2, 6), np.full(2, 3), np.zeros(2, int)))


@pytest.mark.parametrize("mode", MODES)
def test_null_experts_cost_nothing_anywhere(mode: Mode) -> None:
    """A token's null expert is as good as none: evaluation, problem and solver see the same."""
    rng = np.random.default_rng(5)
    ids_TLK = np.argsort(rng.random((200, 3, 6)), axis=2)[:, :, :2]  # ids 4 and 5 are null
    with_null = RoutingTrace(ids_TLK, np.full(3, 4), null_experts=2)
    without = RoutingTrace(np.where(ids_TLK < 4, ids_TLK, -1), np.full(3, 4))
    cluster = Cluster.uniform(2, slots_per_rank=2)
    placement = index_order(with_null.experts_per_layer, cluster.slots_of_rank, cluster.node_of_rank)
    first, second = (evaluate(trace, placement, mode=mode) for trace in (with_null, without))
    assert first.summary() == second.summary()
    problems = [Problem.from_trace(trace, cluster, mode=mode) for trace in (with_null, without)]
    assert np.array_equal(problems[0].load_LE, problems[1].load_LE)
    assert np.array_equal(problems[0].transitions_LEE, problems[1].transitions_LEE)
    found = solve(problems[0], time_limit=0.5).placement
    assert measure(problems[0], found)[1:] == measure(problems[1], found)[1:]
