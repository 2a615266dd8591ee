"""Synthetic traces have the structure that they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.profiling.errors import InputError
from moeplace.profiling.scores.affinity import affinity, load_skew, primary_experts
from moeplace.profiling.synthetic.traces import (
    drifting,
    identity_path,
    like,
    lognormal_shares,
    markov,
    planted,
    zipf_shares,
)
from moeplace.profiling.synthetic.workloads import NAMES, make_workload
from moeplace.profiling.traces.stats import RoutingStats
from moeplace.profiling.traces.trace import RoutingTrace
from tests.shared_data import deepseek_trace_path


@given(st.sampled_from(NAMES), st.integers(0, 99), st.integers(1, 3))
@settings(max_examples=40)
def test_workloads_meet_their_load_exactly(name: str, seed: int, top_k: int) -> None:
    """Counted load equals the expected one, in all and in every window."""
    workload = make_workload(name, num_tokens=240, num_layers=2, num_experts=16, top_k=top_k, num_ranks=4, seed=seed)
    trace = workload.trace
    assert np.array_equal(RoutingStats.from_trace(trace).load, workload.expected_load)
    for window, expected in enumerate(workload.window_loads):
        part = trace.select(trace.sequence_ids == window)
        assert np.array_equal(RoutingStats.from_trace(part).load, expected)


def test_workloads_are_what_they_are_called() -> None:
    """Loads by rank (experts in index order) of each workload."""
    ranks = {}
    for name in NAMES:
        made = make_workload(name, num_tokens=800, num_layers=1, num_experts=16, top_k=2, num_ranks=4, seed=0)
        ranks[name] = made.window_loads[:, 0].reshape(-1, 4, 4).sum(2)
    assert ranks["W0"].tolist() == [[400] * 4]
    assert ranks["W2"][0].tolist() == [268, 268, 264, 800]  # largest remainders go to the first experts
    assert np.abs(ranks["W3"] - 400).max() <= 2  # whole tokens: 66.67 per cold expert
    assert ranks["W4"].sum(1).tolist() == [160, 320, 480, 640]
    assert ranks["W5"][0, 0] == 0
    assert ranks["W6"].argmax(1).tolist() == [0, 1, 2, 3]
    assert ranks["W7"][1, 0] == 80
    with pytest.raises(InputError, match="lower top-k"):
        make_workload("W2", num_tokens=10, num_layers=1, num_experts=4, top_k=4, num_ranks=4, seed=0)
    with pytest.raises(InputError, match="'W9' is not one of"):
        make_workload("W9", num_tokens=10, num_layers=1, num_experts=4, top_k=1, num_ranks=4, seed=0)


def test_planted_partition_without_noise_is_perfect() -> None:
    """At epsilon 0 every token stays in one block everywhere; with noise some do not."""
    trace, block_LE = planted(num_tokens=300, num_layers=3, num_experts=12, top_k=2, num_ranks=3, epsilon=0.0, seed=0)
    blocks = block_LE[np.arange(3)[None, :, None], trace.topk_ids]
    assert (blocks == blocks[:, :1, :1]).all()
    assert (np.bincount(block_LE[0]) == 4).all()
    noisy, block_LE = planted(num_tokens=300, num_layers=3, num_experts=12, top_k=2, num_ranks=3, epsilon=0.5, seed=0)
    blocks = block_LE[np.arange(3)[None, :, None], noisy.topk_ids]
    assert 0.3 < (blocks == blocks[:, :1, :1]).mean() < 0.9


def test_identity_path_is_a_relabelling() -> None:
    """Every transition table is a permutation matrix times counts."""
    trace = identity_path(num_tokens=500, num_layers=3, num_experts=6, top_k=2, seed=0)
    for table in RoutingStats.from_trace(trace).transitions:
        assert ((table > 0).sum(0) == 1).all()
        assert ((table > 0).sum(1) == 1).all()


def test_chain_and_shares() -> None:
    """Skew grows with the exponent; the chain's affinity with its stickiness; equal seeds give equal traces."""
    rng = np.random.default_rng(0)
    flat, steep = (zipf_shares(3, 16, exponent=x, rng=rng) for x in (0.0, 1.2))
    assert np.allclose(flat, 1 / 16)
    assert np.allclose(lognormal_shares(2, 8, sigma=1.0, rng=rng).sum(1), 1)
    traces = [markov(steep, num_tokens=3000, top_k=2, stickiness=s, seed=1) for s in (0.0, 0.4, 0.8)]
    stats = RoutingStats.from_trace(traces[0])
    assert load_skew(stats.load, stats.experts_per_layer).mean() > 2
    bits = [affinity(primary_experts(t), 16, seed=0).excess_bits for t in traces]
    assert bits[0] < 0.05 < bits[1] < bits[2]
    assert traces[1].equals(markov(steep, num_tokens=3000, top_k=2, stickiness=0.4, seed=1))
    moving = drifting(num_tokens=2560, num_layers=2, num_experts=8, top_k=2, stickiness=0.5, seed=0)
    assert moving.num_tokens == 2560


def test_enlarged_trace_resembles_its_source() -> None:
    """DeepSeek-V2-Lite at 128 experts, top-8: skew kept, and affinity in proportion to the entropy."""
    ids = np.load(deepseek_trace_path())
    source = RoutingTrace(ids["experts"], np.full(26, 64), sequence_ids=ids["sequence_ids"])
    large = like(source, num_layers=30, num_experts=128, top_k=8, num_tokens=8000, seed=0)
    assert large.topk_ids.shape == (8000, 30, 8)
    skews = [load_skew(s.load, s.experts_per_layer).mean() for s in map(RoutingStats.from_trace, (source, large))]
    assert skews[1] == pytest.approx(skews[0], rel=0.15)
    bits = [affinity(primary_experts(t), t.num_experts, seed=0).excess_bits for t in (source, large)]
    assert bits[0] < bits[1] + 0.3
    assert large.equals(like(source, num_layers=30, num_experts=128, top_k=8, num_tokens=8000, seed=0))


@given(st.integers(0, 99), st.integers(1, 9))
@settings(max_examples=25)
def test_enlarged_trace_is_valid(seed: int, top_k: int) -> None:
    """Any small trace with ragged rows can be enlarged: ids stay different inside a row (the trace checks it)."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((20, 2, 4)), axis=2)[:, :, :2]
    ids[rng.random((20, 2)) < 0.3, 1] = -1
    source = RoutingTrace(ids, np.array([4, 4]), sequence_ids=np.arange(20) // 7)
    large = like(source, num_layers=3, num_experts=12, top_k=top_k, num_tokens=30, seed=seed)
    assert large.topk_ids.shape == (30, 3, top_k)
    assert large.topk_ids.max() < 12
    with pytest.raises(InputError, match="multiple of the trace's 4"):
        like(source, num_layers=3, num_experts=10, top_k=1, num_tokens=30, seed=0)
