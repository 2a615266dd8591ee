"""Replay of recorded routing: what the runtime counts equals what is counted without running it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.cluster import Cluster, Link
from moeplace.placement.cost.calibration import Calibration, ExpertTime
from moeplace.placement.cost.replica_rule import OWN_RULES
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement, index_order
from moeplace.profiling.errors import InputError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.kv.stream import KvStream
from moeplace.runtime.measure.calibration import fit_expert_time, fit_line
from moeplace.runtime.measure.replay import RecordedSteps, Replay, ReplayShape, ReplayTensors
from moeplace.runtime.measure.traffic import WireSizes, count_traffic, even_homes, predict_seconds
from tests.rank_pool import RankContext, RankPool
from tests.runtime.placements import random_placement

FORMS: tuple[tuple[Mode, bool], ...] = (
    ("dispatch-combine", False),
    ("dispatch-combine", True),
    ("coherent", False),
    ("allgather", False),
)
SIZES = WireSizes(row=100, hidden=10, kv_row=3)
SHAPE = ReplayShape(batch=22, hidden=16, expert_hidden=8, kv_dim=6, dtype=torch.float64)


def two_nodes() -> Placement:
    """Four experts on four ranks of two nodes, one layer."""
    return index_order(np.array([4]), np.ones(4, int), np.array([0, 0, 1, 1]))


def one_step(*ids: list[int]) -> np.ndarray:
    """One step of one layer, a token per entry."""
    return np.array(ids)[None, None]


def random_steps(top_k: int, *, steps: int = 3, layers: int = 4, experts: int = 8) -> RecordedSteps:
    """Seeded routing, some experts absent."""
    rng = np.random.default_rng(top_k)
    ids = np.argsort(rng.random((steps, layers, SHAPE.batch, experts)), axis=3)[..., :top_k]
    ids[rng.random(ids.shape) < 0.1] = -1
    return RecordedSteps(ids, experts)


def test_direct_dispatch_by_hand() -> None:
    """One token a rank; an empty message is one row, and only real copies come back."""
    traffic = count_traffic(one_step([1], [1], [0], [3]), two_nodes(), "dispatch-combine", SIZES)
    there, back = (exchange.bytes_SLRR[0, 0] for exchange in traffic.exchanges)
    np.testing.assert_array_equal(there, 100 * (1 - np.eye(4)))
    expected = np.zeros((4, 4))
    expected[1, 0] = expected[0, 2] = 10  # tokens of ranks 0 and 2 were elsewhere
    np.testing.assert_array_equal(back, expected)
    np.testing.assert_array_equal(traffic.tokens_SLR[0, 0], [1, 2, 0, 1])
    np.testing.assert_array_equal(traffic.activated_SLR[0, 0], [1, 1, 0, 1])


def test_node_aware_sends_one_copy_per_node() -> None:
    """Experts on both ranks of the other node: one copy to the lower rank, which forwards it."""
    step = one_step([2, 3], [2, 3], [2, 3], [2, 3])
    direct, aware = (
        count_traffic(step, two_nodes(), "dispatch-combine", SIZES, node_aware=aware) for aware in (False, True)
    )
    across_RR = direct.exchanges[1].bytes_SLRR[0, 0]
    assert across_RR[2:, :2].sum() == 4 * SIZES.hidden
    there, own, own_back, foreign, foreign_back, back = (exchange.bytes_SLRR[0, 0] for exchange in aware.exchanges)
    assert back[2:, :2].sum() == 2 * SIZES.hidden
    assert back[2, 0] == back[2, 1] == SIZES.hidden
    assert own[2, 3] == SIZES.row
    assert own_back[3, 2] == SIZES.hidden
    assert foreign[2, 3] == 2 * SIZES.row  # two tokens of the other node came through rank 2
    assert foreign_back[3, 2] == 2 * SIZES.hidden
    assert there[0, 2] == SIZES.row
    assert own[:2, 2:].sum() == foreign[:2, 2:].sum() == 0


def test_coherent_tokens_stay_where_their_expert_ran() -> None:
    """Two equal layers: all tokens move in the first one, none in the second."""
    placement = index_order(np.array([4, 4]), np.ones(4, int), np.array([0, 0, 1, 1]))
    ids = np.repeat(one_step([3], [2], [1], [0]), 2, axis=1)
    traffic = count_traffic(ids, placement, "coherent", SIZES)
    assert len(traffic.exchanges) == 1
    assert traffic.collectives_per_layer() == 1
    empty = SIZES.row * (1 - np.eye(4))
    for layer in range(2):
        np.testing.assert_array_equal(traffic.exchanges[0].bytes_SLRR[0, layer], empty)
    # Rank i attends one token in layer 0 and one in layer 1: two rows go to its partner, and there to the mate.
    across, inside = (hop[0] for hop in traffic.kv_hops)
    assert across[0, 2] == across[1, 3] == across[2, 0] == across[3, 1] == 2 * SIZES.kv_row
    assert inside[0, 1] == 4 * SIZES.kv_row


def test_prediction_by_hand() -> None:
    """Latency, the busiest direction between nodes, expert time and the rest of a layer add up."""
    cluster = Cluster(np.array([0, 0, 1, 1]), np.ones(4, int), np.ones(4))
    calibration = Calibration(
        Link(0.5, 1e30), Link(2.0, 1e3, 1e3), ExpertTime(1.0, 3.0, 7.0), mode_seconds_per_layer={"coherent": 11.0}
    )
    step = one_step([0], [1], [0], [1])  # ranks 2 and 3 send their tokens to ranks 0 and 1
    traffic = count_traffic(step, two_nodes(), "coherent", SIZES, kv_pieces=0)
    bytes_across = 4 * SIZES.row  # two messages of each rank of a node, each of one row
    expected = 2.0 + bytes_across / 1e3 + (1.0 + 2 * 3.0 + 7.0) + 11.0
    assert predict_seconds(traffic, cluster, calibration)[0] == pytest.approx(expected)


def test_kv_in_pieces_fill_idle_links() -> None:
    """In one piece K/V add their transfer; in two they add only what the busiest direction needs beyond the layers."""
    cluster = Cluster(np.array([0, 0, 1, 1]), np.ones(4, int), np.ones(4))
    calibration = Calibration(Link(0.0, 1e30), Link(0.0, 1e3, 1e3), ExpertTime(0.0, 0.0, 0.0))
    step = one_step([0], [1], [2], [3])
    whole, halves = (
        predict_seconds(count_traffic(step, two_nodes(), "coherent", SIZES, kv_pieces=n), cluster, calibration)[0]
        for n in (1, 2)
    )
    assert whole == pytest.approx(halves)  # links are never idle here
    idle = Calibration(calibration.intra, calibration.inter, ExpertTime(1.0, 0.0, 0.0))
    whole, halves = (
        predict_seconds(count_traffic(step, two_nodes(), "coherent", SIZES, kv_pieces=n), cluster, idle)[0]
        for n in (1, 2)
    )
    assert whole - halves == pytest.approx(2 * SIZES.kv_row / 1e3)
    measured = replace(idle, kv_exposed=0.75)
    pieces = count_traffic(step, two_nodes(), "coherent", SIZES, kv_pieces=2)
    assert predict_seconds(pieces, cluster, measured)[0] - halves == pytest.approx(0.75 * 2 * SIZES.kv_row / 1e3)


def test_steps_of_a_trace_read_lanes_in_order() -> None:
    """Seven tokens in two lanes of three: steps hold tokens (0, 3), (1, 4), (2, 5)."""
    trace = RoutingTrace(np.arange(7)[:, None, None], np.array([7]))
    steps = RecordedSteps.from_trace(trace, 2)
    np.testing.assert_array_equal(steps.ids_SLBK[:, 0, :, 0], [[0, 3], [1, 4], [2, 5]])
    with pytest.raises(InputError, match="takes 8 tokens"):
        RecordedSteps.from_trace(trace, 8)


def test_homes_are_even() -> None:
    """Five tokens on three ranks: 2, 2, 1."""
    assert even_homes(5, 3) == (2, 2, 1)


def test_fits_recover_exact_lines() -> None:
    """Times that follow the model exactly give its terms back; no term is negative."""
    amounts = [1e3, 1e4, 1e5]
    fixed, slope = fit_line(amounts, [1e-3 + 2e-8 * n for n in amounts])
    assert (fixed, slope) == (pytest.approx(1e-3), pytest.approx(2e-8))
    assert fit_line([1, 2, 3], [3e-3, 2e-3, 1e-3])[1] == 0
    tokens, activated = [4, 16, 64, 64], [1, 8, 2, 16]
    seconds = [1e-4 + 2e-6 * n + 5e-5 * a for n, a in zip(tokens, activated, strict=True)]
    time = fit_expert_time(tokens, activated, seconds)
    assert (time.fixed, time.per_token, time.per_activated) == tuple(pytest.approx(v) for v in (1e-4, 2e-6, 5e-5))


def run_replays(
    context: RankContext, steps: RecordedSteps, nodes: int, seed: int, rule: str
) -> list[tuple[dict[str, int], float, np.ndarray, np.ndarray]]:
    """Per form: bytes by tier, collectives per layer, outputs of a step, checksums of K/V."""
    placement = random_placement(
        steps.num_layers, steps.num_experts, context.size, seed=seed, extra_slots=seed % 2, nodes=nodes
    )
    group = context.group(placement.node_of_rank)
    tensors = ReplayTensors.random(SHAPE, steps.num_experts, seed=0, device=group.device)
    results = []
    for mode, node_aware in FORMS:
        run = Replay(
            steps, placement, mode, shape=SHAPE, tensors=tensors, group=group, node_aware=node_aware, replica_rule=rule
        )
        outputs = run.outputs(0).numpy()
        group.counters.reset()
        run.step(1)
        run.drain()
        counted = group.counters.snapshot()
        results.append(
            (counted["bytes_sent"], counted["collectives_per_layer"], outputs, run.cache.double().sum(2).numpy())
        )
    return results


@pytest.mark.parametrize("rule", OWN_RULES)
@pytest.mark.parametrize(("top_k", "size", "nodes"), [(1, 4, 2), (3, 4, 2), (2, 2, 1)])
def test_counters_equal_counted_traffic(pool: RankPool, top_k: int, size: int, nodes: int, rule: str) -> None:
    """Every byte and collective of a second step is predicted, and all modes have the same outputs and K/V."""
    steps = random_steps(top_k)
    results: list[Any] = pool.run(run_replays, steps, nodes, top_k, rule, size=size)
    placement = random_placement(
        steps.num_layers, steps.num_experts, size, seed=top_k, extra_slots=top_k % 2, nodes=nodes
    )
    node = placement.node_of_rank
    names = 2 * SHAPE.batch * 8 // size  # the chosen tokens' ids go to every other rank
    for form, (mode, node_aware) in enumerate(FORMS):
        first, both = (
            count_traffic(
                steps.ids_SLBK[:count], placement, mode, SHAPE.wire_sizes(top_k),
                node_aware=node_aware, kv_pieces=2, replica_rule=rule,
            )
            for count in (1, 2)
        )  # fmt: skip
        expected_RR = 2 * both.bytes_RR() - first.bytes_RR() + (names if mode == "coherent" else 0) * (1 - np.eye(size))
        for rank, result in enumerate(results):
            counted, collectives, outputs, kv_sums = result[form]
            same = node == node[rank]
            others = np.arange(size) != rank
            assert counted["inter_node"] == expected_RR[rank, ~same].sum(), (mode, node_aware)
            assert counted["intra_node"] == expected_RR[rank, same & others].sum(), (mode, node_aware)
            issued = 2 * both.collectives_per_layer() - first.collectives_per_layer()
            assert collectives == issued or mode == "dispatch-combine"
            np.testing.assert_allclose(outputs, results[0][0][2], rtol=1e-5, atol=1e-5)
            if mode == "coherent":
                np.testing.assert_array_equal(kv_sums, results[0][form][3])


def overlap_steps(context: RankContext) -> str:
    """Runs coherent steps with as many pieces as layers; too many pieces are refused."""
    steps = random_steps(1)
    placement = random_placement(steps.num_layers, steps.num_experts, context.size, seed=1, nodes=2)
    group = context.group(placement.node_of_rank)
    tensors = ReplayTensors.random(SHAPE, steps.num_experts, seed=0, device=group.device)
    run = Replay(steps, placement, "coherent", shape=SHAPE, tensors=tensors, group=group, kv_pieces=99)
    assert run.kv_pieces == steps.num_layers
    assert len(run.time_steps(0, 3)) == 3
    try:
        KvStream(group, range(2), num_layers=2, pieces=3, keep=lambda step, shared: None)
    except InputError as error:
        return str(error)
    return ""


def test_a_piece_per_layer(pool: RankPool) -> None:
    """K/V may travel layer by layer; there cannot be more pieces than layers."""
    assert all("must lie in 1..2" in message for message in pool.run(overlap_steps, size=2))


def test_what_is_done_beside_an_exchange_does_not_count_twice() -> None:
    """Own tokens are served while copies travel: what is hidden is no more than either of both takes."""
    step = one_step([2, 3], [2, 3], [2, 3], [2, 3])
    traffic = count_traffic(step, two_nodes(), "dispatch-combine", SIZES, node_aware=True)
    assert traffic.beside_SLR is not None
    np.testing.assert_array_equal(traffic.beside_SLR[0, 0], [0, 0, 2, 2])  # of the tokens of ranks 2 and 3
    np.testing.assert_array_equal(traffic.tokens_SLR[0, 0], [0, 0, 4, 4])
    apart = replace(traffic, beside_SLR=None)
    for rate, hidden in ((1e30, 0.0), (1e-3, 2.0)):  # half of four seconds of experts, behind links without end
        calibration = Calibration(Link(0.0, 1e30), Link(0.0, rate, rate), ExpertTime(0.0, 1.0, 0.0))
        cluster = Cluster(np.array([0, 0, 1, 1]), np.ones(4, int), np.ones(4))
        both = [predict_seconds(each, cluster, calibration)[0] for each in (apart, traffic)]
        assert both[0] - both[1] == pytest.approx(hidden, abs=1e-6 * both[0] + 1e-9)
