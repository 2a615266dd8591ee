"""`moeplace plan`, `export` and `import-placement`: exit codes, files, what they print."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from moeplace.launch.commands import export, import_placement, import_trace, plan
from moeplace.placement.engines import ENGINES
from moeplace.placement.migration.file import load_plan
from moeplace.placement.migration.plan import apply_plan
from moeplace.placement.placement import Placement
from moeplace.placement.placement_file import load_placement, save_placement
from moeplace.profiling.errors import InputError, MoeplaceWarning
from tests.launch.commands import run


def save(path: Path, rows: list[list[int]], ranks: int, **fields: object) -> Path:
    """A placement file of equal ranks in one node."""
    slots = len(rows[0]) // ranks
    experts = np.full(len(rows), max(map(max, rows)) + 1)
    save_placement(path, Placement(np.array(rows), np.full(ranks, slots), np.zeros(ranks, int), experts, **fields))
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return save(tmp_path / "old.json", [[0, 1, 2, 3], [2, 0, 3, 1]], 2)


def test_plan_writes_what_it_prints(tmp_path: Path, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan file leads from OLD to NEW; the JSON has the figures of the table."""
    new = save(tmp_path / "new.json", [[0, 1, 2, 3, 1, 2], [2, 0, 3, 1, 0, 3]], 3)
    out, figures = tmp_path / "m.json", tmp_path / "f.json"
    assert run(plan, old, new, "--out", out, "--expert-bytes", "1000", "--json", figures) == 0
    loaded = load_plan(out)
    assert apply_plan(load_placement(old), loaded).equals(load_placement(new))
    document = json.loads(figures.read_text())
    assert (document["bytes"], document["least_bytes"], document["num_rounds"]) == (4000, 4000, len(loaded.rounds))
    assert document["origin"] == [0, 1, -1]
    printed = capsys.readouterr().out
    assert "fetched by ranks" in printed
    assert "4000" in printed


def test_plan_relabels_first(tmp_path: Path, old: Path) -> None:
    """Exchanged ranks cost nothing once relabelled; the relabelled placement is written."""
    new = save(tmp_path / "new.json", [[3, 2, 1, 0], [1, 3, 2, 0]], 2)
    out, placement, figures = (tmp_path / name for name in ("m.json", "p.json", "f.json"))
    assert run(plan, old, new, "--json", figures) == 0
    assert json.loads(figures.read_text())["bytes"] == 8
    assert run(plan, old, new, "--relabel", "--placement-out", placement, "--out", out, "--json", figures) == 0
    assert json.loads(figures.read_text())["bytes"] == 0
    assert load_placement(placement).equals(load_placement(old))
    assert apply_plan(load_placement(old), load_plan(out)).equals(load_placement(placement))


def test_plan_relabels_coherent_layers_together(tmp_path: Path, old: Path) -> None:
    """By default one relabelling for all layers in coherent mode; per layer on request, with a warning."""
    new = save(tmp_path / "new.json", [[2, 3, 0, 1], [0, 2, 1, 3]], 2, mode="coherent")
    figures = tmp_path / "f.json"
    run(plan, old, new, "--relabel", "--json", figures)
    assert json.loads(figures.read_text())["bytes"] == 4
    with pytest.warns(MoeplaceWarning, match="changes the stay rate"):
        run(plan, old, new, "--relabel", "per-layer", "--json", figures)
    assert json.loads(figures.read_text())["bytes"] == 0


def test_plan_uses_links_and_lost_ranks(tmp_path: Path, old: Path) -> None:
    """Slower links take longer; a lost rank's experts come from the checkpoint."""
    new = save(tmp_path / "new.json", [[2, 1, 0, 3], [2, 0, 3, 1]], 2)
    cluster = tmp_path / "c.toml"
    cluster.write_text("ranks_per_node = 2\nslots_per_rank = 2\n[intra]\nlatency = 1.0\nbandwidth = 10\n")
    figures = tmp_path / "f.json"
    run(plan, old, new, "--cluster", cluster, "--expert-bytes", "100", "--json", figures)
    assert json.loads(figures.read_text())["seconds"] == pytest.approx(11.0)
    run(plan, old, old, "--lost-ranks", "1", "--json", figures)
    assert json.loads(figures.read_text())["checkpoint_bytes"] == 4


def test_plan_refuses_what_does_not_fit(tmp_path: Path, old: Path) -> None:
    """Options without effect and clusters of another shape."""
    with pytest.raises(InputError, match="--placement-out needs --relabel"):
        run(plan, old, old, "--placement-out", tmp_path / "p.json")
    cluster = tmp_path / "c.toml"
    cluster.write_text("ranks_per_node = 3\nslots_per_rank = 2\n")
    with pytest.raises(InputError, match=r"has the slots \[2 2 2\], NEW needs \[2 2\]"):
        run(plan, old, old, "--cluster", cluster)


@pytest.mark.parametrize("engine", export.ENGINES)
def test_export_prints_the_flags_and_reads_back(
    tmp_path: Path, old: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is exported comes back as the same placement, and the flag that starts the engine is printed."""
    suffix = {"omni": ".npy", "exflow": ".csv"}.get(engine, ".json")
    file, notes, again = tmp_path / f"e{suffix}", tmp_path / "n.json", tmp_path / "again.json"
    assert run(export, old, "--to", engine, "--out", file, "--json", notes) == 0
    printed = capsys.readouterr().out
    assert json.loads(notes.read_text())["start"] in printed
    for command in (import_placement, import_trace):
        assert run(command, file, "--from", engine, "--out", again) == 0
        assert np.array_equal(load_placement(again).copies_LER, load_placement(old).copies_LER)
        again.unlink()


@pytest.mark.parametrize("engine", ["sglang", "vllm", "trtllm", "exflow"])
def test_import_tells_placements_from_traces_without_a_sidecar(tmp_path: Path, old: Path, engine: str) -> None:
    """Its own keys tell what a file is."""
    file, again = tmp_path / ("e.csv" if engine == "exflow" else "e.json"), tmp_path / "again.json"
    run(export, old, "--to", engine, "--out", file)
    (tmp_path / f"{file.name}.moeplace.json").unlink()
    options = ["--ranks", "2", "--num-experts", "4", "--layer-ids", "0-1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoeplaceWarning)
        assert run(import_trace, file, "--from", engine, "--out", again, *options) == 0
    assert np.array_equal(load_placement(again).copies_LER, load_placement(old).copies_LER)


def test_commands_know_all_engines() -> None:
    """The choices of both commands are the engines there are; the commands name them without importing them."""
    assert tuple(ENGINES) == export.ENGINES == import_placement.ENGINES


def test_dense_layers_on_request(tmp_path: Path, old: Path) -> None:
    """--num-hidden-layers adds rows for trailing dense layers; without a sidecar the options say what is what."""
    file, again = tmp_path / "e.json", tmp_path / "again.json"
    run(export, old, "--to", "sglang", "--out", file, "--num-hidden-layers", "4")
    assert len(json.loads(file.read_text())["physical_to_logical_map"]) == 4
    (tmp_path / "e.json.moeplace.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(import_placement, file, "--from", "sglang", "--out", again, "--ranks", "2", "--layer-ids", "0-1")
    assert load_placement(again).num_hidden_layers == 4
    with pytest.raises(InputError, match="not among them"):
        run(import_placement, file, "--from", "sglang", "--out", again, "--ranks", "2", "--layer-ids", "0,7")


def test_export_is_made_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty slots are filled and counted; draft layers and unseen ones are added where the engine has rows for them."""
    file = save(tmp_path / "p.json", [[0, 1, -1, 2, 3, 0], [3, 2, 1, 1, 0, -1]], 2, layer_ids=np.array([1, 2]))
    out = tmp_path / "b.yaml"
    assert run(export, file, "--to", "trtllm", "--out", out, "--mtp-layers", "1", "--add-layers", "0") == 0
    printed = capsys.readouterr().out
    assert "decoder layers 0, 3 were added" in printed
    assert "2 empty slots were filled" in printed
    placement = load_placement_of(out, "trtllm")
    assert placement.slot_to_expert.tolist() == [
        [0, 1, 2, 3, 0, 1],
        [0, 1, 2, 2, 3, 0],
        [3, 2, 1, 1, 0, 2],
        [0, 1, 2, 3, 0, 1],
    ]
    assert run(export, file, "--to", "trtllm", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "no row for decoder layers 0: " in printed
    assert "--mtp-layers 1" in printed
    with pytest.raises(InputError, match="sglang has no rows for draft layers"):
        run(export, file, "--to", "sglang", "--out", tmp_path / "s.json", "--mtp-layers", "1")


def load_placement_of(path: Path, engine: str) -> Placement:
    from moeplace.placement.engines import read_engine_placement

    return read_engine_placement(path, engine)


def test_unequal_ranks_name_the_way(tmp_path: Path) -> None:
    """5 experts on 2 ranks, 3 and 2: the flag that makes them equal, and what it costs."""
    fields = (np.array([3, 2]), np.zeros(2, int), np.array([5]))
    save_placement(tmp_path / "p.json", Placement(np.array([[0, 1, 2, 3, 4]]), *fields))
    with pytest.raises(InputError, match=r"solve again with --slots-per-rank 3 \(6 slots, 1 of them redundant\)"):
        run(export, tmp_path / "p.json", "--to", "vllm", "--out", tmp_path / "v.jsonl")
