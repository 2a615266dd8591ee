"""Scores against slow references that follow the definitions word by word."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.profiling.scores.affinity import (
    affinity,
    grouped_loads,
    grouped_transition_distance,
    jensen_shannon,
    load_entropy,
    load_skew,
    mutual_information,
    primary_experts,
    total_variation,
)
from moeplace.profiling.scores.drift import measure_drift
from moeplace.profiling.scores.kernels import segment_histogram
from moeplace.profiling.scores.locality import best_f1, segment_cache, segment_routing
from moeplace.profiling.synthetic.traces import markov, zipf_shares
from moeplace.profiling.traces.sampling import SequenceSample, sample_sequences
from moeplace.profiling.traces.trace import RoutingTrace
from tests.profiling.builders import random_ids
from tests.shared_data import deepseek_trace_path


def random_trace(seed: int, *, layers: int = 2, experts: int = 5, top_k: int = 2) -> RoutingTrace:
    """Interleaved sequences of different lengths, some tokens with fewer experts."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(1, 40))
    ids = random_ids(rng, tokens, layers, experts, top_k)
    ids[rng.random((tokens, layers)) < 0.2, -1] = -1
    return RoutingTrace(ids, np.full(layers, experts), sequence_ids=rng.integers(0, 4, tokens))


def sequences_of(trace: RoutingTrace, layer: int) -> list[list[list[int]]]:
    """Experts of every token of every sequence, in one layer."""
    assert trace.sequence_ids is not None
    rows = trace.topk_ids[:, layer].tolist()
    return [
        [[e for e in rows[t] if e >= 0] for t in np.flatnonzero(trace.sequence_ids == s)]
        for s in sorted(set(trace.sequence_ids.tolist()))
    ]


def srp_by_definition(counts: list[int], length: int) -> float:
    """max over tau of F1 = 2M / (P + A) from the uses per segment."""
    best = 0.0
    for tau in range(1, length + 1):
        above = [c for c in counts if c >= tau]
        denominator = length * len(above) + sum(counts)
        best = max(best, 2 * sum(above) / denominator if denominator else 0.0)
    return best


@given(st.integers(0, 9999), st.sampled_from([1, 2, 3, 5]))
@settings(max_examples=60)
def test_srp_equals_its_definition(seed: int, length: int) -> None:
    """Per expert, per layer and for the model; segments lie inside a sequence."""
    trace = random_trace(seed)
    score = segment_routing(sample_sequences(trace, most_tokens=10**6), length=length, seed=0, bootstraps=2)
    everything = []
    for layer in range(2):
        by_expert = []
        for expert in range(5):
            uses = [[expert in token for token in sequence] for sequence in sequences_of(trace, layer)]
            by_expert.append([sum(u[i : i + length]) for u in uses for i in range(len(u) - length + 1)])
            if not np.isnan(score.model):
                assert score.experts[layer, expert] == pytest.approx(srp_by_definition(by_expert[-1], length))
        everything.extend(by_expert)
        if not np.isnan(score.model):
            assert score.layers[layer] == pytest.approx(srp_by_definition(list(chain(*by_expert)), length))
    flat = list(chain(*everything))
    assert (sum(flat) == 0) == bool(np.isnan(score.model))
    if sum(flat):
        assert score.model == pytest.approx(srp_by_definition(flat, length))
        taken = [c for c in flat if c >= score.threshold]
        assert score.size_ratio == pytest.approx(length * len(taken) / sum(flat))


def cache_by_definition(sequences: list[list[list[int]]], size: int, policy: str, horizon: int) -> tuple[int, int]:
    """(hits, accesses) of one cache, replayed without any stack."""
    hits = accesses = 0
    for sequence in sequences:
        cache: set[int] = set()
        last: dict[int, int] = {}  # expert -> its last use; its keys are those seen
        uses = [(t, e) for t, token in enumerate(sequence) for e in token]
        for t, token in enumerate(sequence):
            fresh = [e for e in token if e not in last]
            hits += sum(e in cache for e in token)
            hits += sum(len(last) + number < size for number in range(len(fresh)))
            accesses += len(token)
            for e in token:
                now = uses.index((t, e))
                if e not in cache and len(cache) == size:
                    cache.remove(min(cache, key=lambda x: priority(x, policy, uses, now, t + horizon, last)))
                cache.add(e)
                last[e] = now
    return hits, accesses


def priority(
    expert: int, policy: str, uses: list[tuple[int, int]], now: int, until: int, last: dict[int, int]
) -> tuple[int, int]:
    """What a cache keeps first: `uses` are (token, expert), the present one is number `now`."""
    if policy == "lru":
        return 0, last[expert]
    if policy == "lfu":
        return sum(e == expert for _, e in uses[:now]), last[expert]
    if policy == "belady":
        return -next((i for i, (_, e) in enumerate(uses) if i >= now and e == expert), 10**6 + expert), 0
    return sum(e == expert and t < until for t, e in uses[now:]), last[expert]


@given(
    st.integers(0, 9999),
    st.sampled_from([("segment", 1), ("segment", 3), ("segment", 9), ("lru", 0), ("lfu", 0), ("belady", 0)]),
)
@settings(max_examples=80)
def test_caches_equal_a_replay(seed: int, which: tuple[str, int]) -> None:
    """The stack of one pass gives, for every size, the hits of replaying that cache alone."""
    policy, length = which
    trace = random_trace(seed, layers=1)
    score = segment_cache(
        sample_sequences(trace, most_tokens=10**6),
        policy=policy,
        length=length,
        ratios=(0.5, 1.0, 2.0),
        seed=0,
        bootstraps=2,
    )
    for column, size in enumerate((1, 2, 4)):
        hits, accesses = cache_by_definition(sequences_of(trace, 0), size, policy, length)
        assert score.layers[0, column] * accesses == pytest.approx(hits)
        assert score.model[column] * accesses == pytest.approx(hits)


def test_shared_cache_numbers_experts_through() -> None:
    """Two layers that always use expert 0: a shared cache of two slots always hits after the first token."""
    sample = SequenceSample(np.zeros((10, 2, 1), int), np.array([0]), np.array([3, 3]), True)
    score = segment_cache(sample, length=4, ratios=(1.0,), seed=0, bootstraps=2)
    assert score.model.tolist() == [1.0]
    assert score.layers.tolist() == [[1.0], [1.0]]


def test_order_of_policies_on_a_trace() -> None:
    """From 2 K slots on (a token's own experts all fit) Belady is never below, and hit rates grow with the cache."""
    trace = markov(
        zipf_shares(3, 16, exponent=1.0, rng=np.random.default_rng(0)), num_tokens=1000, top_k=2, stickiness=0.5, seed=0
    )
    sample = sample_sequences(trace, most_tokens=10**6)
    best = segment_cache(sample, policy="belady", seed=0, bootstraps=10)
    for policy, length in (("segment", 4), ("segment", 64), ("lru", 0), ("lfu", 0)):
        score = segment_cache(sample, policy=policy, length=length, seed=0, bootstraps=10)
        assert (score.layers[:, 1:] <= best.layers[:, 1:] + 1e-12).all()
        assert (np.diff(score.layers, axis=1) >= 0).all()
        assert (score.intervals[:, 0] <= score.intervals[:, 1]).all()


def test_segment_histogram_counts_segments() -> None:
    """One sequence A A B with m = 2: segments AA and AB."""
    by_expert, by_sequence = segment_histogram(np.array([[0], [0], [1]]), np.array([0]), 2, 2)
    assert by_expert.tolist() == [[0, 1, 1], [0, 1, 0]]
    assert by_sequence.tolist() == [[0, 2, 1]]
    assert best_f1(by_expert)[0].tolist() == pytest.approx([2 * 3 / (4 + 3), 2 / (2 + 1)])


def test_mutual_information_of_known_tables() -> None:
    """A permutation tells log2 E bits, independence none."""
    assert mutual_information(np.eye(8, dtype=int) * 5) == pytest.approx(3.0)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0.0, abs=1e-12)
    assert mutual_information(np.zeros((3, 3), int)) == 0.0


def test_affinity_control_removes_sample_bias() -> None:
    """Independent layers show as many bits as their shuffle; a chain shows more; the seed decides alone."""
    shares = zipf_shares(4, 16, exponent=0.5, rng=np.random.default_rng(0))
    free = affinity(primary_experts(markov(shares, num_tokens=2000, top_k=1, stickiness=0.0, seed=0)), 16, seed=0)
    chain_LT = primary_experts(markov(shares, num_tokens=2000, top_k=1, stickiness=0.7, seed=0))
    chain = affinity(chain_LT, 16, seed=0)
    assert abs(free.excess_bits) < 0.02 < 1.0 < chain.excess_bits
    assert np.array_equal(chain.control_bits, affinity(chain_LT, 16, seed=0).control_bits)


def test_affinity_of_the_real_trace() -> None:
    """DeepSeek-V2-Lite: 2.33 bits, shuffled 0.09."""
    ids = np.load(deepseek_trace_path())["experts"]
    score = affinity(primary_experts(RoutingTrace(ids, np.full(26, 64))), 64, seed=0)
    assert score.bits.mean() == pytest.approx(2.33, abs=0.005)
    assert score.control_bits.mean() == pytest.approx(0.087, abs=0.005)


def test_skew_and_entropy_of_known_loads() -> None:
    """Uniform, one expert only, a layer with fewer experts, no load."""
    load = np.array([[2, 2, 2, 2], [8, 0, 0, 0], [3, 1, 0, 0], [0, 0, 0, 0]])
    experts = np.array([4, 4, 2, 4])
    assert load_skew(load, experts).tolist() == [1.0, 4.0, 1.5, 1.0]
    assert load_entropy(load, experts)[:3] == pytest.approx([1.0, 0.0, 0.8113], abs=1e-4)


@given(st.lists(st.integers(0, 9), min_size=3, max_size=3), st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_distances_are_bounded_and_symmetric(a: list[int], b: list[int]) -> None:
    """0 for equal shares, 1 for disjoint ones, in between otherwise."""
    x, y = np.array(a), np.array(b)
    for distance in (total_variation, jensen_shannon):
        assert 0 <= distance(x, y) <= 1 + 1e-12
        assert distance(x, y) == pytest.approx(distance(y, x))
        assert distance(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert (
        total_variation(np.array([1, 0]), np.array([0, 7])) == jensen_shannon(np.array([1, 0]), np.array([0, 7])) == 1
    )


@given(st.integers(0, 999))
@settings(max_examples=30)
def test_grouped_loads_split_the_load(seed: int) -> None:
    """Every group's load is that of its tokens alone; transitions likewise."""
    trace = random_trace(seed, layers=3)
    side = np.random.default_rng(seed).random(trace.num_tokens) < 0.5
    loads = grouped_loads(trace, np.where(side, 1, -1), num_groups=2)
    expected = (trace.topk_ids[side][..., None] == np.arange(5)).any(2).sum(0)
    assert np.array_equal(loads[1], expected)
    assert not loads[0].any()
    distances = grouped_transition_distance(primary_experts(trace), side, 5)
    assert ((distances >= 0) & (distances <= 1)).all()


def test_drift_sees_a_change_and_not_noise() -> None:
    """Two samples of one chain: no drift. Another permutation of the experts: drift in load and transitions."""
    shares = zipf_shares(3, 8, exponent=0.7, rng=np.random.default_rng(0))
    whole = markov(shares, num_tokens=12_800, top_k=2, stickiness=0.5, seed=1)
    calm = measure_drift(whole.select(slice(0, 6400)), whole.select(slice(6400, None)), seed=0, splits=60)
    assert not calm.is_significant
    other = markov(shares[:, ::-1], num_tokens=6400, top_k=2, stickiness=0.5, seed=2)
    moved = measure_drift(whole.select(slice(0, 6400)), other, seed=0, splits=60)
    assert moved.is_significant
    assert moved.p_value["transitions_tv"] == pytest.approx(1 / 61)
    assert moved.distance["load_tv"] > 3 * moved.threshold["load_tv"]


def test_affinity_drift_without_load_drift_is_seen() -> None:
    """Uniform load before and after, other partners: the transitions drift."""
    shares = np.full((3, 8), 1 / 8)
    before, after = (markov(shares, num_tokens=6400, top_k=1, stickiness=0.8, seed=seed) for seed in (1, 2))
    drift = measure_drift(before, after, seed=0, splits=60)
    assert drift.distance["load_tv"] < 2 * drift.threshold["load_tv"]
    assert drift.distance["transitions_tv"] > 3 * drift.threshold["transitions_tv"]


@given(st.integers(0, 999), st.integers(1, 50))
def test_samples_are_whole_sequences_in_order(seed: int, most: int) -> None:
    """All but a first, cut sequence are whole; tokens keep their order inside a sequence."""
    trace = random_trace(seed)
    sample = sample_sequences(trace, most_tokens=most)
    assert 1 <= sample.num_tokens <= most
    assert sample.starts[0] == 0
    pieces = np.split(sample.ids, sample.starts[1:])
    assert trace.sequence_ids is not None
    whole = [trace.topk_ids[trace.sequence_ids == s] for s in sorted(set(trace.sequence_ids.tolist()))]
    for piece in pieces:
        assert any(np.array_equal(piece, w[: len(piece)]) and len(piece) in (len(w), most) for w in whole)


def test_affinity_counts_every_expert() -> None:
    """Two experts that follow each other without fail: one bit, and expert 0 is one of them; the control has none."""
    primary_LT = np.tile(np.arange(400) % 2, (2, 1))
    score = affinity(primary_LT, 2, seed=0)
    assert score.bits.tolist() == [1.0]
    assert score.control_bits[0] < 0.05
    assert score.num_tokens == 400
