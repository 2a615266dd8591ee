"""The elastic benchmark: change the placement of a running service, and compare every token with an undisturbed run."""

import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from moeplace.launch.elastic_load import ElasticJob
from moeplace.launch.elastic_worker import make_engine
from moeplace.launch.local_ranks import run_local_ranks
from moeplace.launch.progress import progress
from moeplace.launch.quickstart_job import PROGRESS, failure_path, result_path
from moeplace.profiling.errors import MoeplaceError
from moeplace.profiling.files import read_json


def elastic_bench(job: ElasticJob, *, timeout: float) -> dict[str, Any]:
    """Serve on local ranks with re-placements, then once more in this process without.

    Args:
        timeout: seconds for the ranks as a whole.

    Returns:
        The figures, `conditions` among them. Ratios compare decode steps during re-placements with the others;
        `worst_boundary_seconds` is the longest time that a migration itself took between two passes.

    Raises:
        MoeplaceError: a rank failed, or they took too long.
    """
    torch.set_num_threads(1)
    measured = _serve(job, timeout)
    expected = _answer_undisturbed(job, int(measured["added"]))
    tokens = {int(number): list(ids) for number, ids in measured["tokens"].items()}
    changed = sum(tokens[number] != expected[number] for number in tokens)
    return {
        "requests": len(expected),
        "lost": len(expected) - len(tokens),
        "changed": changed,
        **step_figures(measured["step_seconds"], measured["step_tokens"], measured["moving"]),
        "worst_boundary_seconds": max(measured["boundary_seconds"], default=None),
        "seconds_from_kill_to_token": [],
        "bytes_moved": 0,
        "bytes_lower_bound": 0,
        "bytes_replaced": measured["bytes_moved"],
        "bytes_replaced_planned": measured["bytes_planned"],
        "events": {"replacements": len(measured["versions"]), "joins": 0, "leaves": 0, "kills": 0},
        "conditions": _conditions(job),
    }


def step_figures(seconds: list[float], tokens: list[int], moving: list[bool]) -> dict[str, Any]:
    """Figures of decode steps; ratios are None where there are no steps of one kind.

    Args:
        seconds: of each step.
        tokens: that each step added.
        moving: whether a re-placement was under way.
    """
    quiet = [(s, n) for s, n, moved in zip(seconds, tokens, moving, strict=True) if not moved]
    during = [(s, n) for s, n, moved in zip(seconds, tokens, moving, strict=True) if moved]
    usual = median(s for s, _ in quiet) if quiet else math.nan
    figures = {
        "median_step_seconds": usual,
        "median_step_ratio": median(s for s, _ in during) / usual if during else math.nan,
        "worst_step_ratio": max((s for s, _ in during), default=math.nan) / usual,
        "worst_step_ratio_quiet": max((s for s, _ in quiet), default=math.nan) / usual,
        "throughput_ratio": _rate(during) / _rate(quiet),
    }
    return {
        **{name: None if math.isnan(value) else value for name, value in figures.items()},
        "steps_quiet": len(quiet),
        "steps_moving": len(during),
    }


def require_undisturbed(report: dict[str, Any]) -> None:
    """Fail where a request was lost or has other tokens.

    Raises:
        MoeplaceError: says how many.
    """
    if report["lost"] or report["changed"]:
        raise MoeplaceError(
            f"of {report['requests']} requests, {report['lost']} were lost and {report['changed']} have other tokens "
            "than without re-placements"
        )


def _rate(steps: list[tuple[float, int]]) -> float:
    """Tokens per second, not a number where there are no steps."""
    return sum(n for _, n in steps) / sum(s for s, _ in steps) if steps else math.nan


def _serve(job: ElasticJob, timeout: float) -> dict[str, Any]:
    """Run the ranks; what rank 0 recorded, once all report the same versions."""
    with tempfile.TemporaryDirectory(prefix="moeplace-elastic-") as name, progress("serving") as report:
        folder = Path(name)
        job.save(folder)

        def poll() -> None:
            with suppress(OSError, ValueError):  # not written yet, or just being written
                report(float((folder / PROGRESS).read_text()))

        run_local_ranks(
            "moeplace.launch.elastic_worker",
            [str(folder)],
            ranks=job.ranks,
            log=folder / "ranks.log",
            failure_of_rank=lambda rank: failure_path(folder, rank),
            timeout=timeout,
            poll=poll,
        )
        results = [read_json(result_path(folder, rank)) for rank in range(job.ranks)]
    versions = [result["versions"] for result in results]
    if any(own != versions[0] for own in versions):
        raise MoeplaceError(f"the ranks saw different placement versions: {versions}")
    return dict(results[0])


def _answer_undisturbed(job: ElasticJob, count: int) -> dict[int, list[int]]:
    """Token ids per request number, by one process that nothing happens to."""
    engine = make_engine(job, None)
    vocabulary = engine.executor.decoder.vocabulary
    completions = engine.generate([job.request(number, vocabulary=vocabulary) for number in range(count)])
    return {int(completion.request_id): list(completion.token_ids) for completion in completions}


def _conditions(job: ElasticJob) -> dict[str, Any]:
    return {
        "model": Path(job.model).resolve().name,
        "ranks": job.ranks,
        "steps": job.steps,
        "slots_changed": job.share,
        "batch": job.batch,
        "bytes_per_step": job.bytes_per_step,
        "staging_rows": job.staging_rows,
        "mode": job.mode,
        "seed": job.seed,
        "number_type": "float64",
        "transport": "gloo, one machine",
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
