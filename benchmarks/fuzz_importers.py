"""Damages valid files of every format that `moeplace import` reads and imports the result.

    python benchmarks/fuzz_importers.py [--mutations 10000] [--seed 0] [--memory-mib 2048] [--only NAME]

A run is good when each import either succeeds or raises one of our errors: any other exception, a warning of another
library, a file left behind by a failure, or memory beyond the limit (RLIMIT_AS over what the process had at the start)
is a finding. A canary checks that nothing in a file is ever executed. Findings are kept in the folder `fuzz-findings`.
"""

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the valid sources are those of the tests

from moeplace.profiling.errors import MoeplaceError, MoeplaceWarning
from moeplace.profiling.imports.canonical import ImportOptions
from moeplace.profiling.imports.sources import import_from
from tests.profiling.mutations import mutate_source
from tests.profiling.sources import SOURCES


def main() -> int:
    """Run; returns 0 without findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000, help="per format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-mib", type=int, default=2048)
    parser.add_argument("--only", choices=SOURCES)
    args = parser.parse_args()
    findings = 0
    with tempfile.TemporaryDirectory() as folder:
        originals = {
            name: SOURCES[name][1](_made(Path(folder) / name)) for name in ([args.only] if args.only else SOURCES)
        }
        for name, original in originals.items():  # once each before the limit: compiles the kernels
            attempt(SOURCES[name][0], original, Path(folder) / "out")
        limit_memory(args.memory_mib)
        for name, original in originals.items():
            counts, start = {"read": 0, "refused": 0}, time.perf_counter()
            for number in range(args.mutations):
                rng = np.random.default_rng([args.seed, number])
                damaged = mutate_source(original, Path(folder) / "damaged", rng)
                try:
                    counts["read" if attempt(SOURCES[name][0], damaged, Path(folder) / "out") else "refused"] += 1
                except BaseException:
                    findings += 1
                    keep(damaged, f"{name}-{args.seed}-{number}")
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(
                json.dumps({"source": name, **counts, "findings": findings, "seconds": seconds, "peak_mib": peak}),
                flush=True,
            )
    return 1 if findings else 0


def attempt(source_format: str, path: Path, out: Path) -> bool:
    """Import; True = read, False = refused with one of our errors and nothing written.

    Raises:
        Exception: anything else.
    """
    out.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", MoeplaceWarning)
        try:
            import_from(source_format, path, out, ImportOptions())
        except MoeplaceError as error:
            if not str(error) or "\n" in str(error) or len(str(error)) > 2000:
                raise AssertionError(f"not one sentence: {str(error)[:300]!r}") from error
            if out.exists() or list(out.parent.glob(".out.*")):
                raise AssertionError("a refused import left a file") from error
            return False
    return True


def limit_memory(mib: int) -> None:
    """Cap the address space at what is mapped now plus `mib`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def keep(path: Path, name: str) -> None:
    """Save a finding and say what it was."""
    traceback.print_exc()
    target = Path("fuzz-findings") / name
    target.parent.mkdir(exist_ok=True)
    (shutil.copytree if path.is_dir() else shutil.copy)(path, target)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
