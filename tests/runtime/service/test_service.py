"""A service under faults: ranks die or hang at chosen moments, and every request gets the tokens of the oracle."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.placement import Placement, index_order
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.service.api import TokenEvent
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.options import ServiceOptions
from tests.runtime.checkpoints import save_checkpoint
from tests.runtime.forked_members import ForkingSpawner
from tests.runtime.injector import EventInjector

LIMITS = EngineLimits(max_sequences=12, max_length=64, staging_rows=1, max_prefill_tokens=11)
START, CHANGE = 180.0, 120.0
"""Seconds, on a machine that others use too: a process may take a minute to start."""
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    save_checkpoint("olmoe", folder)
    return folder


def request(number: int) -> Request:
    """Request `number`; every other one is sampled."""
    sampling = SamplingParameters(temperature=0.8, seed=number) if number % 2 else SamplingParameters()
    prompt = tuple((number * 7 + position * 11) % 60 for position in range(1 + number % 9))
    logprobs = None if number % 4 else number % 3
    return Request(str(number), prompt, 12 + number % 30, sampling, stop_ids=(7,), logprobs=logprobs)


@dataclass
class Load:
    """Keeps 8 requests in flight until it is told to stop.

    Attributes:
        tokens: per request id.
        ended: request id -> finish reason.
        logprobs: per request id, of those tokens that came with them.
        logprob_error: by how much a log-probability may differ from that of one process.
    """

    service: Coordinator
    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprob | None]] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    is_over: bool = False
    logprob_error: float = 1e-9
    _asked: int = 0

    def begin(self) -> None:
        for _ in range(8):
            self._ask()

    def _ask(self) -> None:
        number, self._asked = self._asked, self._asked + 1
        self.service.submit(request(number), self._on_event)

    def _on_event(self, event: TokenEvent) -> None:
        self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
        self.logprobs.setdefault(event.request_id, []).extend(event.logprobs)
        if event.finish_reason is not None:
            self.ended[event.request_id] = event.finish_reason
            if not self.is_over:
                self._ask()

    def check(self, checkpoint: Path) -> None:
        """All requests have ended with the tokens of one process to which nothing happens."""
        engine = Engine(checkpoint, mode="dispatch-combine", dtype=torch.float64, limits=LIMITS)
        expected = engine.generate([request(number) for number in range(self._asked)])
        assert self.ended == {completion.request_id: completion.finish_reason for completion in expected}
        assert self.tokens == {completion.request_id: list(completion.token_ids) for completion in expected}
        for completion in expected:  # whatever was lost meanwhile, each token came with its own
            for found, own in zip(self.logprobs[completion.request_id], completion.logprobs, strict=True):
                assert found is not None
                assert own is not None
                assert found.value == pytest.approx(own.value, abs=self.logprob_error)
                assert [token for token, _ in found.top] == [token for token, _ in own.top]


@contextmanager
def serve(checkpoint: Path, ranks: int, injector: EventInjector, folder: Path, **options: Any) -> Iterator[Load]:
    """A loaded service, every step of which is checked; at the end so are all tokens and all faults."""
    made = ServiceOptions(dtype="float64", limits=LIMITS, check_steps=True, **options)
    spawner = ForkingSpawner(folder)
    with Coordinator(checkpoint, ranks=ranks, spawner=spawner, options=made, faults=injector.faults) as service:
        service.wait_until_serving(timeout=START)
        load = Load(service)
        load.begin()
        yield load
        load.is_over = True
        service.close(drain=True, timeout=CHANGE)
    load.check(checkpoint)
    injector.check(service.events())
    assert "Traceback" not in "".join(path.read_text() for path in folder.glob("*.log"))


def test_two_losses_in_a_row_and_a_join_that_fails(checkpoint: Path, tmp_path: Path) -> None:
    """Rank 0 dies within a step, another one while the next generation forms, a newcomer before it is a rank."""
    injector = EventInjector().fail_at(0, "tokens", 15).fail_at(1, "snapshots", 3).fail_at(3, "forming", 1)
    with serve(checkpoint, 3, injector, tmp_path, mode="coherent") as load:
        service = load.service
        assert service.wait_for(lambda status: status.active == (2,), timeout=CHANGE)
        assert service.status().desired == 1
        service.scale(2)
        assert service.wait_for(lambda status: "member 3 could not join" in status.reason, timeout=START)
        status = service.status()
        assert (status.serving, status.desired, status.active, status.routable) == (True, 1, (2,), (2,))


def test_a_hung_rank_and_a_loss_during_a_migration(checkpoint: Path, tmp_path: Path) -> None:
    """A rank stops without dying; later one of the two that are left dies while experts are on their way."""
    injector = EventInjector().fail_at(1, "step", 12, action="stop").fail_at(0, "migration", 2, after=True)
    options = {"mode": "dispatch-combine", "timeout": 3.0, "bytes_per_step": 500, "probe_tokens": 3}
    with serve(checkpoint, 3, injector, tmp_path, **options) as load:
        service = load.service
        check_refusals(service)
        assert service.wait_for(lambda status: status.active == (0, 2), timeout=CHANGE)
        service.replace(turned(service.placement))
        assert service.wait_for(lambda status: status.active == (2,), timeout=CHANGE)
        assert service.placement.num_ranks == 1
    with pytest.raises(MoeplaceError, match="the service was closed"):
        load.service.submit(request(0), print)


def check_refusals(service: Coordinator) -> None:
    """One sentence for each; what is cancelled ends so, and what is not known is ignored."""
    events: list[TokenEvent] = []
    ended = threading.Event()

    def hear(event: TokenEvent) -> None:
        events.append(event)
        if event.finish_reason is not None:
            ended.set()

    with pytest.raises(InputError, match="needs 65 positions"):
        service.submit(Request("long", (1,) * 60, max_new_tokens=5), hear)
    with pytest.raises(InputError, match=r"token id 60, which must lie in 0\.\.59"):
        service.submit(Request("odd", (60,), max_new_tokens=5), hear)
    with pytest.raises(InputError, match="member 7 cannot leave"):
        service.scale(1, leaving=[7])
    with pytest.raises(InputError, match=r"ranks \(0\) must be at least 1"):
        service.scale(0)
    with pytest.raises(InputError, match="the placement is for 2 ranks, but 3 are active"):
        service.replace(index_order(np.full(3, 6), np.array([3, 3]), np.zeros(2, np.int64)))
    with pytest.raises(InputError, match=r"ranks \(1000000\) must be at most 6"):
        service.scale(1_000_000)
    service.submit(Request("endless", (1, 2), max_new_tokens=60, stop_ids=()), hear)
    service.cancel("endless")
    service.cancel("unknown")
    assert ended.wait(CHANGE)
    assert events[-1] == TokenEvent("endless", (), "cancelled")


def turned(placement: Placement) -> Placement:
    """Every expert one slot further."""
    return placement.replace(slot_to_expert=placement.slot_to_expert[:, [*range(1, placement.num_slots), 0]])
