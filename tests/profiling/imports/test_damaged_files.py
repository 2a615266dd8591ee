"""Damaged and hostile files: every importer reads them or refuses them with one sentence."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from moeplace.profiling.containers.torch_archive import read_torch_archive
from moeplace.profiling.errors import FormatError, InputError, MoeplaceError, MoeplaceWarning
from moeplace.profiling.imports.canonical import ImportOptions
from moeplace.profiling.imports.sources import import_from
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.loads import load_load
from tests.profiling.mutations import CANARY, mutate_source
from tests.profiling.sources import SOURCES

MUTATIONS = 60


def attempt(source_format: str, source: Path, out: Path) -> str | None:
    """The sentence with which an import refuses, or None when it reads; warnings of other libraries are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", MoeplaceWarning)
        try:
            import_from(source_format, source, out, ImportOptions())
        except MoeplaceError as error:
            return str(error)
    out.unlink()
    return None


@pytest.mark.parametrize("name", SOURCES)
def test_damaged_sources_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """Never another exception, never a file left by a failure, never code executed."""
    source_format, write = SOURCES[name]
    original = write(tmp_path)
    out = tmp_path / "result" / "out"
    out.parent.mkdir()
    for number in range(MUTATIONS):
        damaged = mutate_source(original, tmp_path / "damaged", np.random.default_rng([0, number]))
        refusal = attempt(source_format, damaged, out)
        assert refusal is None or (refusal and "\n" not in refusal)
        assert list(out.parent.iterdir()) == []
    assert not CANARY.exists()


@pytest.mark.parametrize("kind", ["trace", "load"])
def test_damaged_files_of_our_own(kind: str, tmp_path: Path) -> None:
    """Our own trace and load files are held to the same rule when they are opened."""
    name = "interchange" if kind == "trace" else "matrix_npy"
    source_format, write = SOURCES[name]
    import_from(source_format, write(tmp_path), tmp_path / "own.npz", ImportOptions())
    refused = 0
    for number in range(5 * MUTATIONS):
        damaged = mutate_source(tmp_path / "own.npz", tmp_path / "damaged", np.random.default_rng([1, number]))
        try:
            (load_trace if kind == "trace" else load_load)(damaged)
        except MoeplaceError:
            refused += 1
    assert refused > MUTATIONS


def test_huge_announcements_cost_nothing(tmp_path: Path) -> None:
    """A small file that announces a huge array is refused before memory is taken for it."""
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (9999999999, 99, 9), }"
    data = b"\x93NUMPY\x01\x00" + (len(header) + 1).to_bytes(2, "little") + header + b"\n"
    (tmp_path / "t.npy").write_bytes(data + b"\x00" * 64)
    with pytest.raises(FormatError, match=r"not a readable .npy"):
        import_from("exflow", tmp_path / "t.npy", tmp_path / "out", ImportOptions())


def test_torch_archives_execute_nothing(tmp_path: Path) -> None:
    """Old pickles, foreign names, memo bombs and truncated storages are refused."""
    import torch

    path = tmp_path / "a.pt"
    torch.save({"x": torch.arange(6).reshape(2, 3), "n": [1, 2.5, None, True, "s"], "e": torch.zeros(0, 3)}, path)
    document = read_torch_archive(path)
    assert document["x"].read().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert document["n"] == [1, 2.5, None, True, "s"]
    assert document["e"].read().shape == (0, 3)
    for view in (torch.arange(6)[1::2], torch.arange(12).reshape(3, 4).T, torch.arange(24).reshape(2, 3, 4)[:, 1]):
        torch.save({"x": view}, path)
        assert read_torch_archive(path)["x"].read().tolist() == view.tolist()
    torch.save({"x": torch.arange(3).expand(1 << 20, 3)}, path)
    with pytest.raises(FormatError, match="does not fit into its storage of 3"):
        read_torch_archive(path)
    torch.save({"x": torch.arange(6)[2:5]}, path)
    assert read_torch_archive(path)["x"].read().tolist() == [2, 3, 4]
    halves = torch.tensor([0.0, 1.5, -2.0, 65280.0], dtype=torch.bfloat16)
    torch.save({"x": halves}, path)
    assert read_torch_archive(path)["x"].read().tolist() == halves.tolist()
    torch.save([1], path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="zip since torch"):
        read_torch_archive(path)
    with pytest.raises(InputError, match="no such file"):
        read_torch_archive(tmp_path / "absent.pt")
