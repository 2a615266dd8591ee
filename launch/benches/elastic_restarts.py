"""The elastic benchmark for the end of everything: all ranks killed at once, and the coordinator, time and again.

Every round a coordinator takes up what the one before it left in the state folder, asks for what is missing, loses all
its ranks at a random moment and is itself killed at another one. At the end every token is compared with a process to
which nothing happens.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from moeplace.launch.benches.elastic_load import ElasticJob
from moeplace.profiling.errors import MoeplaceError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.service.api import TokenEvent
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.coordinator.journal import Journal
from moeplace.runtime.service.options import ServiceOptions
from moeplace.runtime.service.spawner import LocalSpawner


@dataclass(frozen=True)
class Round:
    """What one coordinator is told.

    Attributes:
        job: what is served.
        state: folder.
        requests: to be asked for in all.
        wipe_at: tokens after which all its ranks are killed, -1 = never.
        timeout: seconds for all of it.
    """

    job: ElasticJob
    state: str
    requests: int
    wipe_at: int
    timeout: float


def restart_bench(job: ElasticJob, *, rounds: int, requests: int, timeout: float) -> dict[str, Any]:
    """Let `rounds` coordinators be killed, and one go on to the end.

    Args:
        job: model, ranks, batch, mode and seed count.
        timeout: seconds for each.

    Returns:
        The figures: requests, lost, changed, how often all ranks and the coordinator were killed.

    Raises:
        MoeplaceError: a coordinator failed, or took too long.
    """
    torch.set_num_threads(1)
    engine = Engine(job.model, mode=job.mode, dtype=torch.float64, limits=job.limits)
    vocabulary, rng = engine.executor.decoder.vocabulary, np.random.default_rng([job.seed, 4])
    wiped = killed = 0
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moeplace-state-") as state:
        for number in range(rounds + 1):
            last = number == rounds
            wipe_at = -1 if last else int(rng.integers(1, 60))
            kill_at = -1 if last else wipe_at + int(rng.integers(0, 120))
            wipes, kills = _run(Round(job, state, requests, wipe_at, timeout), kill_at)
            wiped, killed = wiped + wipes, killed + kills
        journal = Journal(state)
        found = [journal.find(str(number)) for number in range(requests)]
        journal.close()
    asked = [job.request(number, vocabulary=vocabulary) for number in range(requests)]
    expected = [completion.token_ids for completion in engine.generate(asked)]
    whole = [record if record is not None and record.finish_reason in ("stop", "length") else None for record in found]
    return {
        "requests": requests,
        "lost": whole.count(None),
        "changed": sum(r is not None and r.token_ids != ids for r, ids in zip(whole, expected, strict=True)),
        "all_ranks_killed": wiped,
        "coordinator_killed": killed,
        "seconds": time.monotonic() - begun,
        "conditions": {
            **{name: asdict(job)[name] for name in ("ranks", "batch", "mode", "seed")},
            "rounds": rounds,
            "torch": torch.__version__,
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0],
        },
    }


def _run(task: Round, kill_at: int) -> tuple[int, int]:
    """One coordinator, killed once it has told so many tokens (-1 = never): ranks wiped, coordinators killed."""
    wiped = 0
    with _started(task) as process:
        assert process.stdout is not None
        for line in process.stdout:
            word, count = line.split()
            wiped += word == b"wiped"
            if word == b"told" and 0 <= kill_at <= int(count):
                os.kill(process.pid, signal.SIGKILL)
                return wiped, 1
        if process.wait() != 0:
            raise MoeplaceError(f"a coordinator ended with code {process.returncode}")
    return wiped, 0


@contextmanager
def _started(task: Round) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "moeplace.launch.benches.elastic_restarts", json.dumps(asdict(task))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


class _Load:
    """Asks for what was not asked before, and counts what is told."""

    def __init__(self, service: Coordinator, task: Round, vocabulary: int) -> None:
        self._service, self._task, self._vocabulary = service, task, vocabulary
        self.told = self.ended = 0
        self.failed = ""
        self._next = 0
        self._changed = threading.Condition()

    def begin(self) -> None:
        """Take up what is known, then ask for more, a batch at a time."""
        for number in range(self._task.requests):
            record = self._service.find(str(number))
            if record is None:
                break
            self._next += 1
            if record.finish_reason is None:
                self._service.follow(str(number), self._hear, first=len(record.token_ids))
            else:
                self.ended += 1
        for _ in range(min(self._task.job.batch - (self._next - self.ended), self._task.requests - self._next)):
            self._ask()

    def await_tokens(self, count: int) -> None:
        """Until so many were told, or all is done."""
        with self._changed:
            done = self._changed.wait_for(lambda: self.told >= count or self.is_over, self._task.timeout)
        if not done:
            raise MoeplaceError(f"{self.told} tokens in {self._task.timeout:g} s: {self._service.status()}")

    @property
    def is_over(self) -> bool:
        return self.ended == self._task.requests or bool(self.failed)

    def _ask(self) -> None:
        number, self._next = self._next, self._next + 1
        self._service.submit(self._task.job.request(number, vocabulary=self._vocabulary), self._hear)

    def _hear(self, event: TokenEvent) -> None:
        with self._changed:
            self.told += len(event.token_ids)
            if event.finish_reason is not None:
                self.ended += 1
                self.failed = self.failed or event.error or ""
            self._changed.notify_all()
        _say("told", self.told)
        if event.finish_reason in ("stop", "length") and self._next < self._task.requests:
            self._ask()


def _say(word: str, count: int) -> None:
    """A line to the parent, written as one: two threads speak."""
    os.write(1, f"{word} {count}\n".encode())


def serve_round(task: Round) -> None:
    """Be a coordinator, until it is killed or all is done."""
    torch.set_num_threads(1)
    options = ServiceOptions(mode=task.job.mode, dtype="float64", limits=task.job.limits, keep_width=True)
    with Coordinator(
        task.job.model, ranks=task.job.ranks, spawner=LocalSpawner(), options=options, state=task.state
    ) as service:
        service.wait_until_serving(timeout=task.timeout)
        load = _Load(service, task, vocabulary=service.vocabulary)
        load.begin()
        if task.wipe_at >= 0:
            load.await_tokens(task.wipe_at)
            for member in service.status().allocated:
                service.member(member).kill()
            _say("wiped", 1)
        load.await_tokens(1 << 62)
        if load.failed:
            raise MoeplaceError(load.failed)


def main(text: str) -> int:
    """Run the round that is described."""
    document = json.loads(text)
    serve_round(Round(**{**document, "job": ElasticJob(**document["job"])}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
