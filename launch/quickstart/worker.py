"""One rank of the quickstart: checks the logits of every run, then serves all requests under each of them.

    python -m torch.distributed.run --standalone --nproc-per-node 4 -m moeplace.launch.quickstart.worker FOLDER

Shape letters: L MoE layers, V vocabulary.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeplace.launch.quickstart.calibration import measure_experts, measure_links
from moeplace.launch.quickstart.job import PROGRESS, REFERENCE, Job, RunSpec, failure_path, result_path
from moeplace.placement.placement_file import load_placement
from moeplace.profiling.errors import MoeplaceError
from moeplace.profiling.files import write_json
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.kv.cache import kv_bytes_per_position

SERVED, CHECKED = torch.float32, torch.float64
"""Number types of the timed runs and of the comparison with the plain model."""


@dataclass
class Served:
    """What one run did.

    Attributes:
        counters: snapshot over the counted decode steps: all but the first.
        tokens_L: assignments computed here by layer, over the same steps.
        first_step_bytes: bytes sent in the first decode step, in which `coherent` hands over the K/V of the prompts.
        completions: token ids per request.
        step_seconds: of the timed decode steps, all but the first of each round.
    """

    counters: dict[str, Any]
    tokens_L: list[int]
    first_step_bytes: int
    completions: list[tuple[int, ...]]
    step_seconds: list[float] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Do the job in the folder; 0 = done, 1 = failed, with the reason in a file."""
    folder, rank = Path(arguments[0]), int(os.environ.get("RANK", "0"))
    try:
        write_json(result_path(folder, rank), run_job(folder))
    except Exception as error:
        sentence = str(error) if isinstance(error, MoeplaceError) else f"{type(error).__name__}: {error}"
        traceback.print_exc()
        failure_path(folder, rank).write_text(" ".join(sentence.split()))
        return 1
    return 0


def run_job(folder: Path) -> dict[str, Any]:
    """Everything this rank measures."""
    torch.set_num_threads(1)
    job = Job.load(folder)
    group = RankGroup.from_environment(timeout=job.timeout, device="cpu")
    advance = _progress(folder, group.rank, total=2 * len(job.runs) + job.rounds + 1)
    reference = np.load(folder / REFERENCE, allow_pickle=False)
    checks = []
    for index in range(len(job.runs)):
        checks.append(_check(job, index, group, reference))
        advance()
    calibration = _engine(job, job.calibration, group, SERVED)
    step_seconds = _calibrate(calibration, job)
    advance()
    engines = [_engine(job, run, group, SERVED) for run in job.runs]
    served = []
    for engine in engines:
        served.append(_count(engine, job))
        advance()
    for number in range(job.rounds):
        _time(engines, served, job, name=f"round {number}")
        advance()
    return {
        "checks": checks,
        "runs": [_summary(totals, job) for totals in served],
        "calibration_step_seconds": step_seconds,
        "links": measure_links(group, width=engines[0].executor.decoder.hidden_size),
        "experts": measure_experts(calibration),
        "kv_bytes_per_position": kv_bytes_per_position(engines[0].executor.decoder),
        "dtype_bytes": SERVED.itemsize,
    }


def _engine(job: Job, run: RunSpec, group: RankGroup, dtype: torch.dtype) -> Engine:
    prompt_tokens = sum(map(len, job.prompts))
    limits = EngineLimits(
        max_sequences=len(job.prompts),
        max_length=len(job.prompts[0]) + job.new_tokens,
        max_prefill_tokens=prompt_tokens,
    )
    return Engine(job.model, load_placement(run.file), mode=run.mode, group=group, dtype=dtype, limits=limits)


def _check(job: Job, index: int, group: RankGroup, reference: np.ndarray) -> dict[str, Any]:
    """Largest difference of a logit from the plain model's, prompts by prefill and the rest by decoding."""
    engine = _engine(job, job.runs[index], group, CHECKED)
    prompts, added = job.prompts[: job.checked], job.completions[: job.checked]
    sequences = [[*prompt, *tokens[:-1]] for prompt, tokens in zip(prompts, added, strict=True)]
    logits = torch.stack(engine.score(sequences, prompt_lengths=[len(prompt) for prompt in prompts])).numpy()
    greedy = logits.argmax(axis=2)[:, len(prompts[0]) - 1 :]
    return {
        "logits_difference": float(np.abs(logits - reference).max()),
        "tokens_compared": int(greedy.size),
        "tokens_identical": int((greedy == np.array(added)).sum()),
    }


def _calibrate(engine: Engine, job: Job) -> list[float]:
    """Seconds of the decode steps of requests that no run serves, all but the first."""
    seconds: list[float] = []
    for number in range(job.rounds):
        _start(engine, job.calibration_prompts, job.new_tokens, f"calibration {number}")
        engine.step()
        while not engine.scheduler.is_idle:
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
    return seconds


def _count(engine: Engine, job: Job) -> Served:
    """Complete all requests greedily and count what the ranks exchange."""
    group, done = engine.group, {}
    _start(engine, job.prompts, job.new_tokens, "counted")
    group.counters.reset()
    engine.step()
    first_step_bytes = _bytes_sent(engine.counters())
    group.counters.reset()
    while not engine.scheduler.is_idle:
        done.update({completion.request_id: completion.token_ids for completion in engine.step()})
    counters = engine.counters()
    tokens_L = [int(group.counters.tokens[layer]) for layer in range(engine.checkpoint.num_layers)]
    completions = [done[_name("counted", number)] for number in range(len(job.prompts))]
    return Served(counters, tokens_L, first_step_bytes, completions)


def _time(engines: Sequence[Engine], served: Sequence[Served], job: Job, *, name: str) -> None:
    """Complete all requests under every run at once, step by step in turn: what disturbs the machine disturbs all."""
    for engine in engines:
        _start(engine, job.prompts, job.new_tokens, name)
        engine.step()
    while not engines[0].scheduler.is_idle:
        for engine, totals in zip(engines, served, strict=True):
            start = time.perf_counter()
            engine.step()
            totals.step_seconds.append(time.perf_counter() - start)


def _start(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, name: str) -> None:
    """Queue all requests and prefill them."""
    for number, prompt in enumerate(prompts):
        request = Request(_name(name, number), tuple(prompt), max_new_tokens=new_tokens, stop_ids=())
        engine.add_request(request)
    engine.step()


def _name(name: str, number: int) -> str:
    return f"{name}, request {number}"


def _summary(totals: Served, job: Job) -> dict[str, Any]:
    steps = max(int(totals.counters["steps"]), 1)
    matches = [ours == tuple(plain) for ours, plain in zip(totals.completions, job.completions, strict=True)]
    return {
        "step_seconds": totals.step_seconds,
        "counters": totals.counters,
        "tokens_L": totals.tokens_L,
        "handover_bytes": totals.first_step_bytes - _bytes_sent(totals.counters) / steps,
        "completions_identical": sum(matches),
    }


def _bytes_sent(counters: dict[str, Any]) -> int:
    return int(counters["bytes_sent"]["intra_node"] + counters["bytes_sent"]["inter_node"])


def _progress(folder: Path, rank: int, *, total: int) -> Callable[[], None]:
    """A function that notes one more of `total` pieces done; rank 0 speaks for the group."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if rank == 0:
            (folder / PROGRESS).write_text(f"{done / total:.3f}")

    return advance


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
