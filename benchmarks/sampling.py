"""Seconds of a batch of draws: the sampler of the runtime, beside one that sorts every row in float64.

    python benchmarks/sampling.py --rows 64 --vocabulary 152000 --threads 2 --json F

Logits are normal numbers of several spreads: 3 is like those of a language model, 1 is flat, and the worst for draws
that are rejected. Times are medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moeplace.runtime.engine.sampler import Draw, draw_tokens
from moeplace.runtime.engine.sampling import SamplingParameters

SPREADS = (3.0, 1.0)
KINDS = {
    "greedy": SamplingParameters(),
    "temperature 0.8": SamplingParameters(0.8, seed=1),
    "temperature 0.8, top-p 0.95": SamplingParameters(0.8, top_p=0.95, seed=1),
    "temperature 1, top-p 0.5": SamplingParameters(1.0, top_p=0.5, seed=1),
    "temperature 1, top-k 50, top-p 0.9": SamplingParameters(1.0, 50, 0.9, seed=1),
    "temperature 1, min-p 0.05": SamplingParameters(1.0, min_p=0.05, seed=1),
}
SORTED = SamplingParameters(0.8, top_p=0.95)


def sort_and_draw(logits: torch.Tensor, parameters: SamplingParameters) -> None:
    """Top-p row by row, by sorting: what the sampler must not cost."""
    for row in logits:
        probability = (row.double() / (parameters.temperature or 1)).softmax(0)
        ordered, index = probability.sort(descending=True, stable=True)
        kept = ordered * (ordered.cumsum(0) - ordered < parameters.top_p)
        index[torch.multinomial(kept, 1)]


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of `repeats` calls, after one that is not counted."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=152_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", metavar="F")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, float] = {}
    for spread in SPREADS:
        logits = torch.randn(args.rows, args.vocabulary, generator=torch.Generator().manual_seed(0)) * spread
        for name, parameters in KINDS.items():
            draws = [Draw(parameters, position) for position in range(args.rows)]
            label = f"{name}, spread {spread:g}"
            figures[label] = median_seconds(lambda b=logits, d=draws: draw_tokens(b, d), args.repeats)  # type: ignore[misc]
            print(f"{label:50} {1e3 * figures[label]:8.1f} ms", flush=True)
        label = f"sorted row by row, top-p 0.95, spread {spread:g}"
        figures[label] = median_seconds(lambda b=logits: sort_and_draw(b, SORTED), 1)  # type: ignore[misc]
        print(f"{label:50} {1e3 * figures[label]:8.1f} ms", flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**vars(args), "torch": torch.__version__, "median_seconds": figures}, file, indent=1)


if __name__ == "__main__":
    main()
