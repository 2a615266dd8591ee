"""Drift: how often it cries wolf, how often it sees the wolf, and what few sequences can tell."""

import numpy as np
import pytest

from moeplace.profiling.errors import InputError
from moeplace.profiling.scores.drift import DECIDING, measure_drift
from moeplace.profiling.traces.trace import RoutingTrace
from tests.seeds import TODAY

PAIRS = 200


def conversations(
    rng: np.random.Generator,
    sequences: int,
    *,
    experts: int = 16,
    tokens: int = 24,
    layers: int = 2,
    shift: float = 0.0,
) -> RoutingTrace:
    """Sequences that each keep to a topic; `shift` of them to topics of another kind.

    Topics prefer a quarter of the experts each, so that tokens of a sequence resemble each other.
    """
    layers = 2
    topics = np.random.default_rng(7).permuted(np.tile(np.arange(experts), (16, layers, 1)), axis=2)
    topic_Q = rng.integers(0, 8, sequences) + 8 * (rng.random(sequences) < shift)
    sequence_T = np.repeat(np.arange(sequences), tokens)
    pick_TL = (rng.random((len(sequence_T), layers)) ** 2 * experts).astype(int)
    ids = topics[topic_Q[sequence_T][:, None], np.arange(layers), pick_TL]
    return RoutingTrace(ids[:, :, None], np.full(layers, experts), sequence_ids=sequence_T)


def alarms(pairs: int, seed: int, *, shift: float, sequences: tuple[int, int], splits: int = 80, **sizes: int) -> int:
    """Pairs that are called drifted."""
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(pairs):
        before = conversations(rng, sequences[0], **sizes)
        after = conversations(rng, sequences[1], shift=shift, **sizes)
        found += measure_drift(before, after, seed=int(rng.integers(2**31)), splits=splits).is_significant
    return found


@pytest.mark.parametrize("seed", [0, TODAY])
def test_one_distribution_is_called_drifted_in_one_of_twenty_pairs_at_most(seed: int) -> None:
    """200 pairs of different sizes: 5 % is 10; more than 20 would come by chance once in 500 times."""
    assert alarms(PAIRS, seed, shift=0.0, sequences=(24, 16)) <= 20


@pytest.mark.parametrize(("experts", "tokens"), [(64, 128), (256, 128)])
def test_sparse_tables_do_not_look_drifted(experts: int, tokens: int) -> None:
    """Transitions of E x E entries with fewer tokens than entries: two samples of one distribution agree."""
    assert alarms(20, 3, shift=0.0, sequences=(32, 32), experts=experts, tokens=tokens, splits=60) <= 4


def test_known_drifts_are_seen() -> None:
    """A tenth to all of the sequences on other topics: power rises to certainty, and is pinned."""
    seen = [alarms(40, 5, shift=shift, sequences=(48, 48), splits=80) for shift in (0.1, 0.35, 0.65, 1.0)]
    print("seen of 40:", seen)
    assert seen == sorted(seen)
    assert seen[3] == 40
    assert seen[2] >= 36


def test_one_sequence_tells_nothing() -> None:
    """Two halves of one sequence, either way round, and one sequence beside three: not significant, and said so."""
    whole = conversations(np.random.default_rng(1), 1, tokens=2000)
    halves = whole.select(slice(0, 1000)), whole.select(slice(1000, None))
    for before, after in (halves, halves[::-1], (conversations(np.random.default_rng(2), 3), halves[0])):
        drift = measure_drift(before, after, seed=0, splits=100)
        assert not drift.is_significant
        assert "too few to tell" in drift.notes[0]
    assert not measure_drift(*(conversations(np.random.default_rng(n), 8) for n in (1, 2)), seed=0).notes


def test_the_threshold_is_what_a_fortieth_of_the_splits_exceeds() -> None:
    """Significant by p-value and beyond the threshold are the same but at the very edge."""
    rng = np.random.default_rng(11)
    for shift in (0.0, 0.2, 0.5):
        drift = measure_drift(conversations(rng, 30), conversations(rng, 30, shift=shift), seed=1, splits=199)
        for name in DECIDING:
            if abs(drift.distance[name] / drift.threshold[name] - 1) > 0.02:
                assert (drift.distance[name] > drift.threshold[name]) == (drift.p_value[name] <= 0.025)


@pytest.mark.parametrize("seed", [0, 1, TODAY])
def test_distances_are_those_of_whole_tables(seed: int) -> None:
    """Unequal layers, tokens without experts, top-k, one layer: the oracle fills whole tables, pair by pair."""
    rng = np.random.default_rng(seed)
    for layers in (1, 3):
        experts_L = rng.integers(2, 9, layers)
        traces, top_k = [], int(rng.integers(1, 3))
        for _ in range(2):
            tokens = int(rng.integers(20, 60))
            ids = np.stack([np.argsort(rng.random((tokens, n)), axis=1)[:, :top_k] for n in experts_L], axis=1)
            ids[rng.random(tokens) < 0.2] = -1
            ids[:, int(rng.integers(layers)), 0][rng.random(tokens) < 0.1] = -1
            ids = np.where(ids[:, :, :1] < 0, -1, ids)
            traces.append(RoutingTrace(ids, experts_L, sequence_ids=np.arange(tokens) // 5))
        found = measure_drift(*traces, seed=1, splits=5).distance
        load: list[float] = []
        transitions: list[float] = []
        for layer, count in enumerate(experts_L):
            shares = [np.bincount(t.topk_ids[:, layer][t.topk_ids[:, layer] >= 0], minlength=count) for t in traces]
            load.append(0.5 * np.abs(shares[0] / shares[0].sum() - shares[1] / shares[1].sum()).sum())
        for layer in range(layers - 1):
            tables = []
            for trace in traces:
                table = np.zeros((experts_L[layer], experts_L[layer + 1]))
                for first, second in trace.topk_ids[:, layer : layer + 2, 0]:
                    if min(first, second) >= 0:
                        table[first, second] += 1
                tables.append(table / table.sum())
            transitions.append(0.5 * np.abs(tables[0] - tables[1]).sum())
        assert found["load_tv"] == pytest.approx(np.mean(load))
        assert found["transitions_tv"] == pytest.approx(np.mean(transitions) if transitions else 0.0)


def test_recordings_of_other_widths_are_refused() -> None:
    """Top-2 beside top-1 of the same model: one sentence, not a crash."""
    wide = RoutingTrace(np.tile([0, 1], (8, 2, 1)), np.full(2, 4))
    with pytest.raises(InputError, match="2 and 1 experts a token cannot be compared"):
        measure_drift(wide, wide.truncate(1), seed=0)
