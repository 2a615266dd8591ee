"""What recording adds to the forward time of a Hugging Face model, measured side by side.

    python benchmarks/recorder_overhead.py [MODEL] [--rounds 10] [--batch 16] [--length 128] [--threads 1] [--json F]

Plain and recorded rounds of 32 passes alternate on the same inputs, after a warm-up; the ratio of every neighbouring
pair is taken and the median reported with its quartiles. MODEL is a checkpoint folder; by default the shipped model.
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    model, _ = load_model(args.model)
    tokens = torch.randint(1, 1000, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(args.threads)
    seconds = measure(model, tokens, args.rounds)  # (plain or recorded, round, wall or CPU)
    ratios = seconds[1] / seconds[0] - 1
    figures = {
        "model": args.model,
        "tokens_per_pass": tokens.numel(),
        "rounds": args.rounds,
        "passes_per_round": PASSES,
        "plain_seconds": float(np.median(seconds[0, :, 0])),
        "recorded_seconds": float(np.median(seconds[1, :, 0])),
        "overhead": float(np.median(ratios[:, 0])),
        "overhead_quartiles": np.quantile(ratios[:, 0], (0.25, 0.75)).tolist(),
        "cpu_overhead": float(np.median(ratios[:, 1])),
        "cpu_overhead_quartiles": np.quantile(ratios[:, 1], (0.25, 0.75)).tolist(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


def measure(model: torch.nn.Module, tokens: torch.Tensor, rounds: int) -> np.ndarray:
    """Seconds per pass, float array (2, rounds, 2): plain and recorded; wall and CPU time. The order alternates.

    A round is `PASSES` passes. The recorded one includes all that recording costs: opening, appending, closing the
    file. CPU time is the figure to read on a machine that others use too.
    """
    seconds = np.zeros((2, rounds + 1, 2))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for number in range(rounds + 1):
            for record in (0, 1) if number % 2 else (1, 0):
                start = np.array([time.perf_counter(), time.process_time()])
                with Recorder(model, Path(folder) / "t") if record else nullcontext():
                    for _ in range(PASSES):
                        model(input_ids=tokens, use_cache=False)
                end = np.array([time.perf_counter(), time.process_time()])
                seconds[record, number] = (end - start) / PASSES
    return seconds[:, 1:]  # the first round warms up


if __name__ == "__main__":
    main()
