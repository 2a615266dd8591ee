"""The quickstart: profile a checkpoint, place its experts, serve it on local ranks, compare, report.

Runs are {index order, solved} x {dispatch-combine, coherent}. Every figure of a solved placement is judged on the
held-out half of the text. Predictions use links and expert time measured on the same ranks, and the time of everything
else in a layer from the first run.

Shape letters: T tokens, L MoE layers, R ranks, D hidden size.
"""

import os
import platform
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeplace.launch.progress import progress
from moeplace.launch.quickstart.job import PROGRESS, REFERENCE, Job, RunSpec, failure_path, result_path
from moeplace.launch.quickstart.local_ranks import run_local_ranks
from moeplace.launch.quickstart.plain_model import PlainModel
from moeplace.launch.quickstart.results import Results
from moeplace.launch.reports.comparison import AS_FAST, text_table, verdict
from moeplace.launch.reports.report import Report, write_report
from moeplace.placement.cluster import Cluster, even_slots
from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.placement_file import load_placement, save_placement
from moeplace.placement.problem import Problem
from moeplace.placement.result import SolveResult
from moeplace.placement.solve import solve
from moeplace.profiling.errors import InputError
from moeplace.profiling.files import read_json, write_json
from moeplace.profiling.traces.file import load_trace
from moeplace.profiling.traces.trace import RoutingTrace, Split

COMPARED_MODES: tuple[Mode, ...] = ("dispatch-combine", "coherent")
INDEX_ORDER, SOLVED = "index order", "solved"
MAX_IMBALANCE = 1.05
"""Cap on the training imbalance of every layer."""
SEQUENCE_LENGTH = 128
START_TIMEOUT = 60.0


@dataclass(frozen=True)
class QuickstartOptions:
    """What to do, and how much of it.

    Attributes:
        model: checkpoint folder, None = the one that ships with the package.
        texts: text files, empty = those that ship with the package.
        out: folder to write to; made if absent.
        ranks: processes on this machine.
        time_limit: seconds of search per mode.
        seed: of the search.
        requests: served at once; a multiple of the ranks spreads them evenly.
        prompt_tokens, new_tokens: per request.
        checked: requests whose logits are compared.
        rounds: how often each run serves all requests.
        sequences_per_text: sequences taken of each text at most, None = all.
        timeout: seconds for the ranks as a whole.
    """

    model: Path | None = None
    texts: tuple[Path, ...] = ()
    out: Path = Path("quickstart")
    ranks: int = 4
    time_limit: float = 10.0
    seed: int = 0
    requests: int = 64
    prompt_tokens: int = 32
    new_tokens: int = 32
    checked: int = 8
    rounds: int = 2
    sequences_per_text: int | None = None
    timeout: float = 240.0

    def __post_init__(self) -> None:
        for name, least in (("ranks", 2), ("requests", 1), ("prompt_tokens", 2), ("new_tokens", 4), ("rounds", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name.replace('_', ' ')} ({getattr(self, name)}) must be at least {least}")


def run_quickstart(options: QuickstartOptions) -> dict[str, Any]:
    """Do it all; prints the comparison and writes report.json and report.html.

    Returns:
        The content of report.json.

    Raises:
        MoeplaceError: an input does not fit, a rank failed, or the logits differ from the plain model's.
    """
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    model, texts = options.model or shipped("tiny-moe"), options.texts or shipped_texts()
    torch.set_num_threads(1)  # a small model's threads would mostly wait for each other
    say = _Stages(5)
    plain = PlainModel(
        model,
        texts,
        sequence_length=SEQUENCE_LENGTH,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        sequences_per_text=options.sequences_per_text,
    )
    prompts = plain.held_out_prompts(options.requests)
    trace = _profile(options, plain, say)
    solved = _solve(options, trace, say)
    with tempfile.TemporaryDirectory(prefix="moeplace-quickstart-") as name:
        folder = Path(name)
        job = _prepare(options, model, plain, prompts, trace, solved, folder, say)
        measured = _serve(options, job, folder, say)
        placements = [load_placement(run.file) for run in (job.calibration, *job.runs)]
    results = Results(_decoded(trace, "train"), _decoded(trace, "test"), placements[0], placements[1:], job, measured)
    document = _document(options, trace, solved, results)
    document["conditions"]["whole run"] = f"{time.monotonic() - started:.0f} s after installation"
    _write(options, trace, solved, document)
    say.done(f"wrote {options.out / 'report.html'} and report.json")
    print(f"\n{text_table(results.runs)}\n\n{results.check_line}\n{document['verdict']}")
    results.require_equal()
    return document


def shipped(name: str) -> Path:
    """A data folder of this package."""
    return Path(__file__).resolve().parent.parent / "data" / name


def shipped_texts() -> tuple[Path, ...]:
    """The texts that ship with the package."""
    return tuple(sorted(shipped("text").glob("*.txt")))


class _Stages:
    """Says on standard error what is done, with the time it took."""

    def __init__(self, total: int) -> None:
        self._total, self._count, self._start = total, 0, time.monotonic()

    def done(self, sentence: str) -> None:
        """One more stage is done."""
        self._count += 1
        now = time.monotonic()
        print(f"[{self._count}/{self._total}] {sentence}  ({now - self._start:.1f} s)", file=sys.stderr, flush=True)
        self._start = now


def _profile(options: QuickstartOptions, plain: PlainModel, say: _Stages) -> RoutingTrace:
    """Routing of the plain model while it serves: what decoding does is not what reading a text does."""
    path = options.out / "routing.trace"
    with progress("profiling") as report:
        plain.record(path, report)
    trace = load_trace(path)
    layers, experts = trace.num_layers, trace.num_experts
    say.done(f"profiled {trace.num_tokens:,} tokens: {layers} MoE layers of {experts} experts, top-{trace.top_k}")
    return trace


def _decoded(trace: RoutingTrace, side: Split) -> RoutingTrace:
    """The generated tokens of one side of the split by sequence."""
    half = trace.split(side)
    return half.select(np.asarray(half.is_decode))


def _solve(options: QuickstartOptions, trace: RoutingTrace, say: _Stages) -> dict[Mode, SolveResult]:
    train = _decoded(trace, "train")
    slots = even_slots(trace.num_experts, options.ranks)
    if not slots.all():
        raise InputError(f"ranks ({options.ranks}) must not exceed the experts of a layer ({trace.num_experts})")
    cluster = Cluster.uniform(options.ranks, slots_per_rank=slots.tolist())
    results: dict[Mode, SolveResult] = {}
    for mode in COMPARED_MODES:
        problem = Problem.from_trace(train, cluster, mode=mode, objective="traffic", max_imbalance=MAX_IMBALANCE)
        with progress(f"solving for {mode}") as report:
            results[mode] = solve(
                problem, solver="auto", time_limit=options.time_limit, seed=options.seed, report=report
            )
        result = results[mode]
        save_placement(_placement_path(options, mode), result.placement, solver=result.summary())
    gaps = ", ".join(f"{mode} {result.status}, gap {result.gap:.1%}" for mode, result in results.items())
    say.done(f"solved for {options.ranks} ranks: {gaps}")
    return results


def _placement_path(options: QuickstartOptions, mode: Mode) -> Path:
    return options.out / f"placement-{mode}.json"


def _index_order(trace: RoutingTrace, ranks: int, mode: Mode) -> Placement:
    return index_order(
        trace.experts_per_layer,
        even_slots(trace.num_experts, ranks),
        np.zeros(ranks, dtype=np.int64),
        layer_ids=trace.layer_ids,
        num_hidden_layers=trace.num_hidden_layers,
        mode=mode,
    )


def _prepare(
    options: QuickstartOptions,
    model: Path,
    plain: PlainModel,
    prompts: torch.Tensor,
    trace: RoutingTrace,
    solved: dict[Mode, SolveResult],
    folder: Path,
    say: _Stages,
) -> Job:
    """Write everything the ranks need."""
    answers = plain.answer(prompts, checked=min(options.checked, options.requests))
    np.save(folder / REFERENCE, answers.logits)
    runs = []
    for mode in COMPARED_MODES:
        for name, placement in (
            (INDEX_ORDER, _index_order(trace, options.ranks, mode)),
            (SOLVED, solved[mode].placement),
        ):
            path = folder / f"{name}-{mode}.json"
            save_placement(path, placement)
            runs.append(RunSpec(name, str(path), mode))
    job = Job(
        model=str(model),
        runs=runs,
        prompts=prompts.tolist(),
        completions=answers.completions,
        checked=len(answers.logits),
        rounds=options.rounds,
        calibration=_calibration_run(trace, options.ranks, folder),
        calibration_prompts=plain.fitted_prompts(options.requests).tolist(),
        timeout=START_TIMEOUT,
    )
    job.save(folder)
    say.done(f"asked the plain model to complete {options.requests} held-out prompts")
    return job


def _calibration_run(trace: RoutingTrace, ranks: int, folder: Path) -> RunSpec:
    """A placement that nobody compares, every expert one slot on from index order, in the mode of the baseline."""
    mode = COMPARED_MODES[0]
    first = _index_order(trace, ranks, mode)
    path = folder / "calibration.json"
    save_placement(path, first.replace(slot_to_expert=np.roll(first.slot_to_expert, 1, axis=1)))
    return RunSpec("index order, one slot on", str(path), mode)


def _serve(options: QuickstartOptions, job: Job, folder: Path, say: _Stages) -> list[dict[str, Any]]:
    """Run the job on local ranks; what each rank measured."""
    with progress(f"serving on {options.ranks} ranks") as report:

        def poll() -> None:
            with suppress(OSError, ValueError):  # not written yet, or just being written
                report(float((folder / PROGRESS).read_text()))

        run_local_ranks(
            "moeplace.launch.quickstart.worker",
            [str(folder)],
            ranks=options.ranks,
            log=options.out / "ranks.log",
            failure_of_rank=lambda rank: failure_path(folder, rank),
            timeout=options.timeout,
            poll=poll,
        )
    results = [read_json(result_path(folder, rank)) for rank in range(options.ranks)]
    say.done(f"served {len(job.prompts)} requests on {options.ranks} ranks, {len(job.runs)} runs each")
    return results


def _document(
    options: QuickstartOptions, trace: RoutingTrace, solved: dict[Mode, SolveResult], results: Results
) -> dict[str, Any]:
    """report.json: everything that was measured, with its conditions."""
    calibration = results.calibration
    return {
        "verdict": verdict(results.runs),
        "conditions": _conditions(options, trace, results),
        "checks": {"sentence": results.check_line, "equal": results.equal, "runs": results.checks},
        "runs": [run.to_json() for run in results.runs],
        "solver": {mode: result.summary() for mode, result in solved.items()},
        "calibration": {
            "latency": calibration.intra.latency,
            "bandwidth": calibration.intra.bandwidth,
            "expert": asdict(calibration.expert),
            "other_seconds_per_layer": calibration.other_seconds_per_layer,
        },
    }


def _conditions(options: QuickstartOptions, trace: RoutingTrace, results: Results) -> dict[str, str]:
    test, names = results.test, ", ".join(trace.workload_names)
    decoded = options.new_tokens - 2
    return {
        "model": f"{trace.model}: {trace.num_layers} MoE layers of {trace.num_experts} experts, top-{trace.top_k}, "
        f"hidden size {trace.hidden_size}",
        "text": f"{names}; the first {options.prompt_tokens} tokens of every {SEQUENCE_LENGTH} are a prompt, "
        f"{options.new_tokens} tokens are generated: {trace.num_tokens:,} tokens of routing",
        "split": "placements fitted to what was generated for even prompts, judged on odd ones "
        f"({test.num_tokens:,} tokens); the served requests are odd ones",
        "ranks": f"{options.ranks} processes on one machine with {os.cpu_count()} cores, gloo, one thread each",
        "requests": f"{options.requests} of {options.prompt_tokens} prompt and {options.new_tokens} greedy tokens, "
        f"float32; {decoded} decode steps x {options.rounds} rounds, runs in turn step by step, median",
        "not timed": "prefill and the first decode step, in which coherent mode hands the K/V of the prompts over "
        f"({results.handover_bytes / 2**20:.2f} MiB once)",
        "solver": f"auto, objective traffic, imbalance at most {MAX_IMBALANCE:g} on the fitted tokens, "
        f"at most {options.time_limit:g} s per mode, seed {options.seed}",
        "prediction": "held-out routing replayed; links, expert time and the rest of a layer measured on these ranks "
        "while they served other requests under another placement, before the runs",
        "verdict": f"runs within {1 - AS_FAST:.0%} of the fastest count as fast; of those, the one with fewest copies",
        "software": ", ".join(f"{name} {version(name)}" for name in ("moeplace", "torch", "transformers"))
        + f", Python {platform.python_version()}",
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
    }


def _write(
    options: QuickstartOptions, trace: RoutingTrace, solved: dict[Mode, SolveResult], document: dict[str, Any]
) -> None:
    write_json(options.out / "report.json", document)
    placements = {INDEX_ORDER: _index_order(trace, options.ranks, "coherent")}
    placements |= {f"{SOLVED} for {mode}": result.placement for mode, result in solved.items()}
    write_report(options.out / "report.html", Report.of(_decoded(trace, "test"), placements, document))
