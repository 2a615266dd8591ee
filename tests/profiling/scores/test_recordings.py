"""Counts of many recordings, added up, against the scores of the joined trace."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.profiling.errors import InputError
from moeplace.profiling.scores.recordings import RecordingCounts, count_file, summarize_recordings
from moeplace.profiling.scores.summary import summarize
from moeplace.profiling.traces.file import save_trace
from moeplace.profiling.traces.stats import RoutingStats
from moeplace.profiling.traces.trace import RoutingTrace, concatenate
from tests.profiling.builders import random_ids
from tests.seeds import FIXED_AND_TODAY

SEED = 5
EXACT = ("load", "coactivation")
OF_THE_WHOLE = ("bits", "bits_by_boundary", "tokens")


def recording(rng: np.random.Generator, *, tags: bool = True) -> RoutingTrace:
    """Sequences of different lengths of a model with ragged layers and null experts; some choices are none."""
    experts_L, null, tokens = np.array([6, 4, 5]), 2, int(rng.integers(1, 80))
    ids = np.stack([random_ids(rng, tokens, 1, int(e) + null, 2)[:, 0] for e in experts_L], axis=1)
    ids[rng.random((tokens, 3)) < 0.2, -1] = -1
    sequence_ids = np.sort(rng.integers(0, 9, tokens)) * 7 - 20
    more: dict[str, Any] = {}
    if tags:
        names = tuple(rng.permutation(["code", "chat", "maths"]).tolist())
        more = {"workload": rng.integers(0, 3, tokens), "workload_names": names, "is_decode": rng.random(tokens) < 0.4}
        more |= {"adapter": rng.integers(-1, 3, tokens), "adapter_names": names}
    return RoutingTrace(ids, experts_L, sequence_ids=sequence_ids, null_experts=null, notes=("odd",), **more)


def merged(parts: list[RoutingTrace], order: np.ndarray) -> RecordingCounts:
    """Counts of the parts, as they happen to come."""
    counts = [RecordingCounts.of(parts[n], name=f"r{n}", number=int(n), seed=SEED) for n in order]
    whole = counts[0]
    for other in counts[1:]:
        whole = whole.merge(other)
    return whole


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize("tags", [True, False])
def test_recordings_score_as_their_joined_trace(seed: int, tags: bool) -> None:
    """Whatever they are cut into and in whatever order their counts come."""
    rng = np.random.default_rng([seed, 1])
    for _ in range(5):
        parts = [recording(rng, tags=tags) for _ in range(int(rng.integers(1, 5)))]
        counts = merged(parts, rng.permutation(len(parts)))
        joined = concatenate(parts)
        assert counts.stats.equals(RoutingStats.from_trace(joined))
        found, whole = summarize_recordings(counts, seed=SEED), summarize(joined, seed=SEED, locality=False)
        for name in EXACT:
            assert found[name] == whole[name]
        for name in OF_THE_WHOLE:
            assert found["affinity"][name] == whole["affinity"][name]
        for name in ("train_test", "prefill_decode", "workloads"):
            assert found["stability"].get(name) == pytest.approx(whole["stability"].get(name), abs=1e-12)
        assert found["trace"] == whole["trace"]
        assert [each["name"] for each in found["recordings"]] == [f"r{n}" for n in range(len(parts))]
        assert sum(each["sequences"] for each in found["recordings"]) == whole["trace"]["sequences"]
        by_recording = np.repeat(np.arange(len(parts)), [part.num_tokens for part in parts])
        assert_windows(found["stability"]["windows"], joined, by_recording)


def assert_windows(windows: dict[str, Any], joined: RoutingTrace, window_T: np.ndarray) -> None:
    """Distances of loads between recordings, by their definition."""
    loads = [RoutingStats.from_trace(joined.select(window_T == n)).load for n in range(int(window_T.max()) + 1)]

    def distance(a_LE: np.ndarray, b_LE: np.ndarray) -> float:
        layers = []
        for a, b in zip(a_LE, b_LE, strict=True):
            if not a.sum() or not b.sum():
                layers.append(float(bool(a.sum()) != bool(b.sum())))
            else:
                layers.append(sum(abs(x / a.sum() - y / b.sum()) for x, y in zip(a, b, strict=True)) / 2)
        return sum(layers) / len(layers)

    assert windows["load_tv_from_all"] == pytest.approx([distance(load, sum(loads)) for load in loads])
    assert windows["load_tv_from_previous"] == pytest.approx([distance(b, a) for a, b in pairwise(loads)])


def test_sides_without_a_token_have_no_distance() -> None:
    """All sequences on one side of the split, all tokens of a prompt, one token on a side."""
    rng = np.random.default_rng(6)
    parts = [recording(rng).replace(sequence_ids=None, is_decode=None) for _ in range(2)]
    for odd, decoded in ((0, 0), (1, 1)):
        tagged = []
        for part in parts:
            first_T = np.arange(part.num_tokens) == 0
            tags = {"sequence_ids": np.where(first_T, odd, 2), "is_decode": first_T & bool(decoded)}
            tagged.append(part.replace(**tags))
        found = summarize_recordings(merged(tagged, np.array([1, 0])), seed=SEED)["stability"]
        whole = summarize(concatenate(tagged), seed=SEED, locality=False)["stability"]
        for name in ("train_test", "prefill_decode"):
            assert found.get(name) == pytest.approx(whole.get(name), abs=1e-12)
        assert (found["train_test"]["load_tv"] is None) == (odd == 0)
        assert ("prefill_decode" in found) == (decoded == 1)


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_one_recording_scores_as_its_trace(seed: int) -> None:
    """Shuffles and halves too: they are drawn alike."""
    trace = recording(np.random.default_rng([seed, 2]))
    found = summarize_recordings(RecordingCounts.of(trace, name="r", seed=SEED), seed=SEED)
    whole = summarize(trace, seed=SEED, locality=False)
    for name in found["affinity"]:
        assert found["affinity"][name] == pytest.approx(whole["affinity"][name], abs=1e-12)
    assert found["stability"]["random_halves"] == pytest.approx(whole["stability"]["random_halves"], abs=1e-12)


def test_shuffles_of_recordings_are_independent() -> None:
    """Two recordings of equal length are not shuffled alike, and the seed decides."""
    trace = recording(np.random.default_rng(3))
    tables = [RecordingCounts.of(trace, name="r", number=n, seed=s).shuffled for n, s in ((0, 0), (1, 0), (0, 1))]
    assert not np.array_equal(tables[0], tables[1])
    assert not np.array_equal(tables[0], tables[2])
    assert [table.sum() for table in tables] == [tables[0].sum()] * 3


def test_what_one_recording_does_not_tell_is_left_out() -> None:
    """Phases, workloads and sequences, where only some of the recordings know them."""
    rng = np.random.default_rng(4)
    known, unknown = recording(rng), recording(rng, tags=False)
    document = summarize_recordings(merged([known, unknown], np.array([1, 0])), seed=SEED)
    assert not {"prefill_decode", "workloads"} & set(document["stability"])
    assert document["trace"]["decode_tokens"] is None
    without = RoutingTrace(known.topk_ids, known.experts_per_layer, null_experts=2)
    document = summarize_recordings(merged([known, without], np.array([0, 1])), seed=SEED)
    assert "train_test" not in document["stability"]
    assert document["trace"]["sequences"] is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_recordings_of_two_models(tmp_path: Path, order: tuple[int, int]) -> None:
    """Refused, with both names and what is unlike, whichever comes first."""
    ids = np.zeros((4, 2, 1), np.int16)
    for name, layers in (("a", [1, 2]), ("b", [1, 3])):
        save_trace(tmp_path / name, RoutingTrace(ids, np.full(2, 4), layer_ids=np.array(layers), num_hidden_layers=4))
    first, second = (count_file(0, (n, "ab"[n], str(tmp_path / "ab"[n]))) for n in order)
    with pytest.raises(InputError, match=r"b has other decoder layers \(\[1, 3\]\) than a \(\[1, 2\]\)"):
        first.merge(second)
