"""The elastic benchmark: ranks join, leave and die and experts move under load; every token is compared."""

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from moeplace.launch.benches.elastic_driver import ElasticDriver
from moeplace.launch.benches.elastic_load import ElasticJob
from moeplace.launch.progress import progress
from moeplace.profiling.errors import MoeplaceError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.event import Event
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.options import ServiceOptions
from moeplace.runtime.service.spawner import LocalSpawner

NUMBER_TYPE = "float64"
"""So that no tie between two tokens depends on the order of a sum: another token is then a fault."""


def elastic_bench(job: ElasticJob, *, timeout: float) -> dict[str, Any]:
    """Serve on local ranks while things happen, then once more in this process without.

    Args:
        timeout: seconds for the ranks as a whole.

    Returns:
        The figures, `conditions` among them. Ratios compare decode steps during re-placements with the others.

    Raises:
        MoeplaceError: the service ended, or took too long.
    """
    torch.set_num_threads(1)
    engine = Engine(job.model, mode=job.mode, dtype=torch.float64, limits=job.limits)
    driver = ElasticDriver(job, vocabulary=engine.executor.decoder.vocabulary, deadline=time.monotonic() + timeout)
    events = _serve(job, driver, timeout)
    expected = {
        int(completion.request_id): list(completion.token_ids)
        for completion in engine.generate(
            [job.request(number, vocabulary=driver.vocabulary) for number in range(driver.requests)]
        )
    }
    record = driver.record
    whole = {number: ids for number, ids in record.tokens.items() if number not in record.failed}
    width = [event.figures for event in events if event.kind == "replaced" and event.figures["what"] == "width"]
    return {
        "requests": len(expected),
        "lost": len(expected) - len(whole),
        "changed": sum(ids != expected[number] for number, ids in whole.items()),
        **step_figures(record.step_seconds, record.step_tokens, record.moving, record.step_ranks),
        "staging_bytes": job.staging_rows * engine.executor.runtime.experts.expert_bytes(0),
        "seconds_from_kill_to_token": seconds_to_token(record.killed_at, events),
        "seconds_of_switch": record.switch_seconds,
        "bytes_moved": sum(figures["bytes_moved"] for figures in width),
        "bytes_lower_bound": sum(figures["bytes_lower_bound"] for figures in width),
        "events": {
            "replacements": driver.replaced,
            "joins": job.joins,
            "leaves": job.leaves,
            "kills": len(record.killed_at) - record.wiped,
            **({"kill_alls": record.wiped} if job.kill_alls else {}),
        },
        "log": [{"time": event.time, "kind": event.kind, "sentence": event.sentence} for event in events],
        "conditions": _conditions(job),
    }


def seconds_to_token(killed_at: Sequence[float], events: Sequence[Event]) -> list[float]:
    """From each kill to the first token of the generation that followed."""
    resumed = [event.time for event in events if event.kind == "resumed"]
    return [min((then for then in resumed if then > moment), default=math.inf) - moment for moment in killed_at]


def step_figures(
    seconds: Sequence[float], tokens: Sequence[int], moving: Sequence[bool], ranks: Sequence[int]
) -> dict[str, Any]:
    """Figures of decode steps; ratios are None where there are no steps to compare.

    Ratios compare steps with quiet ones of as many ranks: a step of more ranks takes another time anyway. Where more
    ranks than cores run, the worst of a thousand steps is the system's; that a re-placement disturbs shows in how the
    slowest hundredth of its steps compares with the slowest hundredth of quiet ones.

    Args:
        seconds: of each step.
        tokens: that each step added.
        moving: whether a re-placement was under way.
        ranks: that took part.
    """
    steps = list(zip(seconds, tokens, moving, ranks, strict=True))
    quiet = [(s, n, width) for s, n, moved, width in steps if not moved]
    widths = {width for _, _, width in quiet}
    during = [(s, n, width) for s, n, moved, width in steps if moved and width in widths]
    usual = {width: median(s for s, _, w in quiet if w == width) for width in widths}
    pace = {width: _seconds_per_token([step for step in quiet if step[2] == width]) for width in widths}
    expected = sum(n * pace[width] for _, n, width in during)
    ratios, calm = ([s / usual[width] for s, _, width in some] for some in (during, quiet))
    figures = {
        "median_step_seconds": median(s for s, _, _ in quiet) if quiet else math.nan,
        "median_step_ratio": median(ratios) if ratios else math.nan,
        "worst_step_ratio": max(ratios, default=math.nan),
        "worst_step_ratio_quiet": max(calm, default=math.nan),
        "p99_step_ratio": _percentile_99(ratios),
        "p99_step_ratio_quiet": _percentile_99(calm),
        "throughput_ratio": expected / sum(s for s, _, _ in during) if during else math.nan,
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
            "than in an undisturbed run"
        )


def _percentile_99(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.99)) if values else math.nan


def _seconds_per_token(steps: Sequence[tuple[float, int, int]]) -> float:
    return sum(s for s, _, _ in steps) / sum(n for _, n, _ in steps)


def _serve(job: ElasticJob, driver: ElasticDriver, timeout: float) -> list[Event]:
    """Run the driver against a service; the event log."""
    options = ServiceOptions(
        mode=job.mode,
        dtype=NUMBER_TYPE,
        limits=job.limits,
        bytes_per_step=job.bytes_per_step,
        probe_tokens=job.probe_tokens,
        timeout=job.timeout,
        keep_width=True,
    )
    spawner = LocalSpawner()
    with (
        progress("serving") as report,
        Coordinator(job.model, ranks=job.ranks, spawner=spawner, options=options, on_step=driver.on_step) as service,
    ):
        ended = threading.Event()
        watcher = threading.Thread(target=_show_progress, args=(driver, report, ended), daemon=True)
        watcher.start()
        try:
            service.wait_until_serving(timeout=timeout)
            driver.run(service)
            service.close(drain=True)
        finally:
            ended.set()
            watcher.join()
        return service.events()


def _show_progress(driver: ElasticDriver, report: Callable[[float], None], ended: threading.Event) -> None:
    while not ended.wait(0.5):
        report(driver.share_done)


def _conditions(job: ElasticJob) -> dict[str, Any]:
    return {
        "model": Path(job.model).resolve().name,
        "ranks": job.ranks,
        "steps": job.steps,
        "torch": torch.__version__,
        "slots_changed": job.share,
        "batch": job.batch,
        "bytes_per_step": job.bytes_per_step,
        "probe_tokens": job.probe_tokens,
        "staging_rows": job.staging_rows,
        "fast_slots": job.fast_slots,
        "mode": job.mode,
        "seed": job.seed,
        "number_type": NUMBER_TYPE,
        "transport": "gloo, one machine",
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
