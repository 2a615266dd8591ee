"""Where compiled kernels are kept, and that they are compiled once per installation.

Numba keeps machine code beside the sources, or in the user's cache folder where that is not writable; where neither is,
it refuses to load. `njit` of this module then keeps it in a private folder of the system's temporary one.

Numba takes machine code for fresh while the file of its own function is unchanged, though the code of every kernel that
it calls is compiled into it. `njit` of this module asks for more: a change of any kernel makes all of them stale.

`compile_once` has the kernels of this installation compiled, by a process of its own, if they never were: a stamp
beside the machine code names the sources, numba, Python and the processor. Of several processes that come at once one
compiles and the others wait.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent.parent
"""Of the folders of this package, in a checkout as in an installation."""
WARM_UP = "moeplace.placement.warm_up"
"""The program that uses every kernel once and then calls `mark_compiled`."""
POLICY_WARM_UP = "moeplace.placement.policy.warm_up"
"""The one that does so for the kernels of `moeplace.policy` alone: an engine needs no others."""
NO_WARM_UP = "MOEPLACE_NO_WARM_UP"
"""Environment variable: where it is set, a kernel is compiled when it is first used (the warm-up itself, tests)."""
_FLOORS = ("profiling", "placement")


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def private_folder(folder: Path) -> Path:
    """That folder if it is ours alone, else a fresh one: machine code that others could write is never loaded."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="moeplace-kernels-"))


def cache_folder() -> tuple[Path, bool]:
    """(folder for the stamp, whether numba must be told to keep its files there too)."""
    told = os.environ.get("NUMBA_CACHE_DIR")
    if told:
        return Path(told), False
    beside = HOME / "profiling" / "__pycache__"
    if is_writable(beside):
        return beside, False
    with contextlib.suppress(RuntimeError):  # there may be no home
        of_user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeplace" / "kernels"
        if is_writable(of_user):
            return of_user, True
    return private_folder(Path(tempfile.gettempdir()) / f"moeplace-kernels-{os.getuid()}"), True


FOLDER, _MUST_TELL = cache_folder()
if _MUST_TELL:
    os.environ["NUMBA_CACHE_DIR"] = str(FOLDER)  # for numba, if it is not imported yet, and for child processes

import numba  # noqa: E402  # reads the variable when it is imported
from numba.core.caching import FunctionCache, IndexDataCacheFile  # noqa: E402

if _MUST_TELL:
    numba.config.CACHE_DIR = str(FOLDER)

__all__ = ["FOLDER", "NO_WARM_UP", "POLICY_WARM_UP", "compile_once", "is_compiled", "mark_compiled", "njit"]

_log = logging.getLogger("moeplace")


def _name(program: str | None) -> str:
    """How the stamp of a program begins."""
    return "moeplace.policy" if program == POLICY_WARM_UP else "moeplace"


class KernelFiles(IndexDataCacheFile):  # type: ignore[misc]
    """Cached machine code of one kernel, every piece in a file of its own name.

    Numba numbers the files of a kernel's forms. Two processes that compile two forms at once give both the same number,
    and one that dies between index and code leaves the code of former sources there: in both cases the code of another
    kernel or of other types is run. Here what is not what the index means is missing, and compiled again.
    """

    def __init__(self, cache_path: str, filename_base: str, sources: str) -> None:
        super().__init__(cache_path, filename_base, sources)
        self._folder, self._begin, self._sources = Path(cache_path), filename_base, sources[:12]

    def _data_name(self, number: int) -> str:
        return f"{self._begin}.{self._sources}-{uuid.uuid4().hex[:12]}.{number}.nbc"

    def save(self, key: Any, data: Any) -> None:
        """Add a form, and remove those of former sources."""
        super().save(key, data)
        for old in self._folder.glob(f"{glob.escape(self._begin)}.*.nbc"):
            if f".{self._sources}-" not in old.name:
                old.unlink(missing_ok=True)


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with options, for modules of this package: cached machine code is stale as soon as any kernel's
    source changes, and only then.
    """
    compiled = numba.njit(**options)

    def decorate(kernel: Callable[..., Any]) -> Any:
        dispatcher = compiled(kernel)
        cache = getattr(dispatcher, "_cache", None)  # numba has no public way to say what else machine code depends on
        if isinstance(cache, FunctionCache):
            cache._cache_file = KernelFiles(cache.cache_path, cache._impl.filename_base, kernel_sources(HOME))
        return dispatcher

    return decorate


@functools.cache
def kernel_sources(home: Path) -> str:
    """Digest of all modules with kernels below a folder, read once per process: their names and their text."""
    digest = hashlib.sha256()
    for path in sorted(path for floor in _FLOORS for path in (home / floor).rglob("*.py")):
        source = path.read_bytes()
        if b"@njit" in source:
            digest.update(f"{path.relative_to(home)} {len(source)} ".encode() + source)
    return digest.hexdigest()


@functools.cache
def _stamp(name: str) -> Path:
    """The file that exists once a program has compiled these sources with this numba for this processor."""
    from llvmlite.binding import get_host_cpu_name

    state = f"{numba.__version__} {sys.version} {get_host_cpu_name()} {kernel_sources(HOME)}"
    return FOLDER / f"{name}-{hashlib.sha256(state.encode()).hexdigest()[:16]}.stamp"


def is_compiled(program: str | None = None) -> bool:
    """Whether the kernels of this installation that a program (by default the warm-up) uses are compiled and kept."""
    return _stamp(_name(program)).exists()


def mark_compiled(program: str | None = None) -> None:
    """Say that the kernels of a program are compiled and kept. Where nothing can be written, nothing is said."""
    with contextlib.suppress(OSError):
        for old in FOLDER.glob(f"{_name(program)}-*.stamp"):
            old.unlink(missing_ok=True)
        _stamp(_name(program)).touch()


def compile_once(program: str | None = None) -> None:
    """Have the kernels of a program compiled unless that was done before; one line of the logger `moeplace` says so.

    Call it before a clock starts. If the program fails, kernels are compiled when they are first used.
    """
    if os.environ.get(NO_WARM_UP) or is_compiled(program):
        return
    with _alone():
        if is_compiled(program):  # by the process that was waited for
            return
        _log.warning("compiling kernels, once for this installation: about a minute")
        environment = {**os.environ, NO_WARM_UP: "1"}
        subprocess.run([sys.executable, "-m", program or WARM_UP], env=environment, stdout=sys.stderr, check=False)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Only one process at a time; all at once where the file system cannot lock."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            FOLDER.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((FOLDER / "moeplace.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
