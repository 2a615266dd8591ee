"""What outlives what: requests outlive all ranks and the coordinator; no process and no file outlives a service."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.options import ServiceOptions
from tests.runtime.forked_members import ForkingSpawner
from tests.runtime.service.clients import Client
from tests.runtime.service.loaded_service import CHANGE, START

LIMITS = EngineLimits(max_sequences=8, max_length=64, staging_rows=1, max_prefill_tokens=3)
pytestmark = pytest.mark.timeout(600)


def make_request(number: int, tokens: int = 40) -> Request:
    """Every other one is sampled."""
    sampling = SamplingParameters(0.8, seed=number) if number % 2 else SamplingParameters()
    return Request(f"r{number}", (1 + number, 7), tokens, sampling, ())


def expected(checkpoint: Path, requests: list[Request]) -> dict[str, list[int]]:
    """The tokens of one process to which nothing happens."""
    engine = Engine(checkpoint, dtype=torch.float64, limits=LIMITS)
    return {completion.request_id: list(completion.token_ids) for completion in engine.generate(requests)}


def await_lengths(client: Client, service: Coordinator, count: int) -> None:
    """All requests that were asked for have ended, each with as many tokens as it asked for."""
    assert service.wait_for(lambda status: len(client.reasons) == count or status.ended, timeout=CHANGE)
    client.wait_for(lambda: len(client.reasons) >= count, 10)
    assert set(client.reasons.values()) == {"length"}, (client.reasons, service.events())


@contextmanager
def serve(checkpoint: Path, ranks: int, *, state: Path | None = None, **options: Any) -> Iterator[Coordinator]:
    faults = options.pop("faults", None)
    spawner = options.pop("spawner", None) or ForkingSpawner()
    made = ServiceOptions(dtype="float64", limits=LIMITS, **options)
    with Coordinator(checkpoint, ranks=ranks, spawner=spawner, options=made, state=state, faults=faults) as service:
        yield service


def test_slow_is_not_hung_and_all_ranks_may_be_lost(checkpoint: Path) -> None:
    """A step twice as long as a hung rank is waited for costs nobody; then both ranks are killed at once, and one
    of those that follow while it reads its experts."""
    faults = {
        1: [{"phase": "step", "at": 4, "action": "sleep", "seconds": 10.0}],
        3: [{"phase": "loading", "at": 1}],
    }
    with serve(checkpoint, 2, timeout=5.0, keep_width=True, check_steps=True, faults=faults) as service:
        service.wait_until_serving(timeout=START)
        client, requests = Client(), [make_request(number) for number in range(6)]
        for request in requests:
            service.submit(request, client)
        assert service.wait_for(lambda status: status.steps >= 6, timeout=CHANGE)
        assert service.status().active == (0, 1), service.events()
        for member in (0, 1):
            service.member(member).kill()
        await_lengths(client, service, 6)
        kinds = [event.kind for event in service.events()]
        assert kinds.count("restart") == 1
        assert "start-failed" in kinds
        status = service.status()
        assert (status.running, status.waiting, len(status.active)) == (0, 0, 2)
    assert client.tokens == expected(checkpoint, requests)


SCRIPT = """
import json, sys, time
from pathlib import Path
from moeplace.runtime.service.spawner import LocalSpawner
from tests.runtime.service.test_survival import make_request, serve
with serve(Path(sys.argv[1]), 2, state=Path(sys.argv[2]), spawner=LocalSpawner()) as service:
    print(json.dumps([service.member(member).pid for member in (0, 1)]), flush=True)
    service.wait_until_serving(timeout=90.0)
    told = [0]
    def hear(event):
        told[0] += len(event.token_ids)
    service.submit(make_request(0, tokens=2), hear)
    for number in range(1, 8):
        service.submit(make_request(number), hear)
    while told[0] < 30:
        time.sleep(0.001)
    print("busy", flush=True)
    time.sleep(600)
"""


def is_there(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_end(pids: list[int]) -> None:
    """All are gone after a few seconds."""
    deadline = time.monotonic() + 20
    while any(map(is_there, pids)):
        assert time.monotonic() < deadline, "processes are left behind"
        time.sleep(0.05)


def await_import(pid: int) -> None:
    """The process has come so far that it loads libraries."""
    deadline = time.monotonic() + START
    while "libtorch" not in Path(f"/proc/{pid}/maps").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def started(checkpoint: Path, state: Path) -> Iterator[tuple["subprocess.Popen[bytes]", list[int]]]:
    """A coordinator in a process of its own, and the processes of its members, which start."""
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), str(state)]
    environment = {**os.environ, "TMPDIR": str(state.parent / "temporary")}
    Path(environment["TMPDIR"]).mkdir(exist_ok=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def test_requests_outlive_their_coordinator(checkpoint: Path, tmp_path: Path) -> None:
    """Killed while it serves: its members end, and another one gives all requests their tokens, to whoever asks."""
    state = tmp_path / "state"
    with started(checkpoint, state) as (process, pids):
        assert process.stdout is not None
        assert process.stdout.readline() == b"busy\n"
        os.kill(process.pid, signal.SIGKILL)
        await_end(pids)
    requests = [make_request(0, tokens=2), *(make_request(number) for number in range(1, 8))]
    with serve(checkpoint, 1, state=state) as service:
        client = Client()
        assert all(service.follow(request.request_id, client) for request in requests)
        assert not service.follow("unknown", client)
        await_lengths(client, service, len(requests))
        later = Client()
        assert service.follow("r3", later, first=30)
        await_lengths(later, service, 1)
        record = service.find("r5")
        assert record is not None
        assert record.finish_reason == "length"
    wanted = expected(checkpoint, requests)
    assert client.tokens == wanted
    assert later.tokens["r3"] == wanted["r3"][30:]
    assert list(record.token_ids) == wanted["r5"]
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_service_that_is_killed_as_it_starts(
    checkpoint: Path, tmp_path: Path, how: signal.Signals
) -> None:
    """No process, one that was stopped included, and no file."""
    with started(checkpoint, tmp_path / "state") as (process, pids):
        await_import(pids[1])
        os.kill(pids[1], signal.SIGSTOP)
        os.kill(process.pid, how)
        await_end(pids)
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.soak
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_poisonous_request_fails_alone(checkpoint: Path, chunk: int) -> None:
    """Every rank that begins with it dies, or with a later chunk of its prompt; the others get their tokens."""
    faults = {-1: [{"phase": "request:poison", "at": chunk}]}
    with serve(checkpoint, 2, keep_width=True, faults=faults) as service:
        service.wait_until_serving(timeout=START)
        client, requests = Client(), [make_request(number) for number in range(4)]
        for request in requests[:2]:
            service.submit(request, client)
        assert client.first.wait(CHANGE)
        bad = Client()
        service.submit(Request("poison", (3, 4) * 8, 5, stop_ids=()), bad)
        for request in requests[2:]:
            service.submit(request, client)
        assert service.wait_for(lambda status: len(bad.reasons) == 1, timeout=4 * START)
        assert bad.reasons == {"poison": "failed"}
        await_lengths(client, service, 4)
    assert client.tokens == expected(checkpoint, requests)
