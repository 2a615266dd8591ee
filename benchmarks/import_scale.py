"""Import and stats of a large trace: seconds and peak memory of the two commands, each in its own process.

    python benchmarks/import_scale.py [--tokens 1000000] [--layers 58] [--experts 256] [--top-k 8] [--json F]

The source is an uncompressed interchange file with 128-token sequences, generated once in DIR (about 1 GB by default).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHUNK = 20_000


def main() -> None:
    """Generate, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--folder", help="where the files go; kept there. By default a temporary folder")
    parser.add_argument("--json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, trace = Path(folder) / "source.npz", Path(folder) / "trace.npz"
        generate(source, args)
        figures = {
            "tokens": args.tokens,
            "layers": args.layers,
            "experts": args.experts,
            "top_k": args.top_k,
            "source_bytes": source.stat().st_size,
            "cores": len(os.sched_getaffinity(0)),
            "import": measure(["import", str(source), "--from", "npz", "--out", str(trace)]),
            "stats": measure(["stats", str(trace), "--json", str(Path(folder) / "stats.json")]),
        }
    figures["seconds"] = figures["import"]["seconds"] + figures["stats"]["seconds"]
    print(json.dumps(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


def generate(path: Path, args: argparse.Namespace) -> None:
    """A skewed trace, written in pieces: every token takes K consecutive experts of a permutation of its layer."""
    rng = np.random.default_rng(0)
    label_LE = np.stack([rng.permutation(args.experts) for _ in range(args.layers)]).astype(np.int16)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        shape = (args.tokens, args.layers, args.top_k)
        ids = np.lib.format.open_memmap(Path(folder) / "ids.npy", mode="w+", dtype=np.int16, shape=shape)
        for start in range(0, args.tokens, CHUNK):
            count = min(CHUNK, args.tokens - start)
            first_TL = (args.experts * rng.random((count, args.layers)) ** 1.3).astype(np.int64)
            chosen = (first_TL[:, :, None] + np.arange(args.top_k)) % args.experts
            ids[start : start + count] = label_LE[np.arange(args.layers)[:, None], chosen]
        np.savez(path, experts=ids, sequence_ids=np.arange(args.tokens, dtype=np.int32) // 128)


def measure(arguments: list[str]) -> dict[str, float]:
    """Seconds and peak resident memory (MiB, mapped pages of the files included) of one `moeplace` command."""
    code = "import sys; from moeplace.launch.cli import main; sys.exit(main(sys.argv[1:]))"
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", code, *arguments], os.environ)
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"moeplace {' '.join(arguments)} failed")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}


if __name__ == "__main__":
    main()
