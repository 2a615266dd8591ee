"""Tables of counts in every form that people keep them, against the numbers that were written."""

import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.profiling.errors import FormatError, InputError, MoeplaceWarning
from moeplace.profiling.imports.canonical import Imported, ImportOptions
from moeplace.profiling.imports.sources import import_from
from moeplace.profiling.traces.loads import LoadStats, load_load
from tests.seeds import TODAY

pytestmark = pytest.mark.filterwarnings("ignore::moeplace.profiling.errors.MoeplaceWarning")
SEEDS = (0, 1, 2, 3, TODAY)


def read(path: Path, source_format: str = "load", **options: Any) -> tuple[Imported, LoadStats]:
    """Import a table; the file is written beside its folder."""
    out = path.parent.parent / "out.npz"
    imported = import_from(source_format, path, out, ImportOptions(**options))
    return imported, load_load(out)


def counts(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(L, E) counts whose last expert is used, and the decoder layer of the first row."""
    layers, experts = int(rng.integers(2, 6)), int(rng.integers(5, 40))
    load_LE = rng.poisson(rng.gamma(0.5, 40, (layers, experts)))
    load_LE[:, -1] += 1
    return load_LE, int(rng.integers(0, 9))


def save_text(path: Path, lines: list[str], rng: np.random.Generator) -> Path:
    """Write lines with what editors and tools add: marks, comments, blank lines, other line ends, gzip."""
    text = list(lines)
    for _ in range(int(rng.integers(0, 4))):
        text.insert(int(rng.integers(1, len(text) + 1)), ["", "# a comment", "   "][int(rng.integers(3))])
    data = ("\r\n" if rng.random() < 0.5 else "\n").join(text)
    encoded = data.encode(["utf-8", "utf-8-sig", "utf-16"][int(rng.integers(3))])
    if rng.random() < 0.3:
        path = path.with_name(f"{path.name}.gz")
        path.write_bytes(gzip.compress(encoded))
    else:
        path.write_bytes(encoded)
    return path


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("form", ["matrix", "pairs", "cells"])
def test_delimited_text(form: str, header: bool, seed: int, tmp_path: Path) -> None:
    """A matrix, one line a token or one line a cell, in any order of columns and with any separator."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    load_LE, first = counts(rng)
    mark = [",", ";", "\t", " ", "|", ", "][int(rng.integers(6))]
    layers, experts = np.nonzero(load_LE)
    if form == "matrix":
        rows = [mark.join(map(str, row)) for row in load_LE.tolist()]
        title = mark.join(str(n) for n in range(load_LE.shape[1]))
    else:
        table = {"layer_id": layers + first, "Expert": experts, "count": load_LE[layers, experts]}
        order = list(table) if not header else [list(table)[i] for i in rng.permutation(3)]
        times = load_LE[layers, experts] if form == "pairs" else np.ones(len(layers), int)
        if form == "pairs":
            order.remove("count")
        rows = [
            mark.join(str(table[name][cell]) for name in order) for cell in np.repeat(np.arange(len(layers)), times)
        ]
        title = mark.join(order)
    folder = tmp_path / "in"
    folder.mkdir()
    path = save_text(folder / "c.csv", [title, *rows] if header else rows, rng)
    _, stats = read(path)
    assert stats.load.tolist() == load_LE.tolist()
    assert np.array_equal(stats.layer_ids, np.arange(len(load_LE)) + (0 if form == "matrix" else first))


@pytest.mark.parametrize("suffix", [".csv", ".json", ".npy", ".pt"])
@pytest.mark.parametrize("source_format", ["load", "sglang", "vllm"])
def test_ranks_of_a_folder_are_added(suffix: str, source_format: str, tmp_path: Path) -> None:
    """One file a rank; in sparse files absent cells are 0, whoever lacks the last expert."""
    import torch

    if suffix != ".csv" and (source_format == "sglang" or (source_format == "vllm" and suffix != ".json")):
        pytest.skip("the engine has files of its own with this ending")
    load_RLE = np.random.default_rng(3).poisson(0.7, (3, 2, 16))
    load_RLE[0, :, -1], load_RLE[2, 1] = 1, 0
    folder = tmp_path / "in"
    folder.mkdir()
    for rank, load_LE in enumerate(load_RLE):
        path = folder / f"expert_distribution_rank{rank}{suffix}"
        if suffix == ".csv":
            cells = [f"{layer + 3},{e},{load_LE[layer, e]}" for layer, e in np.argwhere(load_LE)]
            path.write_text("\n".join(["layer_id,expert_id,count", *cells]))
        elif suffix == ".json":
            path.write_text(json.dumps({str(i + 3): {str(e): int(row[e]) for e in np.flatnonzero(row)}
                                        for i, row in enumerate(load_LE)}))  # fmt: skip
        elif suffix == ".npy":
            np.save(path, load_LE)
        else:
            torch.save(torch.from_numpy(load_LE), path)
    _, stats = read(folder, source_format)
    assert stats.load.tolist() == load_RLE.sum(axis=0).tolist()
    assert np.array_equal(stats.layer_ids, [0, 1] if suffix in (".npy", ".pt") else [3, 4])
    with pytest.warns(MoeplaceWarning, match="counts of one rank: 2 other files"):
        read(folder / f"expert_distribution_rank0{suffix}", source_format)


_MATRIX = [[5, 0, 7, 1], [2, 9, 0, 4]]
_NESTED = {"3": {"0": 5, "2": 7, "3": 1}, "5": {"0": 2, "1": 9, "3": 4}}


@pytest.mark.parametrize(
    ("document", "layer_ids"),
    [
        (_MATRIX, (0, 1)),
        ([_MATRIX, [[0] * 4, [0] * 4]], (0, 1)),
        ({"activation_freq": _MATRIX, "top_k": 2}, (0, 1)),
        ({"anything": _MATRIX, "name": "x"}, (0, 1)),
        ({"load_history": [{"logical_expert_load": [[5, 0, 3, 0], [2, 4, 0, 4]]},
                           {"logical_expert_load": [[0, 0, 4, 1], [0, 5, 0, 0]]}]}, (0, 1)),
        ([{"step": 1, "expert_load": [[5, 0, 3, 0], [2, 4, 0, 4]]},
          {"step": 2, "expert_load": [[0, 0, 4, 1], [0, 5, 0, 0]]}], (0, 1)),
        (_NESTED, (3, 5)),
        ({"layer_expert_activation_counts": _NESTED, "expert_activation_counts": {"0": 7}, "num_layers": 7}, (3, 5)),
        ({f"model.layers.{layer}.mlp": {f"expert_{e}": n for e, n in row.items()} for layer, row in _NESTED.items()},
         (3, 5)),
        ({"layer_5": _MATRIX[1], "layer_3": _MATRIX[0]}, (3, 5)),
        ([{"layer": int(i), "expert": int(e), "count": n} for i, row in _NESTED.items() for e, n in row.items()],
         (3, 5)),
        ([{"layer_id": 5, "counts": _MATRIX[1]}, {"layer_id": 3, "counts": _MATRIX[0]}], (3, 5)),
        ([{"layer_id": 3, "experts": {"0": 5, "2": 7, "3": 1}}, {"layer_id": 5, "experts": {"0": 2, "1": 9, "3": 4}}],
         (3, 5)),
        ({"layer3": _MATRIX[0], "layer5": _MATRIX[1], "model": "m", "num_experts": 4}, (3, 5)),
        ({"rank_0": {"3": {"0": 5, "2": 7}}, "rank_1": {"3": {"3": 1}, "5": {"0": 2, "1": 9, "3": 4}}}, (3, 5)),
    ],
)  # fmt: skip
def test_json_documents(document: Any, layer_ids: tuple[int, ...], tmp_path: Path) -> None:
    """All give the same loads: bare, named, by step, history, sparse, by layer, records, by rank."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "d.json").write_text(json.dumps(document))
    _, stats = read(folder / "d.json")
    assert stats.load.tolist() == _MATRIX
    assert np.array_equal(stats.layer_ids, layer_ids)
    (folder / "d.json.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(document, indent=2).encode()))
    assert read(folder / "d.json.gz")[1].load.tolist() == _MATRIX


def test_what_a_document_says_beside_its_table(tmp_path: Path) -> None:
    """Experts without a hit exist where `num_experts` says so; layers and the model's name are kept."""
    folder = tmp_path / "in"
    folder.mkdir()
    document = {"num_experts": 6, "num_layers": 9, "model": "m", "layer_expert_counts": _NESTED}
    (folder / "d.json").write_text(json.dumps(document))
    for source_format in ("load", "vllm", "sglang"):
        imported, stats = read(folder / "d.json", source_format)
        assert stats.load.tolist() == [[*row, 0, 0] for row in _MATRIX]
        assert (stats.num_hidden_layers, stats.model) == (9, "m")
        assert "decoder layers 3, 5 of 9" in imported.summary()


_CELLS = [(layer, expert, n) for layer, row in zip((3, 5), _MATRIX, strict=True) for expert, n in enumerate(row)]


@pytest.mark.parametrize(
    ("text", "layer_ids"),
    [
        (",0,1,2,3\n0,5,0,7,1\n1,2,9,0,4", (0, 1)),  # a data frame
        ("layer,expert_0,expert_1,expert_2,expert_3\n3,5,0,7,1\n5,2,9,0,4", (3, 5)),
        ("layer,expert_0,expert_1,expert_2,expert_3\nlayer_3,5,0,7,1\nlayer_5,2,9,0,4", (3, 5)),
        ("expert,layer_3,layer_5\n0,5,2\n1,0,9\n2,7,0\n3,1,4", (0, 1)),  # experts are the lines
        ("layerId,expertId,tokenCount\n" + "\n".join(f"{a},{b},{n}" for a, b, n in _CELLS), (3, 5)),
        ("Layer ID;Expert ID;Token Count\n" + "\n".join(f"{a};{b};{n},0" for a, b, n in _CELLS), (3, 5)),
        ('"layer","expert","count"\n' + "\n".join(f'"{a}","{b}","{n}"' for a, b, n in _CELLS), (3, 5)),
        ("layer,expert,count\n" + "\n".join(f"layers.{a},e{b},{n}" for a, b, n in _CELLS), (3, 5)),
        ("rank,step,layer,expert,count,share\n" + "\n".join(f"0,1,{a},{b},{n},0.5" for a, b, n in _CELLS), (3, 5)),
        ("\n".join(f"{a},{b},{n}" for a, b, n in sorted(_CELLS, key=lambda cell: cell[1])), (3, 5)),
        ("5.000e+00 0.0e+00 7.0e+00 1.0e+00\n2.0e+00 9.0e+00 0.0e+00 4.0e+00", (0, 1)),
    ],
)
def test_text_as_other_tools_write_it(text: str, layer_ids: tuple[int, ...], tmp_path: Path) -> None:
    """Data frames, matrices with labels, names in other spellings, columns in excess, cells in any order."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "c.csv").write_text(text)
    _, stats = read(folder / "c.csv")
    assert stats.load.tolist() == _MATRIX
    assert np.array_equal(stats.layer_ids, layer_ids)


def test_parameters_and_late_types(tmp_path: Path) -> None:
    """A parameter is its tensor; uint16 to uint64 have no storage class of their own."""
    import torch

    folder = tmp_path / "in"
    folder.mkdir()
    torch.save(torch.nn.Parameter(torch.tensor(_MATRIX, dtype=torch.float32)), folder / "p.pt")
    assert read(folder / "p.pt")[1].load.tolist() == _MATRIX
    for name in ("uint16", "uint32", "uint64"):
        torch.save(torch.tensor(_MATRIX).to(getattr(torch, name)), folder / "u.pt")
        assert read(folder / "u.pt")[1].load.tolist() == _MATRIX


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "uint8", "float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("form", ["bare", "named", "transposed", "steps", "by layer"])
def test_tensors(dtype: str, form: str, tmp_path: Path) -> None:
    """`torch.save` of a tensor in any type, bare or under a name, contiguous or a view."""
    import torch

    folder = tmp_path / "in"
    folder.mkdir()
    matrix = torch.tensor(_MATRIX, dtype=getattr(torch, dtype))
    value: Any = {
        "bare": matrix,
        "named": {"activation_freq": matrix, "steps": 3},
        "transposed": torch.tensor(_MATRIX).T.contiguous().to(matrix.dtype).T,
        "steps": torch.stack([matrix, torch.zeros_like(matrix)]),
        "by layer": {3: matrix[0].clone(), 5: matrix[1].clone()},
    }[form]
    torch.save(value, folder / "t.pt")
    _, stats = read(folder / "t.pt")
    assert stats.load.tolist() == _MATRIX
    assert np.array_equal(stats.layer_ids, [3, 5] if form == "by layer" else [0, 1])


_RAGGED = [[5, 1, 7, 1], [2, 9], [3, 3, 3]]


@pytest.mark.parametrize("form", ["lists", "option", "option with zeros", "minus one", "nan", "csv", "nested"])
def test_layers_with_different_numbers_of_experts(form: str, tmp_path: Path) -> None:
    """No ghost experts, however a pruned model's loads are kept."""
    folder = tmp_path / "in"
    folder.mkdir()
    padded = np.array([row + [0] * (4 - len(row)) for row in _RAGGED])
    options: dict[str, Any] = {}
    path = folder / "r.json"
    if form == "lists":
        path.write_text(json.dumps(_RAGGED))
    elif form == "csv":
        path = folder / "r.csv"
        path.write_text("5,1,7,1\n2,9,,\n3,3,3,\n")
    elif form == "nested":
        path.write_text(json.dumps({"load": {str(i): row for i, row in enumerate(_RAGGED)}}))
    else:
        path = folder / "r.npy"
        fill = {"minus one": -1, "nan": np.nan}.get(form, 0)
        beyond = np.arange(4) >= np.array([[len(row)] for row in _RAGGED])
        table = np.where(beyond, fill, padded)
        if form.startswith("option"):
            options["num_experts"] = (4, 2, 3)
        if form == "option with zeros":  # dense rows are named as well
            table, options["num_experts"] = np.concatenate([np.zeros((1, 4), int), table]), (4, 4, 2, 3)
        np.save(path, table)
    imported, stats = read(path, **options)
    assert stats.experts_per_layer is not None
    assert stats.experts_per_layer.tolist() == [4, 2, 3]
    assert stats.load.tolist() == padded.tolist()
    assert "3 layers x 2 to 4 experts" in imported.summary()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.json", "[[1, -1, 2], [0, 1, -1]]", r"m.json: the load -1 of expert 1 in layer 0 is negative"),
        ("m.csv", "1,2\n3,x\n", "m.csv, line 2: 'x' is not a number"),
        ("m.csv", "layer,expert,count\n0,1,5\n0,-2,5\n", "m.csv, line 3: expert -2 must be a whole number"),
        ("m.csv", "layer,expert,count\n0,1,5\n1e400,2,5\n", "m.csv, line 3: layer inf must be a whole number"),
        ("m.csv", "layer,expert,count\n0,1,inf\n", "m.csv, line 2: count inf must lie in"),
        ("m.csv", "1,2\n3,1e400\n", "must be finite"),
        ("m.csv", "layer,expert,count\n0,1\n", "m.csv, line 2 has 2 columns, 3 are needed"),
        ("m.csv", "name,size,age\n1,2,3\n", "columns 'name', 'size', 'age' are not understood"),
        ("m.csv", "\n\n# nothing\n", "m.csv is empty"),
        ("m.json", '{"a": 1, "b": "x"}', "under the keys 'a', 'b'"),
        ("m.json", '{"a": [[1, 2]], "b": [[3, 4]]}', "has tables under the keys 'a', 'b'"),
        ("m.json", "[[1, 2], [3]]", None),
        ("m.json", '{"load": [[0, 0], [0, 0]]}', "all loads are zero"),
        ("m.xlsx", "PK", "is .npy, .npz, .pt, .json or .csv, not .xlsx"),
    ],
)
def test_tables_that_break_a_rule(name: str, text: str, message: str | None, tmp_path: Path) -> None:
    """One sentence with the file, the line and what is wrong."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / name).write_text(text)
    warnings.simplefilter("error", RuntimeWarning)  # numpy's own remarks are no way to say it
    if message is None:
        read(folder / name)
        return
    with pytest.raises(InputError, match=message):
        read(folder / name)
    assert not (tmp_path / "out.npz").exists()


def test_folders_that_hold_several_things(tmp_path: Path) -> None:
    """Files of several kinds are not mixed, except that those of ranks go first."""
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(InputError, match="has 0 such files"):
        read(folder)
    (folder / "a.json").write_text("[[1, 2]]")
    np.save(folder / "b.npy", np.array([[3, 4]]))
    with pytest.raises(InputError, match=r"kinds .json, .npy"):
        read(folder)
    (folder / "rank0.json").write_text("[[1, 2]]")
    (folder / "rank1.json").write_text("[[10, 20]]")
    assert read(folder)[1].load.tolist() == [[11, 22]]
    (folder / "rank2.json").write_text("[[1, 2, 3]]")
    with pytest.raises(FormatError, match="layer 0 has 2 experts in one table, 3 in another"):
        read(folder)
