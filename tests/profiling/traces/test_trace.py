"""RoutingTrace and its file: rules, views, and round trips."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.traces.file import TraceWriter, load_trace, save_trace
from moeplace.profiling.traces.loads import LoadStats, load_load, save_load
from moeplace.profiling.traces.trace import RoutingTrace, concatenate
from tests.profiling.builders import random_ids


def full_trace(seed: int = 0, tokens: int = 30) -> RoutingTrace:
    """A trace with every field set, unequal layers and a null expert."""
    rng = np.random.default_rng(seed)
    return RoutingTrace(
        random_ids(rng, tokens, 2, 4, 2).astype(np.int16),
        np.array([4, 3]),
        topk_weights=-np.sort(-rng.random((tokens, 2, 2))).astype(np.float16),
        sequence_ids=np.sort(rng.integers(0, 5, tokens)),
        positions=np.arange(tokens),
        is_decode=rng.random(tokens) < 0.5,
        workload=rng.integers(0, 2, tokens),
        workload_names=("a", "b"),
        model="m",
        layer_ids=np.array([1, 4]),
        num_hidden_layers=7,
        expert_bytes=np.array([10, 20]),
        hidden_size=8,
        null_experts=1,
        notes=("made up",),
        adapter=rng.integers(-1, 2, tokens),
        adapter_names=("x", "y"),
    )


@given(st.integers(0, 99), st.integers(1, 50))
@settings(max_examples=30)
def test_files_round_trip(seed: int, tokens: int) -> None:
    """What is saved is what is loaded, every field of it."""
    trace = full_trace(seed, tokens)
    with tempfile.TemporaryDirectory() as folder:
        save_trace(Path(folder) / "t", trace)
        assert load_trace(Path(folder) / "t").equals(trace)


def test_writer_joins_pieces_and_keeps_nothing_of_a_failure(tmp_path: Path) -> None:
    """Pieces make the same file as the whole; a bad piece leaves neither file nor temporary folder."""
    trace = full_trace()
    fields = ("topk_weights", "sequence_ids", "positions", "is_decode", "workload", "adapter")
    options = {n: getattr(trace, n) for n in ("model", "layer_ids", "num_hidden_layers", "expert_bytes", "hidden_size")}
    options |= {n: getattr(trace, n) for n in ("workload_names", "adapter_names", "null_experts", "notes")}
    with TraceWriter(tmp_path / "t", experts_per_layer=np.array([4, 3]), top_k=2, **options) as writer:
        for piece in (trace.select(slice(0, 7)), trace.select(slice(7, 30))):
            writer.append(piece.topk_ids, **{name: getattr(piece, name) for name in fields})
    assert load_trace(tmp_path / "t").equals(trace)
    for bad, message in (
        ({"topk_ids": np.array([[[9]]])}, "must lie in 0..3"),
        ({"topk_ids": np.array([[[1]]]), "sequence_ids": np.array([2**40])}, "must fit into 32 bits"),
    ):
        with (
            pytest.raises(InputError, match=message),
            TraceWriter(tmp_path / "u", experts_per_layer=np.array([4]), top_k=1) as writer,
        ):
            writer.append(**bad)
    with (
        pytest.raises(InputError, match="no token was recorded"),
        TraceWriter(tmp_path / "u", experts_per_layer=np.array([4]), top_k=1),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_ids": np.zeros((2, 2))}, "topk_ids must be integers of shape"),
        ({"topk_ids": np.zeros((2, 2, 0), int)}, "at least one layer and one expert"),
        (
            {"topk_ids": np.full((30, 2, 1), 5), "topk_weights": None},
            "expert id 5 of token 0 in MoE layer 0 must lie in 0..4",
        ),
        ({"topk_ids": np.full((30, 2, 2), 1)}, "token 0 has expert 1 twice"),
        ({"experts_per_layer": np.array([4])}, "experts_per_layer must be 2 numbers"),
        ({"experts_per_layer": np.array([4, 2**40])}, "experts_per_layer must be 2 numbers"),
        ({"layer_ids": np.array([4, 1])}, "layer_ids must be 2 rising"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers \(3\) must exceed the last MoE layer \(4\)"),
        ({"expert_bytes": np.zeros(3)}, "must broadcast"),
        ({"expert_bytes": -1}, "must not be negative"),
        ({"sequence_ids": np.zeros(3, int)}, "sequence_ids must have the shape"),
        ({"workload": np.full(30, 2)}, "workload index 2 needs 0..1"),
    ],
)
def test_rules(changes: dict[str, Any], message: str) -> None:
    """Each broken rule is one sentence with the value."""
    with pytest.raises(InputError, match=message):
        full_trace().replace(**changes)


def test_a_bad_id_is_found_in_any_thread_and_chunk() -> None:
    """In a long trace the token named is the right one."""
    ids = np.zeros((300_000, 1, 1), dtype=np.int16)
    ids[277_777] = 9
    with pytest.raises(InputError, match="of token 277777 in MoE layer 0"):
        RoutingTrace(ids, np.array([4]))


def test_views() -> None:
    """Split, hold-out, truncation, selection and layers are what their names say."""
    trace = full_trace()
    train, test = trace.split("train"), trace.split("test")
    assert train.num_tokens + test.num_tokens == trace.num_tokens
    assert (np.asarray(test.sequence_ids) % 2 == 1).all()
    rest, held = trace.hold_out("b")
    assert (np.asarray(held.workload) == 1).all()
    assert rest.num_tokens + held.num_tokens == 30
    assert trace.primary().topk_ids.shape == (30, 2, 1)
    assert (trace.layer(1) < 3).all()  # null experts become -1
    assert (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_experts) == (30, 2, 2, 4)
    for call, message in (
        (lambda: trace.truncate(3), r"top-k \(3\) must lie in 1..2"),
        (lambda: trace.hold_out("c"), "workload 'c' is not among"),
        (lambda: trace.replace(sequence_ids=None).split("test"), "has no sequence_ids"),
        (lambda: train.split("test"), "of one parity"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_concatenation_keeps_sequences_apart_and_sides_alike() -> None:
    """Sequence ids stay different between parts and keep their parity; workloads are matched by name."""
    first, second = full_trace(0), full_trace(1).replace(workload_names=("b", "c"))
    whole = concatenate([first, second])
    ids = np.asarray(whole.sequence_ids)
    assert ids[30:].min() > ids[:30].max()
    assert np.array_equal(ids % 2, np.concatenate([first.sequence_ids, second.sequence_ids]) % 2)
    assert whole.workload_names == ("a", "b", "c")
    assert np.array_equal(np.asarray(whole.workload)[30:], np.asarray(second.workload) + 1)
    with pytest.raises(InputError, match="different shapes"):
        concatenate([first, first.primary()])


def test_foreign_files_are_named(tmp_path: Path) -> None:
    """Not a file, a folder, not an npz, an npz of something else."""
    np.savez(tmp_path / "x.npz", experts=np.zeros((1, 1, 1)))
    (tmp_path / "y").write_text("hello")
    for name, error, message in (
        ("absent", InputError, "no such file"),
        ("", InputError, "is a folder"),
        ("y", FormatError, "not a readable .npz"),
        ("x.npz", FormatError, "use `moeplace import"),
    ):
        for read in (load_trace, load_load):
            with pytest.raises(error, match=message.replace(".", r"\.")):
                read(tmp_path / name)


def test_load_files(tmp_path: Path) -> None:
    """Round trip, and the rules of loads."""
    stats = LoadStats(np.array([[3, 1], [2, 0]]), np.array([2, 1]), np.array([1, 3]), 5, "m", ("n",))
    save_load(tmp_path / "l", stats)
    assert load_load(tmp_path / "l").equals(stats)
    for load, message in (
        (np.zeros((2, 2), int), "all loads are zero"),
        (np.array([[-1, 2]]), r"load \(-1\) must not be negative"),
        (np.ones((2, 2)), "must be integers"),
    ):
        with pytest.raises(InputError, match=message):
            LoadStats(load)
    with pytest.raises(InputError, match="beyond experts_per_layer has load"):
        LoadStats(np.array([[3, 1], [2, 1]]), np.array([2, 1]))
