"""A service that has always something to do, and at the end has given every request the tokens of one process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.service.api import TokenEvent
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.options import ServiceOptions
from tests.runtime.forked_members import ForkingSpawner
from tests.runtime.injector import EventInjector

LIMITS = EngineLimits(max_sequences=12, max_length=64, staging_rows=1, max_prefill_tokens=11)
START, CHANGE = 180.0, 120.0
"""Seconds, on a machine that others use too: a process may take a minute to start."""


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
