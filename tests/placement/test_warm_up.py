"""After the warm-up no kernel is compiled, by a solve or by any command; and it happens once per installation."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeplace.profiling import kernel_cache
from tests.placement.compiled_kernels import called_from_python
from tests.shared_data import ROOT

pytestmark = pytest.mark.timeout(600)  # seconds, unless a kernel was edited and all of them are compiled here

_SCRIPT = """
import json, sys
from tests.placement.compiled_kernels import kernels
from tests.placement.kernel_uses import USES
from moeplace.placement.warm_up import warm_up
found = kernels()
warm_up()
warm = {name: set(kernel.signatures) for name, kernel in found.items()}
late = {}
for name, use in USES.items():
    use(int(sys.argv[1]))
    late[name] = [kernel for kernel in found if set(found[kernel].signatures) - warm[kernel]]
print(json.dumps([[name for name in warm if warm[name]], late]))
"""


@pytest.fixture(scope="module")
def warmed(request: pytest.FixtureRequest) -> tuple[set[str], dict[str, list[str]], int]:
    """Kernels that the warm-up used, those that a use needed in yet another form, and the seed of the uses."""
    seed = int(request.config.getoption("--seed"))
    command = [sys.executable, "-c", _SCRIPT, str(seed)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=570)
    assert run.returncode == 0, run.stderr
    used, late = json.loads(run.stdout)
    return set(used), late, seed


def test_the_warm_up_uses_every_kernel(warmed: tuple[set[str], dict[str, list[str]], int]) -> None:
    """Those that Python calls; kernels that only kernels call are compiled with them."""
    assert called_from_python() - warmed[0] == set()


def test_nothing_is_compiled_after_it(warmed: tuple[set[str], dict[str, list[str]], int]) -> None:
    """A kernel that a use needs with other types would be compiled while a clock runs."""
    _, late, seed = warmed
    assert {use: kernels for use, kernels in late.items() if kernels} == {}, f"repeat with --seed {seed}"


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installation that was never warmed up, whose warm-up only writes a line into `ran`."""
    program = tmp_path / "warm.py"
    program.write_text(
        "import os, pathlib\n"
        "from moeplace.profiling import kernel_cache\n"
        f"kernel_cache.FOLDER = pathlib.Path({str(tmp_path)!r})\n"
        f"with open({str(tmp_path / 'ran')!r}, 'a') as file: file.write(os.environ[kernel_cache.NO_WARM_UP])\n"
        "kernel_cache.mark_compiled()\n"
    )
    monkeypatch.setattr(kernel_cache, "FOLDER", tmp_path)
    monkeypatch.setattr(kernel_cache, "WARM_UP", "warm")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.delenv(kernel_cache.NO_WARM_UP, raising=False)
    kernel_cache._stamp.cache_clear()
    yield tmp_path
    kernel_cache._stamp.cache_clear()


def test_kernels_are_compiled_once(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first call says so and runs the program, later ones do nothing; the program does not call itself."""
    assert not kernel_cache.is_compiled()
    for _ in range(2):
        kernel_cache.compile_once()
        assert kernel_cache.is_compiled()
    assert (fresh / "ran").read_text() == "1"
    assert [record.getMessage() for record in caplog.records] == [
        "compiling kernels, once for this installation: about a minute"
    ]


def test_of_two_processes_one_compiles(fresh: Path) -> None:
    """The other waits, and finds it done."""
    script = (
        "import pathlib, sys\nfrom moeplace.profiling import kernel_cache\n"
        f"kernel_cache.FOLDER, kernel_cache.WARM_UP = pathlib.Path({str(fresh)!r}), 'warm'\n"
        "kernel_cache.compile_once()\nassert kernel_cache.is_compiled()\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=100)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (fresh / "ran").read_text() == "1"
    assert sorted(map(len, said))[0] == 0


def test_a_changed_kernel_is_another_installation(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stamp follows from the sources of the kernels."""
    kernel_cache.mark_compiled()
    assert kernel_cache.is_compiled()
    (fresh / "profiling").mkdir()
    (fresh / "profiling" / "kernels.py").write_text("\n@njit(cache=True)\ndef f(): pass\n")
    monkeypatch.setattr(kernel_cache, "HOME", fresh)
    kernel_cache._stamp.cache_clear()
    assert not kernel_cache.is_compiled()


@pytest.mark.parametrize("told", [False, True])
def test_a_changed_callee_reaches_kernels_of_other_modules(told: bool, tmp_path: Path) -> None:
    """Machine code of a caller has its callee compiled into it; numba looks at the caller's own file only."""
    folder = tmp_path / "profiling"
    folder.mkdir()
    head = "from moeplace.profiling.kernel_cache import njit\n"
    caller = "from profiling.callee import f\n\n\n@njit(cache=True)\ndef g(x):\n    return f(x) + 1\n"
    (folder / "caller.py").write_text(head + caller)
    script = (
        "import pathlib\nfrom moeplace.profiling import kernel_cache\n"
        f"kernel_cache.HOME = pathlib.Path({str(tmp_path)!r})\n"
        "from profiling.caller import g\nprint(g(1), sum(g.stats.cache_hits.values()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    environment.pop("NUMBA_CACHE_DIR", None)
    if told:
        environment["NUMBA_CACHE_DIR"] = str(tmp_path / "told")
    said = []
    for factor in (10, 10, 20, 20):
        (folder / "callee.py").write_text(f"{head}\n\n@njit(cache=True)\ndef f(x):\n    return {factor} * x\n")
        command = [sys.executable, "-c", script]
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100))
    assert [run.stdout.split() for run in said] == [["11", "0"], ["11", "1"], ["21", "0"], ["21", "1"]], said


def test_two_processes_that_compile_two_forms_never_swap_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both saw an empty index; the later code must not stand under the other's entry."""
    ours, theirs, third = (kernel_cache.KernelFiles(str(tmp_path), "f", "a" * 64) for _ in range(3))
    write = ours._save_data

    def late(name: str, data: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(theirs, "_load_index", dict)
            theirs.save("floats", "code for floats")
        write(name, data)

    monkeypatch.setattr(ours, "_save_data", late)
    ours.save("ints", "code for ints")
    assert third.load("floats") == "code for floats"
    assert third.load("ints") in (None, "code for ints")


def test_a_process_that_dies_while_it_saves_leaves_no_code_of_former_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index names code that was never written: it is missing, not what stood there before."""
    kernel_cache.KernelFiles(str(tmp_path), "f", "a" * 64).save("ints", "old code")
    kernel_cache.KernelFiles(str(tmp_path), "f", "a" * 64).save("floats", "old code")
    dying, next_one = (kernel_cache.KernelFiles(str(tmp_path), "f", "b" * 64) for _ in range(2))
    assert next_one.load("ints") is None
    with monkeypatch.context() as patch:
        patch.setattr(dying, "_save_data", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dying.save("ints", "new code")
    assert next_one.load("ints") is None
    next_one.save("ints", "new code")
    assert next_one.load("ints") == "new code"
    assert len(list(tmp_path.glob("*.nbc"))) == 1


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o755])
def test_machine_code_is_kept_where_nobody_else_writes(mode: int, tmp_path: Path) -> None:
    """A folder that others can reach, or that is a link, is not taken; one of our own is."""
    own = tmp_path / "own"
    assert kernel_cache.private_folder(own) == own == kernel_cache.private_folder(own)
    open_folder, link = tmp_path / "open", tmp_path / "link"
    open_folder.mkdir()
    open_folder.chmod(mode)
    link.symlink_to(own)
    for foreign in (open_folder, link):
        taken = kernel_cache.private_folder(foreign)
        assert taken != foreign
        assert taken.stat().st_mode & 0o777 == 0o700
        taken.rmdir()


def test_the_place_of_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As told; else beside the sources; else with the user; else in a private temporary folder."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "told"))
    assert kernel_cache.cache_folder() == (tmp_path / "told", False)
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    assert kernel_cache.cache_folder() == (kernel_cache.HOME / "profiling" / "__pycache__", False)
    blocked = tmp_path / "file"
    blocked.touch()  # below a file no folder can be made, whoever asks
    monkeypatch.setattr(kernel_cache, "HOME", blocked)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_cache.cache_folder() == (tmp_path / "moeplace" / "kernels", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert kernel_cache.cache_folder() == (tmp_path / f"moeplace-kernels-{os.getuid()}", True)
