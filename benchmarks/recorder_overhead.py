"""What recording adds to the forward time of a Hugging Face model, measured side by side.

    python benchmarks/recorder_overhead.py [MODEL] [--rounds 10] [--batch 16] [--length 128] [--json F]

Plain and recorded rounds of 32 passes alternate on the same inputs, after a warm-up; the ratio of every neighbouring pair is
taken and the median reported with its quartiles. MODEL is a checkpoint folder; by default the shipped model.
"""

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from moeplace.profiling.recorder import Recorder, load_model

PASSES = 32
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / "launch" / "data" / "tiny-moe"


def main() -> None:
    """Measure and print one line; `--json` writes the same figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(DEFAULT_MODEL))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json")
    args = parser.parse_args()
    model, _ = load_model(args.model)
    tokens = torch.randint(1, 1000, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    plain, recorded = measure(model, tokens, args.rounds)
    ratios = recorded / plain
    figures = {
        "model": args.model,
        "tokens_per_pass": tokens.numel(),
        "rounds": args.rounds,
        "passes_per_round": PASSES,
        "plain_seconds": float(np.median(plain)),
        "recorded_seconds": float(np.median(recorded)),
        "overhead": float(np.median(ratios) - 1),
        "overhead_quartiles": [float(q - 1) for q in np.quantile(ratios, (0.25, 0.75))],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


def measure(model: torch.nn.Module, tokens: torch.Tensor, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds per pass of every plain and every recorded round; which of a pair comes first alternates.

    A round is `PASSES` passes. The recorded one includes all that recording costs: opening, appending, closing the file.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for number in range(rounds + 1):
            for record in (0, 1) if number % 2 else (1, 0):
                start = time.perf_counter()
                with Recorder(model, Path(folder) / "t") if record else nullcontext():
                    for _ in range(PASSES):
                        model(input_ids=tokens, use_cache=False)
                seconds[record].append((time.perf_counter() - start) / PASSES)
    return np.array(seconds[0][1:]), np.array(seconds[1][1:])


if __name__ == "__main__":
    main()
