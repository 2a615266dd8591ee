"""Importers against sources whose contents are worked out by hand."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.profiling.errors import FormatError, InputError, MoeplaceWarning
from moeplace.profiling.imports.canonical import Imported, ImportOptions, canonical_rows
from moeplace.profiling.imports.sources import import_from
from moeplace.profiling.traces.file import load_trace, save_trace
from moeplace.profiling.traces.loads import load_load
from moeplace.profiling.traces.trace import RoutingTrace
from tests.profiling import sources
from tests.shared_data import deepseek_trace_path

pytestmark = pytest.mark.filterwarnings("ignore::moeplace.profiling.errors.MoeplaceWarning")


def read(name: str, folder: Path, **options: Any) -> Imported:
    """Import the named small source."""
    source_format, write = sources.SOURCES[name]
    return import_from(source_format, write(folder), folder / "out", ImportOptions(**options))


@given(st.integers(0, 999), st.booleans())
def test_canonical_rows_are_a_stable_sort(seed: int, weighted: bool) -> None:
    """Rows equal a stable argsort by (no expert, -weight); without weights only -1 moves."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, 5, (3, 2, 5))
    weights = rng.integers(0, 3, ids.shape) / 2 if weighted else None
    got_ids, got_weights = canonical_rows(ids, weights)
    key = np.where(ids < 0, 9.0, -weights if weights is not None else 0.0)
    order = np.argsort(key, axis=2, kind="stable")
    assert np.array_equal(got_ids, np.take_along_axis(ids, order, 2))
    if weights is not None:
        assert got_weights is not None
        assert np.array_equal(got_weights[got_ids >= 0], np.take_along_axis(weights, order, 2)[got_ids >= 0])


@pytest.mark.parametrize("name", ["interchange", "interchange_stored"])
def test_interchange(name: str, tmp_path: Path) -> None:
    """All arrays arrive; tasks become workloads with names; options become metadata."""
    options = {"layer_ids": (1, 2), "num_hidden_layers": 5, "model": "m", "expert_bytes": 7, "hidden_size": 9}
    result = read(name, tmp_path, workload_names=("a", "b"), **options)
    trace, given_arrays = load_trace(tmp_path / "out"), np.load(tmp_path / "trace.npz")
    assert (result.kind, result.num_tokens, result.num_experts, result.top_k) == ("trace", 40, 4, 2)
    assert np.array_equal(trace.topk_ids, given_arrays["experts"])
    assert np.array_equal(trace.topk_weights, given_arrays["weights"])
    assert np.array_equal(trace.sequence_ids, given_arrays["sequence_ids"])
    assert np.array_equal(trace.workload, given_arrays["task"])
    assert trace.workload_names == ("a", "b")
    assert (trace.num_hidden_layers, trace.model, trace.hidden_size) == (5, "m", 9)
    assert trace.expert_bytes is not None
    assert (trace.expert_bytes == 7).all()


def test_interchange_degraded(tmp_path: Path) -> None:
    """Unsorted weights are sorted, sequences made up with a warning, an odd expert count announced."""
    np.savez(tmp_path / "t.npz", experts=np.full((200, 1, 2), [0, 12]), weights=np.full((200, 1, 2), [0.2, 0.8]))
    with pytest.warns(MoeplaceWarning) as caught:
        import_from("npz", tmp_path / "t.npz", tmp_path / "out", ImportOptions())
    trace = load_trace(tmp_path / "out")
    assert [str(w.message) for w in caught] == list(trace.notes)
    assert "pseudo-sequences of 128" in trace.notes[0]
    assert "13 experts" in trace.notes[1]
    assert trace.topk_ids[0, 0].tolist() == [12, 0]
    assert np.bincount(trace.sequence_ids).tolist() == [128, 72]


def test_top_k_keeps_the_greatest_weight(tmp_path: Path) -> None:
    """--top-k 1 cuts after sorting."""
    np.savez(tmp_path / "t.npz", experts=np.full((3, 1, 2), [0, 7]), weights=np.full((3, 1, 2), [0.2, 0.8]))
    import_from("npz", tmp_path / "t.npz", tmp_path / "out", ImportOptions(top_k=1))
    assert load_trace(tmp_path / "out").topk_ids.ravel().tolist() == [7, 7, 7]


def test_hashed_sequence_ids_are_renumbered(tmp_path: Path) -> None:
    """64-bit ids keep their grouping, in order of appearance."""
    ids = np.array([2**60, 2**60, 5, 2**61, 5])
    np.savez(tmp_path / "t.npz", experts=np.zeros((5, 1, 1), int), sequence_ids=ids)
    import_from("npz", tmp_path / "t.npz", tmp_path / "out", ImportOptions(num_experts=2))
    sequence_ids = load_trace(tmp_path / "out").sequence_ids
    assert sequence_ids is not None
    assert sequence_ids.tolist() == [0, 0, 1, 2, 1]


def test_real_trace(tmp_path: Path) -> None:
    """The recorded DeepSeek-V2-Lite trace arrives unchanged, with its four tasks as workloads."""
    path = deepseek_trace_path()
    import_from("npz", path, tmp_path / "out", ImportOptions(layer_ids=tuple(range(1, 27))))
    trace = load_trace(tmp_path / "out")
    assert np.array_equal(trace.topk_ids, np.load(path)["experts"])
    assert trace.workload_names == ("0", "1", "2", "3")
    assert (trace.num_tokens, trace.num_experts, trace.num_hidden_layers) == (33279, 64, 27)


def test_sglang_counts(tmp_path: Path) -> None:
    """stat: sum over the ring buffer; per_pass: slots to experts by the map; the dense layer is left out."""
    assert read("sglang_stat", tmp_path).kind == "load"
    stat = load_load(tmp_path / "out")
    assert stat.load.tolist() == [[8, 6, 4, 2], [2, 4, 6, 8]]
    assert stat.layer_ids is not None
    assert (stat.layer_ids.tolist(), stat.num_hidden_layers) == ([1, 2], 3)
    read("sglang_per_pass", tmp_path)
    # layer 1: slots [0,3,1,2,1,0] with 1..6: expert 0 1+6, 1 3+5, 2 4, 3 2; twice
    assert load_load(tmp_path / "out").load.tolist() == [[14, 16, 8, 4], [2 * (4 + 2), 12, 2 * (5 + 1), 6]]


def test_sglang_tokens(tmp_path: Path) -> None:
    """per_token: prefilled sequences are linked, decode passes are not; ids are logical, columns cut to K."""
    read("sglang_per_token", tmp_path)
    trace = load_trace(tmp_path / "out")
    assert trace.topk_ids.shape == (7, 2, 2)
    assert trace.topk_ids[:2].tolist() == [[[0, 3], [3, 0]], [[1, 2], [1, 2]]]  # slots 0,1|3,4 and 2,3|0,1
    assert trace.sequence_ids is not None
    assert trace.positions is not None
    assert trace.is_decode is not None
    assert trace.workload is not None
    assert trace.sequence_ids.tolist() == [1, 1, 1, 2, 2, 3, 3]
    assert trace.workload_names == ("sequences", "pseudo-sequences")
    assert trace.workload.tolist() == [0] * 5 + [1] * 2
    assert trace.positions.tolist() == [0, 1, 2, 0, 1, 3, 2]
    assert trace.is_decode.tolist() == [False] * 5 + [True] * 2
    assert trace.layer_ids is not None
    assert trace.layer_ids.tolist() == [1, 2]


def test_sglang_ranks_that_saw_the_same_tokens_count_once(tmp_path: Path) -> None:
    """A folder with the same records of two ranks gives the trace of one; another map is refused."""
    import torch

    path = sources.sglang_per_token(tmp_path)
    folder = tmp_path / "dumps"
    folder.mkdir()
    for rank in range(2):
        (folder / f"expert_distribution_recorder_{rank}.pt").write_bytes(path.read_bytes())
    import_from("sglang", folder, tmp_path / "out", ImportOptions())
    assert load_trace(tmp_path / "out").num_tokens == 7
    document = torch.load(path, weights_only=True)
    document["last_physical_to_logical_map"] = document["last_physical_to_logical_map"].flip(1).contiguous()
    torch.save(document, folder / "expert_distribution_recorder_2.pt")
    with pytest.raises(FormatError, match="experts were re-placed"):
        import_from("sglang", folder, tmp_path / "out", ImportOptions())


@pytest.mark.parametrize("name", ["requests_sglang", "requests_vllm"])
def test_requests(name: str, tmp_path: Path) -> None:
    """One array per request, dense layer dropped, decode marked after the prompt."""
    read(name, tmp_path)
    trace = load_trace(tmp_path / "out")
    expected = [[[0, 1], [2, 1]], [[3, 0], [1, 2]]]
    assert trace.topk_ids[:2].tolist() == expected
    assert trace.layer_ids is not None
    assert trace.layer_ids.tolist() == [1, 2]
    if name == "requests_sglang":
        assert trace.sequence_ids is not None
        assert trace.is_decode is not None
        assert trace.sequence_ids.tolist() == [0, 0, 1, 1]
        assert trace.is_decode.tolist() == [False, True] * 2


def test_vllm_loads_add_the_slots_of_an_expert(tmp_path: Path) -> None:
    """Two records of the same loads; layers are ordinals unless the user names them."""
    read("loads_vllm", tmp_path, layer_ids=(1, 2))
    stats = load_load(tmp_path / "out")
    # layer 0: slots [0,3,1,2,1,0] with 10,1,5,2,1,1: expert 0 11, 1 6, 2 2, 3 1
    assert stats.load.tolist() == [[22, 12, 4, 2], [2 * (1 + 0), 4, 2 * (8 + 0), 6]]
    assert stats.layer_ids is not None
    assert (stats.layer_ids.tolist(), stats.model) == ([1, 2], "toy")


def test_trtllm(tmp_path: Path) -> None:
    """Counts are summed over ranks and iterations; raw ids make a trace, a pseudo-sequence per iteration and rank."""
    read("trtllm_counts", tmp_path)
    assert load_load(tmp_path / "out").load.tolist() == [[4, 8, 0, 6]] * 2
    read("trtllm_raw", tmp_path)
    trace = load_trace(tmp_path / "out")
    assert trace.topk_ids.tolist()[:2] == [[[0, 1], [0, 1]], [[2, 1], [2, 0]]]
    assert trace.sequence_ids is not None
    assert trace.sequence_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_trtllm_inconsistent_folders(tmp_path: Path) -> None:
    """A gap in the key grid, and raw ids that disagree with the counts, are refused."""
    from safetensors.numpy import load_file, save_file

    folder = sources.trtllm_raw(tmp_path)
    counts = load_file(folder / "rank0.safetensors")
    save_file({k: v + 1 for k, v in counts.items()}, folder / "rank0.safetensors")
    with pytest.raises(FormatError, match="raw ids and counts disagree"):
        import_from("trtllm", folder, tmp_path / "out", ImportOptions())
    folder = sources.trtllm_counts(tmp_path)
    save_file({k: v for k, v in counts.items() if k != "101_2"}, folder / "rank1.safetensors")
    with pytest.raises(FormatError, match="rank 1 lacks 1"):
        import_from("trtllm", folder, tmp_path / "out", ImportOptions())


def test_exflow_and_its_trap(tmp_path: Path) -> None:
    """A top-1 trace; arrays sorted in blocks are announced as artefacts."""
    read("exflow", tmp_path)
    trace = load_trace(tmp_path / "out")
    assert np.array_equal(trace.topk_ids[:, :, 0], np.load(tmp_path / "trace.npy"))
    assert not any("artefact" in note for note in trace.notes)
    blocks = np.sort(np.random.default_rng(0).integers(0, 4, (5, 200, 2)), axis=1).reshape(1000, 2)
    np.save(tmp_path / "sorted.npy", blocks)
    with pytest.warns(MoeplaceWarning, match="piecewise sorted"):
        import_from("exflow", tmp_path / "sorted.npy", tmp_path / "out", ImportOptions())


def test_load_matrices(tmp_path: Path) -> None:
    """Zero rows are dense layers; steps are summed; fractions keep their proportions."""
    read("matrix_npy", tmp_path)
    stats = load_load(tmp_path / "out")
    assert stats.load.tolist() == [[4, 3, 2, 1], [1, 2, 3, 4]]
    assert stats.layer_ids is not None
    assert stats.layer_ids.tolist() == [1, 2]
    np.save(tmp_path / "steps.npy", np.ones((5, 2, 4)))
    import_from("load", tmp_path / "steps.npy", tmp_path / "out", ImportOptions())
    assert load_load(tmp_path / "out").load.tolist() == [[5] * 4] * 2
    (tmp_path / "f.json").write_text(json.dumps({"load": [[0.25, 0.75], [0.5, 0.5]]}))
    import_from("load", tmp_path / "f.json", tmp_path / "out", ImportOptions())
    assert load_load(tmp_path / "out").load.tolist() == [[250000, 750000], [500000, 500000]]


def test_summary_says_what_loads_cannot_do(tmp_path: Path) -> None:
    """An import of mere loads tells that locality needs tokens."""
    assert "only the balance of expert load can be optimised" in read("matrix_json", tmp_path).summary()
    assert "40 tokens x 2 layers x 4 experts, top-2" in read("interchange", tmp_path).summary()


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"load": np.ones((2, 2))}, {}, "no array `experts`; a load matrix is read with --from load"),
        ({"experts": np.zeros((2, 2))}, {}, r"must be integers of shape \(tokens, layers, top-k\)"),
        ({"experts": np.full((2, 1, 1), -2)}, {}, "expert id -2 must be at least -1"),
        ({"experts": np.full((2, 1, 1), -1)}, {}, "all ids are -1"),
        ({"experts": np.full((2, 1, 1), 2**40)}, {}, "must be below"),
        ({"experts": np.full((2, 1, 1), 5)}, {"num_experts": 4}, r"expert id 5 .* must lie in 0..3"),
        ({"experts": np.full((2, 1, 2), 1)}, {}, "no layer has different experts for a token"),
        ({"experts": np.zeros((2, 1, 1), int)}, {"top_k": 2}, r"top-k \(2\) must lie in 1..1"),
        ({"experts": np.zeros((2, 1, 1), int)}, {"layer_ids": (1, 2)}, "layer-ids name 2 layers"),
        ({"experts": np.zeros((2, 1, 1), int)}, {"workload_names": ("a",)}, "no array `workload`"),
        ({"experts": np.zeros((2, 1, 1), int), "sequence_ids": np.zeros(3, int)}, {}, "sequence_ids must be integers"),
        ({"experts": np.zeros((2, 1, 1), int), "weights": np.full((2, 1, 1), np.nan)}, {}, "NaN"),
        ({"experts": np.zeros((2, 1, 1), int), "task": np.array([0, -1])}, {}, "workload index -1"),
    ],
)
def test_sources_that_break_a_rule(
    arrays: dict[str, np.ndarray], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """One sentence with the value and the rule; nothing is written."""
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(InputError, match=message):
        import_from("npz", tmp_path / "t.npz", tmp_path / "out", ImportOptions(**options))
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """Object arrays and archives with foreign classes are refused by name."""
    import torch

    np.savez(tmp_path / "o.npz", experts=np.array([{}], dtype=object))
    with pytest.raises(FormatError, match="Python objects"):
        import_from("npz", tmp_path / "o.npz", tmp_path / "out", ImportOptions())
    torch.save({"logical_count": Path("x")}, tmp_path / "p.pt")
    with pytest.raises(FormatError, match=r"never loaded|does not need"):
        import_from("sglang", tmp_path / "p.pt", tmp_path / "out", ImportOptions())


def test_warnings_are_ours_only(tmp_path: Path) -> None:
    """A clean source warns about nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("interchange", "sglang_stat", "sglang_per_token", "trtllm_raw", "matrix_json"):
            read(name, tmp_path)


def test_own_trace_keeps_its_metadata(tmp_path: Path) -> None:
    """A trace of ours is read back whole, cut to --top-k; options it has an answer for already are refused."""
    trace = RoutingTrace(
        np.array([[[1, 0], [2, 1]]] * 4), np.array([3, 4]), sequence_ids=np.arange(4), layer_ids=np.array([1, 3]),
        num_hidden_layers=6, hidden_size=32, model="tiny",
    )  # fmt: skip
    save_trace(tmp_path / "a.trace", trace)
    import_from("npz", tmp_path / "a.trace", tmp_path / "b.trace", ImportOptions(top_k=1))
    assert load_trace(tmp_path / "b.trace").equals(trace.truncate(1))
    with pytest.raises(InputError, match="only --top-k"):
        import_from("npz", tmp_path / "a.trace", tmp_path / "c.trace", ImportOptions(model="other"))
    assert not (tmp_path / "c.trace").exists()
