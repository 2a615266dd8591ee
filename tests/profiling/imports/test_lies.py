"""Data that lies: each kind is planted in clean ids, and must be noticed with its share and mended.

The clean ids are the oracle: what is left after mending must be they.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.imports.canonical import Imported, ImportOptions
from moeplace.profiling.imports.canonical.survey import FILLS, Survey, as_ids
from moeplace.profiling.imports.sources import import_from
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.loads import load_load
from moeplace.profiling.traces.trace import RoutingTrace
from tests.profiling.builders import random_ids
from tests.seeds import TODAY

SEEDS = (0, 1, TODAY)


def read(folder: Path, experts: np.ndarray, **options: Any) -> tuple[Imported, RoutingTrace, list[str]]:
    """Import an interchange file; returns its warnings, too."""
    arrays = {"sequence_ids": np.arange(len(experts)) // 8} | options.pop("arrays", {})
    np.savez(folder / "t.npz", experts=experts, **arrays)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        imported = import_from("npz", folder / "t.npz", folder / "out", ImportOptions(**options))
    return imported, load_trace(folder / "out"), [str(warning.message) for warning in caught]


def refused(folder: Path, **options: Any) -> str:
    """What `--strict` says to the file that was read last."""
    with pytest.raises(FormatError) as error:
        import_from("npz", folder / "t.npz", folder / "strict", ImportOptions(strict=True, **options))
    assert not (folder / "strict").exists()
    assert str(error.value).startswith(str(folder / "t.npz"))
    return str(error.value)


def shuffled(ids_TLK: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.permuted(ids_TLK, axis=2)


def sets(ids_TLK: np.ndarray) -> list[list[list[int]]]:
    """Experts of every token and layer, in rising order, without -1."""
    return [[sorted(e for e in row if e >= 0) for row in token] for token in ids_TLK.tolist()]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fill", [0, -1])
def test_tokens_that_were_not_captured(fill: int, seed: int, tmp_path: Path) -> None:
    """Rows of 0 (or -1) in all layers are dropped and counted; the others keep their sequence and position."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    clean = random_ids(rng, 300, 5, 16, 3)
    lost = rng.random(300) < 0.2
    arrays = {"positions": np.arange(300)}
    ids = np.where(lost[:, None, None], fill, clean)
    imported, trace, texts = read(tmp_path, ids, arrays=arrays, num_experts=16)
    assert trace.topk_ids.tolist() == clean[~lost].tolist()
    assert trace.positions is not None
    assert trace.positions.tolist() == np.flatnonzero(~lost).tolist()
    assert f"({lost.sum()} of 300)" in texts[0]
    assert f"{lost.sum()} tokens that were not captured" in imported.summary()
    assert "did not capture" in refused(tmp_path, num_experts=16)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("dtype", "fill"), [("uint8", 255), ("int16", 32767), ("uint16", 65535), ("int32", 2**31 - 1),
                                             ("uint32", 2**32 - 1), ("int64", 999)])  # fmt: skip
@pytest.mark.parametrize("where", ["columns", "one column", "rows"])
def test_fill_values(where: str, dtype: str, fill: int, seed: int, tmp_path: Path) -> None:
    """The greatest number of a type in columns or rows that were never written is no expert; others need a flag."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    clean = random_ids(rng, 200, 4, 60, 4)
    lost = rng.random((200, 4)) < 0.1
    if where == "rows":
        ids, expected = np.where(lost[:, :, None], fill, clean), np.where(lost[:, :, None], -1, clean)
    else:
        width = 2 if where == "columns" else 1
        ids, expected = np.concatenate([clean, np.full((200, 4, width), fill)], axis=2), clean
    options: dict[str, Any] = {"fill_value": fill} if fill == 999 else {}
    imported, trace, texts = read(tmp_path, ids.astype(dtype), num_experts=60, **options)
    kept = ~(expected < 0).all(axis=(1, 2))
    assert sets(trace.topk_ids) == sets(expected[kept])
    assert imported.top_k == 4
    if fill != 999:
        assert f"of the ids are {min(fill, 2**31 - 1)}" in texts[0]
        assert "--fill-value" in refused(tmp_path, num_experts=60)
        _, again, _ = read(tmp_path, ids.astype(dtype), **options)  # without --num-experts: the greatest real id counts
        assert again.num_experts == clean.max() + 1


def test_an_expert_with_a_fill_values_number(tmp_path: Path) -> None:
    """In a model of 256 experts, 255 is an expert."""
    clean = random_ids(np.random.default_rng(5), 300, 3, 256, 8)
    _, trace, texts = read(tmp_path, clean.astype(np.uint8))
    assert sets(trace.topk_ids) == sets(clean)
    assert trace.num_experts == 256
    assert not texts


@pytest.mark.parametrize("seed", SEEDS)
def test_repeated_ids(seed: int, tmp_path: Path) -> None:
    """A router chooses an expert once: repeats are left out and counted by rows."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    clean = random_ids(rng, 200, 3, 20, 4)
    clean[clean == 0] = 20  # without zeros, which have a kind of their own
    ids = clean.copy()
    twice = rng.random((200, 3)) < 0.05
    ids[twice, 3] = ids[twice, 1]
    expected = clean.copy()
    expected[twice, 3] = -1
    _, trace, texts = read(tmp_path, ids, num_experts=32)
    assert trace.topk_ids.tolist() == expected.tolist()
    assert f"({twice.sum()} of 600)" in texts[0]
    assert "more than once" in refused(tmp_path, num_experts=32)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("experts", "null", "top_k"), [(64, 32, 6), (128, 64, 12), (48, 6, 4)])
@pytest.mark.parametrize("form", ["beyond", "rewritten", "rewritten, weighted", "none"])
def test_null_experts(form: str, experts: int, null: int, top_k: int, seed: int, tmp_path: Path) -> None:
    """Ids beyond E with the flag; rewritten to 0, expert 0 keeps about the mean load, or its own with weights."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    chosen = random_ids(rng, 2000, 3, experts + null, top_k)
    is_null = chosen >= experts
    expected = np.bincount(chosen[~is_null], minlength=experts)
    arrays, options = {}, {"num_experts": experts}
    if form == "beyond":
        options["null_experts"] = null
        ids = chosen
    elif form == "none":
        ids = np.where(is_null, -1, chosen)
    else:
        ids = np.where(is_null, 0, chosen)
        if form.endswith("weighted"):
            arrays["weights"] = np.where(is_null, 0, -np.sort(-rng.random(chosen.shape), axis=2) + 0.1)
    _, trace, texts = read(tmp_path, ids, arrays=arrays, **options)
    real = trace.topk_ids[(trace.topk_ids >= 0) & (trace.topk_ids < experts)]
    load = np.bincount(real, minlength=experts)
    assert load[1:].tolist() == expected[1:].tolist()
    if form == "rewritten":
        assert 0.5 < load[0] / load[1:].mean() < 1.6
        assert "id 0 more than once" in texts[0]
    else:
        assert load[0] == expected[0]
    if form == "beyond":
        with pytest.raises(InputError, match=rf"must lie in 0..{experts - 1}, as .* --null-experts {null}"):
            read(tmp_path, ids, num_experts=experts)
        assert any("--null-experts" in text for text in read(tmp_path, ids)[2]) or not (experts + null) & (
            experts + null - 1
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_busy_expert_0_is_no_null_expert(seed: int, tmp_path: Path) -> None:
    """Where a few rows repeat 0, the many that have it once are not touched."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    scores = rng.random((1500, 3, 32))
    scores[:, :, 0] -= 0.6
    clean = np.argsort(scores, axis=2)[:, :, :4]
    ids = clean.copy()
    ids[:4, 0] = [0, 0, 5, 6]
    _, trace, _ = read(tmp_path, ids, num_experts=32)
    before, after = ((one[4:] == 0).sum() for one in (clean, trace.topk_ids))
    assert after > 0.85 * before


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("columns", [0, 3])
def test_padded_tokens(columns: int, seed: int, tmp_path: Path) -> None:
    """One set of experts in all layers of many tokens: a warning with its share; --drop-padding leaves them out."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    clean = random_ids(rng, 500, 6, 64, 4)
    padded = rng.random(500) < 0.3
    fixed = rng.permutation(64)[:4]
    ids = np.where(padded[:, None, None], shuffled(np.broadcast_to(fixed, clean.shape), rng), clean)
    ids = np.concatenate([ids, np.full((500, 6, columns), -1)], axis=2)
    _, trace, texts = read(tmp_path, ids, num_experts=64)
    assert trace.num_tokens == 500
    assert f"({padded.sum()} of 500)" in texts[0]
    assert "--drop-padding" in texts[0]
    imported, trace, _ = read(tmp_path, ids, num_experts=64, drop_padding=True)
    assert trace.topk_ids.tolist() == clean[~padded].tolist()
    assert f"{padded.sum()} padded tokens" in imported.summary()


def test_clean_data_is_left_alone(tmp_path: Path) -> None:
    """Skew, strong affinity, ragged top-k and top-1 are no lies."""
    rng = np.random.default_rng(1)
    skewed = np.argsort(rng.random((400, 5, 64)) ** (1 + np.arange(64) % 7), axis=2)[:, :, -8:]
    ragged = np.where(np.arange(8) < rng.integers(1, 9, (400, 5, 1)), skewed, -1)
    same = np.repeat(rng.integers(0, 8, (400, 1, 1)), 5, axis=1)  # the same expert in all layers, by design
    for ids in (skewed, ragged, same):
        _, trace, texts = read(tmp_path, ids, num_experts=64 if ids.shape[2] > 1 else 8)
        assert trace.topk_ids.tolist() == ids.tolist()
        assert not texts


def test_layers_that_a_recorder_does_not_see(tmp_path: Path) -> None:
    """Named in the summary, with the way to add them later; the others keep their decoder layers."""
    ids = random_ids(np.random.default_rng(2), 200, 6, 8, 2)
    ids[:, [0, 1, 4]] = -1
    imported, trace, _ = read(tmp_path, ids, num_experts=8)
    assert np.array_equal(trace.layer_ids, [2, 3, 5])
    assert "decoder layers 2-3, 5 of 6" in imported.summary()
    assert "3 layers without any expert chosen (0-1, 4)" in imported.summary()
    assert "--add-layers" in imported.summary()


def read_load(folder: Path, load_LE: np.ndarray, **options: Any) -> tuple[np.ndarray, list[str]]:
    """Import a matrix of loads; its warnings."""
    np.save(folder / "l.npy", load_LE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import_from("load", folder / "l.npy", folder / "out", ImportOptions(**options))
    return load_load(folder / "out").load, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_counts_of_one_rank(ranks: int, seed: int, tmp_path: Path) -> None:
    """A block of experts in use, the same in every layer."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    load_LE = np.zeros((12, 128), int)
    size, rank = 128 // ranks, int(rng.integers(ranks))
    load_LE[:, rank * size : (rank + 1) * size] = rng.poisson(50, (12, size))
    load_LE[0, rank * size], load_LE[0, rank * size + size - 1] = 1, 1
    _, texts = read_load(tmp_path, load_LE)
    assert f"({rank * size}-{rank * size + size - 1} of 128)" in texts[0]
    assert "counts of one rank" in texts[0]
    scattered = load_LE[:, rng.permutation(128)]
    assert not any("one rank" in text for text in read_load(tmp_path, scattered)[1])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("first", "width", "extra"), [(0, 8, 4000), (0, 1, 9000), (40, 6, 3000)])
def test_padded_loads(first: int, width: int, extra: int, seed: int, tmp_path: Path) -> None:
    """The same experts hottest in every layer by the same count: a warning; --drop-padding takes that count off."""
    print(f"seed {seed}")
    clean = np.random.default_rng(seed).poisson(1000, (12, 128))
    load_LE = clean.copy()
    load_LE[:, first : first + width] += extra
    load, texts = read_load(tmp_path, load_LE)
    assert load.tolist() == load_LE.tolist()
    shown = f"{first}-{first + width - 1}" if width > 1 else f"{first}"
    assert f"experts {shown} are the hottest in every layer" in texts[0]
    load, _ = read_load(tmp_path, load_LE, drop_padding=True)
    assert np.abs(load - clean).max() < 400
    assert not read_load(tmp_path, clean)[1]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_survey_counts_what_is_there(seed: int) -> None:
    """Tallies against plain Python over ids of every kind."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    ids = rng.choice([-1, 0, 0, 1, 2, 3, 255, 65535], (40, 4, 3))
    ids[:5] = 0
    ids[5:10, :] = [3, 1, 2]
    survey = Survey.empty(4, 3)
    for part in np.array_split(ids, 3):
        survey.add(as_ids(part))
    tallies, fills = survey.tallies, (255, 65535)
    rows = [[[int(e) for e in row] for row in token] for token in ids]
    single = [[[e for e in set(r) if e >= 0 and not (e in fills and r.count(e) > 1)] for r in token] for token in rows]
    constant = [[r[0] >= 0 and r[0] not in fills and len(set(r)) == 1 for r in token] for token in rows]
    for layer in range(4):
        column = [(token[layer], s[layer], c[layer]) for token, s, c in zip(rows, single, constant, strict=True)]
        assert tallies.constant_L[layer] == sum(c for _, _, c in column)
        assert tallies.none_L[layer] == sum(not s for _, s, _ in column)
        plain = [(r, s) for r, s, c in column if s and not c]
        assert tallies.zeros_L[layer] == sum(r.count(0) > 1 for r, _ in plain)
        assert tallies.single_zero_L[layer] == sum(r.count(0) == 1 for r, _ in plain)
        assert tallies.twice_L[layer] == sum(any(r.count(e) > 1 for e in s if e) for r, s in plain)
        assert tallies.widest_L[layer] == max(len(s) for _, s in plain)
        assert tallies.greatest_L[layer] == 3
        expected = [sum(e in s for _, s in plain) for e in range(4)]
        assert survey.counts_LM[layer, :4].tolist() == expected
    for index, value in enumerate(FILLS.tolist()):
        assert tallies.fill_columns_FK[index].sum() == (ids == value).sum()
        assert tallies.fill_twice_F[index] == ((ids == value).sum(axis=2) > 1).sum()
    assert survey.blank == sum(all(not s or (c and r[0] == 0) for r, s, c in zip(*t, strict=True))
                               for t in zip(rows, single, constant, strict=True))  # fmt: skip
    assert survey.alike[1, 2, 3] >= 5


def test_skewed_loads_are_no_padding(tmp_path: Path) -> None:
    """Zipf and lognormal loads in an order of their own in each layer."""
    rng = np.random.default_rng(0)
    zipf = np.stack([rng.permutation(10**6 / np.arange(1, 129)) for _ in range(12)]).astype(int)
    lognormal = rng.lognormal(8, 1, (12, 128)).astype(int)
    for load_LE in (zipf, lognormal):
        assert read_load(tmp_path, load_LE)[1] == []


def test_experts_never_used(tmp_path: Path) -> None:
    """Many unused ones in spite of many tokens: a warning; at the ends of rows it names the flag for pruned layers."""
    load_LE = np.full((3, 16), 500)
    load_LE[0, [1, 5, 9]] = load_LE[1, [0, 7]] = 0
    assert "10.4 % of the experts (5 of 48 in 3 layers)" in read_load(tmp_path, load_LE)[1][0]
    load_LE = np.full((3, 16), 500)
    load_LE[0, 12:] = load_LE[1, 14:] = 0
    assert "--num-experts 12,14,16" in read_load(tmp_path, load_LE)[1][0]
    assert read_load(tmp_path, load_LE, num_experts=(12, 14, 16))[1] == []
