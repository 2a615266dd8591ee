"""Several recordings of one model are one trace, and several counts of loads one."""

import json
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.cli import main
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.loads import load_load
from tests.seeds import TODAY


def record(path: Path, ids_TLK: np.ndarray, sequence_T: np.ndarray) -> Path:
    np.savez(path, experts=ids_TLK, sequence_ids=sequence_T)
    return path


@pytest.mark.parametrize("seed", [0, TODAY])
def test_tokens_follow_each_other_and_sequences_stay_apart(seed: int, tmp_path: Path) -> None:
    """In the order of the files; sequences that have one id in two files are two, on the sides that they had."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    files, ids, sequences = [], [], []
    for number in range(3):
        tokens = int(rng.integers(5, 40))
        ids.append(np.argsort(rng.random((tokens, 2, 7 - number)), axis=2)[..., :2])  # the last file shows fewest
        sequences.append(np.sort(rng.integers(0, 6, tokens)))
        files.append(str(record(tmp_path / f"{number}.npz", ids[-1], sequences[-1])))
    assert main(["import", *files, "--from", "npz", "--out", str(tmp_path / "t.trace")]) == 0
    trace = load_trace(tmp_path / "t.trace")
    assert np.array_equal(trace.topk_ids, np.concatenate(ids))
    assert trace.experts_per_layer.tolist() == [
        max(part[:, layer].max() + 1 for part in ids) for layer in range(2)
    ] or (trace.experts_per_layer.tolist() == [max(part.max() + 1 for part in ids)] * 2)
    owner = np.repeat(np.arange(3), [len(part) for part in ids])
    pairs = {*zip(owner.tolist(), np.concatenate(sequences).tolist(), strict=True)}
    triples = {*zip(owner.tolist(), np.concatenate(sequences).tolist(), trace.sequence_ids.tolist(), strict=True)}
    assert len(triples) == len(pairs) == len(np.unique(trace.sequence_ids))
    assert all(ours % 2 == own % 2 for _, own, ours in triples)
    assert {path.name for path in tmp_path.iterdir()} == {"0.npz", "1.npz", "2.npz", "t.trace"}


def test_sizes_of_the_model_are_those_of_all_recordings(tmp_path: Path) -> None:
    """Also where recordings show different numbers of experts."""
    rng = np.random.default_rng(0)
    files = []
    for experts in (8, 6, 5):
        ids = np.argsort(rng.random((40, 2, experts)), axis=2)[..., :2]
        files.append(str(record(tmp_path / f"{experts}.npz", ids, np.arange(40) // 4)))
    out = tmp_path / "t.trace"
    assert main(["import", *files, "--from", "npz", "--expert-bytes", "100", "--kv-dim", "7", "--out", str(out)]) == 0
    trace = load_trace(out)
    assert trace.experts_per_layer.tolist() == [8, 8]
    assert trace.expert_bytes.tolist() == [[100] * 8] * 2
    assert trace.kv_dim == 7


def test_files_that_say_their_experts_must_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Traces of ours have a fixed number."""
    rng = np.random.default_rng(0)
    files = []
    for experts in (8, 6):
        ids = np.argsort(rng.random((40, 2, experts)), axis=2)[..., :2]
        source = str(record(tmp_path / f"{experts}.npz", ids, np.arange(40) // 4))
        files.append(str(tmp_path / f"{experts}.trace"))
        assert main(["import", source, "--from", "npz", "--num-experts", str(experts), "--out", files[-1]]) == 0
    both = ["import", *files, "--from", "npz", "--out", str(tmp_path / "t.trace")]
    assert main(both) == 1
    assert "traces with 6 and with 8 experts per layer are not of one model" in capsys.readouterr().err
    assert not (tmp_path / "t.trace").exists()


def test_loads_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where one count shows fewer experts."""
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3], [4, 5, 6]]))
    np.save(tmp_path / "b.npy", np.array([[10, 0], [0, 10]]))
    files = [str(tmp_path / name) for name in ("a.npy", "b.npy")]
    assert main(["import", *files, "--from", "load", "--out", str(tmp_path / "l.npz")]) == 0
    assert load_load(tmp_path / "l.npz").load.tolist() == [[11, 2, 3], [4, 15, 6]]
    assert "2 layers x 3 experts" in capsys.readouterr().out


def test_what_is_no_recording_of_one_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence that names the file; no file is written."""
    rng = np.random.default_rng(0)

    def random_ids(layers: int, top_k: int, experts: int = 8) -> np.ndarray:
        return np.argsort(rng.random((16, layers, experts)), axis=2)[..., :top_k]

    record(tmp_path / "a.npz", random_ids(2, 2), np.arange(16) // 4)
    record(tmp_path / "layers.npz", random_ids(3, 2), np.arange(16) // 4)
    record(tmp_path / "top.npz", random_ids(2, 1), np.arange(16) // 4)
    record(tmp_path / "few.npz", random_ids(2, 2, experts=4), np.arange(16) // 4)
    out = tmp_path / "t.trace"
    for other, words, sentence in (
        ("layers.npz", [], "layers.npz has other MoE layers (3) than"),
        ("top.npz", [], "top.npz has other top-k (1) than"),
        ("few.npz", ["--null-experts", "1"], "give --num-experts"),
        ("absent.npz", [], "absent.npz"),
    ):
        files = [str(tmp_path / "a.npz"), str(tmp_path / other)]
        assert main(["import", *files, "--from", "npz", "--out", str(out), *words]) == 1
        *warnings, said = capsys.readouterr().err.strip().splitlines()
        assert sentence in said
        assert all("warning: " in line for line in warnings)
        assert {path.suffix for path in tmp_path.iterdir()} == {".npz"}
    assert main(["import", str(tmp_path / "a.npz"), str(tmp_path / "few.npz"), "--from", "npz", "--out", "no/t"]) == 1
    assert "the folder no does not exist" in capsys.readouterr().err


def test_loads_and_tokens_are_not_one_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some formats have both."""
    np.save(tmp_path / "counts.npy", np.array([[1, 2, 3], [4, 5, 6]]))
    tokens = [[[0, 1], [1, 2]]] * 8
    (tmp_path / "tokens.jsonl").write_text(json.dumps({"routed_experts": tokens, "prompt_tokens": 8}) + "\n")
    files = [str(tmp_path / name) for name in ("counts.npy", "tokens.jsonl")]
    for order in (files, files[::-1]):
        assert main(["import", *order, "--from", "vllm", "--out", str(tmp_path / "t.trace")]) == 1
        assert f"{files[0]} holds loads and {files[1]} tokens" in capsys.readouterr().err


def test_loads_of_layers_with_unlike_numbers_of_experts(tmp_path: Path) -> None:
    """Each layer keeps its own number."""
    counts = [{"0": [1, 2, 3], "1": [4, 5]}, {"0": [10, 0, 0], "1": [0, 10]}]
    files = [str(tmp_path / f"{number}.json") for number in range(2)]
    for path, count in zip(files, counts, strict=True):
        Path(path).write_text(json.dumps(count))
    words = ["--from", "load", "--num-experts", "3,2", "--out", str(tmp_path / "l.npz")]
    assert main(["import", *files, *words]) == 0
    stats = load_load(tmp_path / "l.npz")
    assert stats.load.tolist() == [[11, 2, 3], [4, 15, 0]]
    assert stats.experts_per_layer is not None
    assert stats.experts_per_layer.tolist() == [3, 2]


@pytest.mark.parametrize("own", [False, True])
def test_layers_at_other_places_are_another_model(
    own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the files are traces of ours, which say their layers, or counts that do."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((12, 3, 4)), axis=2)[..., :2]
    files = []
    for first in (0, 1):
        name = str(tmp_path / f"{first}.trace")
        source = str(record(tmp_path / f"{first}.npz", ids, np.arange(12) // 3))
        words = ["--from", "npz", "--num-experts", "4", "--layer-ids", f"{first}-{first + 2}", "--out", name]
        assert main(["import", source, *words]) == 0
        if not own:
            name = str(tmp_path / f"{first}.json")
            Path(name).write_text(json.dumps({str(layer): [1, 2, 3, 4] for layer in range(first, first + 3)}))
        files.append(name)
    capsys.readouterr()
    out = tmp_path / "joined"
    assert main(["import", *files, "--from", "npz" if own else "load", "--out", str(out)]) == 1
    said = f"{files[1]} has other decoder layers (1-3) than {files[0]} (0-2)"
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_null_experts_of_recordings_that_show_the_same(tmp_path: Path) -> None:
    """Ids behind the real experts stay what they are."""
    ids = np.tile(np.array([[[0, 4], [3, 1]]]), (8, 1, 1))
    files = [str(record(tmp_path / f"{number}.npz", ids, np.arange(8) // 2)) for number in range(2)]
    words = ["--from", "npz", "--null-experts", "1", "--num-experts", "4", "--out", str(tmp_path / "t.trace")]
    assert main(["import", *files, *words]) == 0
    trace = load_trace(tmp_path / "t.trace")
    assert trace.topk_ids.tolist() == np.concatenate([ids, ids]).tolist()
    assert (trace.null_experts, trace.experts_per_layer.tolist()) == (1, [4, 4])
