"""What needs a card, in under 8 minutes: each check compares results first, then times both sides.

    python benchmarks/gpu_check.py [--device cuda:0] [--budget 450] [--json F]
    python benchmarks/gpu_check.py --device cpu          the same checks, small, to see that they run

products    grouped products of experts against a loop over them, few rows and many
recorder    a forward pass with and without recording its routing
sampling    64 draws from 152,000 logits, greedy and with temperature and top-p
decode      a decode step of one rank: the engine's own, in fixed shapes, on kept tensors, and as a CUDA graph

A check that does not fit into what is left of the budget is left out and said so. Exit code 1: a result was wrong, or a
check broke down.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from moeplace.profiling.recording.recorder import Recorder as RoutingRecorder
from moeplace.profiling.traces.file import load_trace
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampler import Draw, draw_tokens
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.experts.grouped import grouped_linear, looped_linear
from moeplace.runtime.measure.captured_decode import CapturedDecode, CudaRecorder, EagerRecorder, Recorder

Figures = dict[str, Any]
_WARM_UPS = 3


@dataclass(frozen=True)
class Sizes:
    """Of all checks.

    Attributes:
        hidden, expert_hidden, experts, top_k, layers, heads, vocabulary: of the model.
        product_rows: assignments of a layer.
        sequences, prompt: of the decode step.
        draws, logits: of sampling.
        repeats: timed runs of each side.
    """

    hidden: int
    expert_hidden: int
    experts: int
    top_k: int
    layers: int
    heads: int
    vocabulary: int
    product_rows: tuple[int, ...]
    sequences: int
    prompt: int
    draws: int
    logits: int
    repeats: int


ON_CARD = Sizes(2048, 1024, 64, 8, 8, 16, 50304, (64, 512, 8192), 32, 128, 64, 152_000, 30)
SMALL = Sizes(64, 32, 8, 2, 2, 4, 512, (16, 64), 4, 8, 8, 2000, 3)


class Bench:
    """Times functions on a device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self._repeats = device, repeats

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median of a run, the device waited for each time."""
        for _ in range(_WARM_UPS):
            run()
        found = []
        for _ in range(self._repeats):
            self.synchronise()
            start = time.perf_counter()
            run()
            self.synchronise()
            found.append(time.perf_counter() - start)
        return statistics.median(found)


def require_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> float:
    """Largest difference, relative to the largest number.

    Raises:
        AssertionError: it exceeds the tolerance.
    """
    scale = float(wanted.double().abs().max().clamp(min=1e-30))
    difference = float((found.double() - wanted.double()).abs().max()) / scale
    assert difference <= tolerance, f"{what} differ by {difference:.3g} of the largest, more than {tolerance:g}"
    return difference


@torch.inference_mode()
def check_products(sizes: Sizes, bench: Bench) -> Figures:
    """Rows shared out at random; the loop reads the sizes on the host, as it must."""
    generator, device = torch.Generator().manual_seed(0), bench.device
    weight = torch.randn(sizes.experts, 2 * sizes.expert_hidden, sizes.hidden, generator=generator)
    weight = (weight / sizes.hidden**0.5).to(device, torch.bfloat16)
    matrices = weight.transpose(1, 2).unbind(0)
    figures: Figures = {}
    for rows in sizes.product_rows:
        x = torch.randn(rows, sizes.hidden, generator=generator).to(device, torch.bfloat16)
        counts = torch.bincount(torch.randint(sizes.experts, (rows,), generator=generator), minlength=sizes.experts)
        ends = counts.cumsum(0).to(device, torch.int32)
        numbers = counts.numpy()
        looped = looped_linear(x, matrices, numbers)
        grouped = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
        figures[f"{rows} rows"] = {
            "difference": require_close(grouped, looped, 2e-2, "grouped and looped products"),
            "grouped_seconds": bench.seconds(lambda x=x, ends=ends: grouped_linear(x, weight, ends)),  # type: ignore[misc]
            "looped_seconds": bench.seconds(lambda x=x, n=numbers: looped_linear(x, matrices, n)),  # type: ignore[misc]
        }
    return figures


def random_model(sizes: Sizes) -> Any:
    """OLMoE's architecture with random weights."""
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.expert_hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        max_position_embeddings=512,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=1 / sizes.hidden**0.5,
    )
    return transformers.OlmoeForCausalLM(config).to(torch.bfloat16).eval()


@torch.inference_mode()
def check_recorder(sizes: Sizes, bench: Bench) -> Figures:
    """Passes with and without a recorder; what it records is what a second recording records."""
    model = random_model(sizes).to(bench.device)
    tokens = torch.randint(sizes.vocabulary, (4, 2 * sizes.prompt), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(bench.device)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"

        def run(*, recorded: bool) -> None:
            with RoutingRecorder(model, path) if recorded else nullcontext():
                model(tokens, use_cache=False)

        traces = []
        for _ in range(2):
            run(recorded=True)
            traces.append(load_trace(path).topk_ids)
        assert np.array_equal(*traces), "two recordings of the same pass differ"
        plain = bench.seconds(lambda: run(recorded=False))
        with_recorder = bench.seconds(lambda: run(recorded=True))
    return {"tokens": tokens.numel(), "plain_seconds": plain, "recorded_seconds": with_recorder}


def check_sampling(sizes: Sizes, bench: Bench) -> Figures:
    """The same draws as on the CPU, where the numbers are the same to the bit."""
    logits = 3 * torch.randn(sizes.draws, sizes.logits, generator=torch.Generator().manual_seed(0))
    here = logits.to(bench.device)
    kinds = {"greedy": SamplingParameters(), "temperature, top-p": SamplingParameters(0.8, top_p=0.95, seed=1)}
    figures: Figures = {}
    for name, parameters in kinds.items():
        draws = [Draw(parameters, position) for position in range(sizes.draws)]
        same = (draw_tokens(here, draws).cpu() == draw_tokens(logits, draws).cpu()).double().mean()
        assert same >= 0.95, f"only {float(same):.0%} of the draws ({name}) are those of the CPU"
        seconds = bench.seconds(lambda draws=draws: draw_tokens(here, draws))  # type: ignore[misc]
        figures[name] = {"same_as_cpu": float(same), "seconds": seconds}
    return figures


@torch.inference_mode()
def check_decode(sizes: Sizes, bench: Bench) -> Figures:
    """Four forms of the same step."""
    room = sizes.prompt + 8 * (sizes.repeats + _WARM_UPS) + 32
    with tempfile.TemporaryDirectory() as folder:
        random_model(sizes).save_pretrained(folder)
        engines = {name: _start_engine(folder, sizes, bench, room, name == "fixed") for name in ("exact", "fixed")}
    figures: Figures = {f"{name}_seconds": bench.seconds(engine.step) for name, engine in engines.items()}
    recorders: dict[str, Recorder] = {"kept tensors": EagerRecorder()}
    if bench.device.type == "cuda":
        recorders["graph"] = CudaRecorder()
    engine: Any = engines["fixed"]
    executor, running = engine.executor, engine.scheduler.running
    ids = [s.token_ids[s.cached] for s in running], [s.row for s in running], [s.cached for s in running]
    inputs = [torch.tensor(numbers, device=bench.device) for numbers in ids]
    logits = {}
    for name, recorder in recorders.items():
        fixed = executor.fixed_shapes("dispatch-combine").fixed
        reach = -(-(max(ids[2]) + 1) // 64) * 64 if room >= 64 else room
        captured = CapturedDecode(
            executor.decoder,
            executor.cache,
            fixed,
            sequences=len(running),
            reach=min(reach, executor.cache.positions),
            recorder=recorder,
        )
        captured.step(*inputs)
        logits[name] = captured.step(*inputs).clone()
        figures[f"{name}_seconds"] = bench.seconds(lambda captured=captured: captured.step(*inputs))  # type: ignore[misc]
    for name, found in logits.items():
        figures[f"{name}_difference"] = require_close(found, logits["kept tensors"], 2e-2, f"logits of {name}")
    return figures


def _start_engine(folder: str, sizes: Sizes, bench: Bench, room: int, fixed_shapes: bool) -> Engine:
    """An engine of one rank, its sequences running."""
    group = RankGroup.from_environment(timeout=60, device=str(bench.device))
    limits = EngineLimits(
        max_sequences=sizes.sequences, max_length=min(room, 512), reuses_prefixes=False, fixed_shapes=fixed_shapes
    )
    engine = Engine(folder, group=group, limits=limits)
    generator = torch.Generator().manual_seed(2)
    for number in range(sizes.sequences):
        prompt = torch.randint(1, sizes.vocabulary, (sizes.prompt,), generator=generator).tolist()
        new = min(room, 512) - sizes.prompt
        engine.add_request(Request(str(number), tuple(prompt), max_new_tokens=new, stop_ids=()))
    while engine.scheduler.waiting or not engine.scheduler.running:
        engine.step()
    return engine


CHECKS: dict[str, Callable[[Sizes, Bench], Figures]] = {
    "products": check_products,
    "sampling": check_sampling,
    "decode": check_decode,
    "recorder": check_recorder,
}


def run_checks(device: torch.device, sizes: Sizes, budget: float) -> tuple[Figures, list[str]]:
    """Figures by check, and what went wrong."""
    bench, begin = Bench(device, sizes.repeats), time.monotonic()
    figures: Figures = {}
    wrong: list[str] = []
    for name, check in CHECKS.items():
        if time.monotonic() - begin > budget:
            wrong.append(f"{name}: left out, the budget of {budget:g} s was spent")
            continue
        start = time.monotonic()
        try:
            figures[name] = check(sizes, bench)
        except Exception as error:  # the other checks may do; the message is what there is to know
            wrong.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        print(f"{name}: {time.monotonic() - start:.0f} s {json.dumps(figures.get(name, 'failed'))}", flush=True)
    return figures, wrong


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu for small sizes (cuda:0)")
    parser.add_argument(
        "--budget", type=float, default=450.0, metavar="S", help="seconds after which no check begins (450)"
    )
    parser.add_argument("--json", metavar="F", help="write the figures to F")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "gpu_check: this machine has no GPU that torch can use; --device cpu runs the checks small", file=sys.stderr
        )
        return 1
    sizes = ON_CARD if device.type == "cuda" else SMALL
    figures, wrong = run_checks(device, sizes, args.budget)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    document = {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sizes": asdict(sizes),
        "figures": figures,
        "wrong": wrong,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(document, indent=1))
    for sentence in wrong:
        print(f"gpu_check: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
