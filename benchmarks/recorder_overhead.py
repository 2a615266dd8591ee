"""What recording adds to the forward time of a Hugging Face model, measured side by side.

    python benchmarks/recorder_overhead.py [MODEL] [--rounds 20] [--passes 2] [--batch 8] [--length 128] [--json F]

Plain and recorded rounds alternate on the same inputs, after a warm-up; the ratio of every neighbouring pair is taken
and the median reported with its quartiles, beside it the ratio of the fastest tenths, which other programs disturb
least. MODEL is a checkpoint folder; by default a model of OLMoE's architecture with random weights: all of its experts
and its top-k, half of its layers, a quarter of its hidden sizes. Recording costs the same per token, layer and choice,
the experts of the forward pass a sixteenth: the share of the real model is lower.
"""

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from moeplace.profiling.recording.checkpoint_profile import load_model
from moeplace.profiling.recording.recorder import Recorder


def main() -> None:
    """Measure and print one line; `--json` writes the same figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--passes", type=int, default=2, help="forward passes of a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--expert-hidden", type=int, default=256)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model)[0] if args.model else random_model(args)
    tokens = torch.randint(1, 1000, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    seconds = measure(model, tokens, args.rounds, args.passes)  # (plain or recorded, round, wall or CPU)
    ratios = seconds[1] / seconds[0] - 1
    config = model.config
    figures = {
        "model": args.model
        or f"random OLMoE, {args.layers} layers, {args.experts} experts, top-{args.top_k}, hidden "
        f"{args.hidden}, expert hidden {args.expert_hidden}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "number_type": str(next(model.parameters()).dtype),
        "layers": config.num_hidden_layers,
        "tokens_per_pass": tokens.numel(),
        "rounds": args.rounds,
        "passes_per_round": args.passes,
        "plain_seconds": float(np.median(seconds[0, :, 0])),
        "recorded_seconds": float(np.median(seconds[1, :, 0])),
        "overhead": float(np.median(ratios[:, 0])),
        "overhead_quartiles": np.quantile(ratios[:, 0], (0.25, 0.75)).tolist(),
        "fastest_tenth_overhead": float(np.divide(*np.quantile(seconds[:, :, 0], 0.1, axis=1)[::-1]) - 1),
        "plain_cpu_seconds": float(np.median(seconds[0, :, 1])),
        "cpu_overhead": float(np.median(ratios[:, 1])),
        "cpu_overhead_quartiles": np.quantile(ratios[:, 1], (0.25, 0.75)).tolist(),
        "fastest_tenth_cpu_overhead": float(np.divide(*np.quantile(seconds[:, :, 1], 0.1, axis=1)[::-1]) - 1),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    print(json.dumps(figures))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


def random_model(args: argparse.Namespace) -> torch.nn.Module:
    """OLMoE's architecture in the sizes asked for, seeded."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=1000,
        hidden_size=args.hidden,
        intermediate_size=args.expert_hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 128, 1),
        num_key_value_heads=max(args.hidden // 128, 1),
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        pad_token_id=0,
    )
    return OlmoeForCausalLM(config).eval()


def measure(model: torch.nn.Module, tokens: torch.Tensor, rounds: int, passes: int) -> np.ndarray:
    """Seconds per pass, float array (2, rounds, 2): plain and recorded; wall and CPU time. The order alternates.

    A round is `passes` passes. The recorded one includes all that recording costs: opening, appending, closing the
    file. CPU time is the figure to read on a machine that others use too.
    """
    seconds = np.zeros((2, rounds + 1, 2))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for number in range(rounds + 1):
            for record in (0, 1) if number % 2 else (1, 0):
                start = np.array([time.perf_counter(), time.process_time()])
                with Recorder(model, Path(folder) / "t") if record else nullcontext():
                    for _ in range(passes):
                        model(input_ids=tokens, use_cache=False)
                end = np.array([time.perf_counter(), time.process_time()])
                seconds[record, number] = (end - start) / passes
    return seconds[:, 1:]  # the first round warms up


if __name__ == "__main__":
    main()
