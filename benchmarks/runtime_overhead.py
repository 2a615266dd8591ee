"""What the runtime costs on one rank: its passes against the plain Hugging Face forward of the same model.

    python benchmarks/runtime_overhead.py [MODEL] [--dtype float32] [--runs 31] [--json F]

Both run in one process on one thread, in alternation; medians are compared. Prefill is a whole batch of prompts, decode
one token for every sequence behind them. Both compute the logits of all their positions.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from moeplace.profiling.recording.cache_names import cache_keyword, cache_of
from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request, RunningSequence

SHAPES = ((1, 128), (8, 128), (32, 64))
"""Sequences and prompt tokens."""
SHIPPED = Path(__file__).resolve().parent.parent / "launch" / "data" / "tiny-moe"


class Plain:
    """The Hugging Face model as it is."""

    def __init__(self, path: str, dtype: torch.dtype, ids: torch.Tensor, new: torch.Tensor) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        self._ids, self._new = ids, new
        with torch.inference_mode():
            self._cache = cache_of(self._model(ids, use_cache=True))
        self._keyword = cache_keyword(self._model.forward)

    @torch.inference_mode()
    def prefill(self) -> torch.Tensor:
        return self._model(self._ids, use_cache=True).logits.flatten(0, 1)

    @torch.inference_mode()
    def decode(self) -> torch.Tensor:
        return self._model(self._new, **{self._keyword: self._cache}, use_cache=True).logits[:, 0]

    def rewind(self) -> None:
        added = self._cache.get_seq_length() - self._ids.shape[1]
        if added:
            self._cache.crop(-added)


class Ours:
    """The executor of an engine on one rank."""

    def __init__(self, path: str, dtype: torch.dtype, ids: torch.Tensor, new: torch.Tensor) -> None:
        sequences, tokens = ids.shape
        limits = EngineLimits(max_sequences=sequences, max_length=tokens + 1)
        self._executor = Engine(path, dtype=dtype, limits=limits).executor
        self._tokens = tokens
        self._sequences = [
            RunningSequence(Request(str(row), tuple(prompt)), home=0, row=row, token_ids=[*prompt, int(token)])
            for row, (prompt, token) in enumerate(zip(ids.tolist(), new[:, 0], strict=True))
        ]
        self.prefill()

    def prefill(self) -> torch.Tensor:
        for sequence in self._sequences:
            sequence.cached = 0
        return self._run(self._tokens)

    def decode(self) -> torch.Tensor:
        return self._run(1)

    @torch.inference_mode()
    def _run(self, tokens: int) -> torch.Tensor:
        batch = Batch.of(self._sequences, [tokens] * len(self._sequences), has_prompts=tokens > 1)
        return self._executor.decoder.logits(self._executor.run(batch, "allgather").x)

    def rewind(self) -> None:
        for sequence in self._sequences:
            sequence.cached = self._tokens


def compare(ours: Ours, plain: Plain, what: str, runs: int) -> dict[str, float]:
    """Median seconds of both, alternating, the first two runs dropped; and the largest difference of their logits."""
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    bodies: dict[str, Any] = {"ours": ours, "plain": plain}
    logits = {}
    for _ in range(runs + 2):
        for name, body in bodies.items():
            run: Callable[[], torch.Tensor] = getattr(body, what)
            start = time.perf_counter()
            logits[name] = run()
            seconds[name].append(time.perf_counter() - start)
            body.rewind()
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    difference = (logits["ours"] - logits["plain"]).abs().max().item()
    return {**medians, "ratio": medians["ours"] / medians["plain"], "largest_difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SHIPPED))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--json", metavar="F")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype, results = getattr(torch, args.dtype), []
    for sequences, tokens in SHAPES:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 1000, (sequences, tokens), generator=generator)
        new = torch.randint(0, 1000, (sequences, 1), generator=generator)
        ours, plain = Ours(args.model, dtype, ids, new), Plain(args.model, dtype, ids, new)
        for what in ("prefill", "decode"):
            result = {"what": what, "sequences": sequences, "tokens": tokens, **compare(ours, plain, what, args.runs)}
            results.append(result)
            print(
                f"{what:8}{sequences:3} x {tokens:4}   ours {1e3 * result['ours']:8.2f} ms   plain "
                f"{1e3 * result['plain']:8.2f} ms   ratio {result['ratio']:.3f}   logits differ by at most "
                f"{result['largest_difference']:.1e}"
            )
    if args.json:
        conditions = {"model": args.model, "dtype": args.dtype, "runs": args.runs, "machine": platform.processor()}
        conditions |= {"threads": 1, "torch": torch.__version__, "transformers": transformers.__version__}
        Path(args.json).write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
