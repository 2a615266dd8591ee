"""Losses at moments that are drawn: whatever ranks do, and in whatever order they die, each request gets its tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.options import ServiceOptions
from tests.runtime.placements import placement_for, turned
from tests.runtime.service.clients import Client
from tests.runtime.thread_members import ThreadSpawner, thread_members

__all__ = ["thread_members"]

LIMITS = EngineLimits(max_sequences=6, max_length=48, staging_rows=1, max_prefill_tokens=7)
WAIT = 120.0
PHASES = (
    ("starting", 1),
    ("forming", 3),
    ("loading", 2),
    ("agreement", 5),
    ("step", 30),
    ("migration", 6),
    ("snapshots", 3),
    ("checksums", 2),
    ("tokens", 30),
    ("kv", 20),
    ("commit", 2),
    ("check", 30),
    ("dispatch", 90),
)
"""Moments, and how often they come about, more or less."""
pytestmark = pytest.mark.timeout(600)


def make_requests(seed: int) -> list[Request]:
    """Every other one is sampled; more than there is room for."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            f"r{number}",
            tuple(rng.integers(0, 60, rng.integers(1, 14)).tolist()),
            int(rng.integers(6, 30)),
            SamplingParameters(0.8, seed=number) if number % 2 else SamplingParameters(),
            (),
        )
        for number in range(9)
    ]


def draw_fault(rng: np.random.Generator) -> dict[str, Any]:
    phase, often = PHASES[rng.integers(len(PHASES))]
    at, after = int(rng.integers(1, often + 1)), bool(phase in ("step", "migration") and rng.random() < 0.5)
    return {"phase": phase, "at": at, "after": after}


def draw_faults(rng: np.random.Generator) -> dict[int, list[dict[str, Any]]]:
    """Of some of the first members, one each, now and then of all ranks at once; few enough that no request is taken
    for the reason."""
    if rng.random() < 0.2:
        fault = draw_fault(rng)
        return {member: [fault] for member in range(3)}
    members = rng.permutation(5)[: rng.integers(1, 4)]
    return {member: [draw_fault(rng)] for member in members.tolist()}


def draw_placement(checkpoint: Checkpoint, rng: np.random.Generator) -> Placement | None:
    """Of the start: in index order on one node, or any one with replicas and empty slots, on two nodes."""
    seed = int(rng.integers(1000))
    return None if rng.random() < 0.5 else placement_for(checkpoint, 3, seed=seed, extra_slots=seed % 3, nodes=2)


def disturb(service: Coordinator, rng: np.random.Generator) -> None:
    """Another placement, or more ranks or fewer, if the service can just now."""
    try:
        if rng.random() < 0.5:
            service.replace(turned(service.placement))
        else:
            service.scale(int(rng.integers(1, 5)))
    except (InputError, MoeplaceError):
        pass  # it has lost a rank meanwhile, or is about to start again


@pytest.mark.parametrize("mode", ["coherent", "dispatch-combine"])
@pytest.mark.parametrize("drawn", [1, None, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 42))])
def test_nothing_is_lost_whenever_ranks_die(
    checkpoint: Path, thread_members: ThreadSpawner, mode: str, drawn: int | None, dated_seed: int
) -> None:
    """Up to three of the first five members die, each where it is drawn: as they start, connect, read, step, compare,
    move experts or take over; meanwhile the service is scaled and re-placed, and requests are cancelled and asked for
    again under the same name."""
    seed = dated_seed % 10_000 if drawn is None else drawn
    rng, requests = np.random.default_rng(seed), make_requests(seed)
    expected = Engine(checkpoint, dtype=torch.float64, limits=LIMITS).generate(requests)
    options = ServiceOptions(
        mode=mode,
        dtype="float64",
        limits=replace(LIMITS, alike=seed % 3 * 2),  # what each step's check compares: who waits, how often overtaken
        check_steps=True,
        keep_width=True,
        bytes_per_step=1500,
        probe_tokens=int(rng.integers(2)) * 3,
        step_timeout=10 * WAIT,  # nobody has to wait for that
        timeout=60.0,
    )
    thread_members.open(checkpoint, torch.float64)
    faults, client, again = draw_faults(rng), Client(), Client()
    repeated: list[str] = []
    start = {"placement": draw_placement(thread_members.checkpoint(checkpoint), rng), "faults": faults}
    with Coordinator(checkpoint, ranks=3, spawner=thread_members, options=options, **start) as service:
        service.wait_until_serving(timeout=WAIT)
        for number, request in enumerate(requests):
            ticket = service.submit(request, client)
            if number % 3 == 1:
                disturb(service, rng)
            if rng.random() < 0.3:  # the same name again, at once: another request
                service.cancel(request.request_id, ticket=ticket)
                service.submit(request, again)
                repeated.append(request.request_id)
        if rng.random() < 0.5:
            service.close(drain=True, timeout=WAIT)  # ranks die while the service is waiting for its end
        client.await_ends([request.request_id for request in requests], WAIT)
        again.await_ends(repeated, WAIT)
        events = [(event.kind, event.sentence) for event in service.events()]
    print(seed, faults, thread_members.fired(), events)  # shown if the test fails
    for completion in expected:
        whole, name = list(completion.token_ids), completion.request_id
        told, reason = client.tokens[name], client.reasons[name]
        if reason == "cancelled":
            assert name in repeated
            assert told == whole[: len(told)]
        else:  # perhaps before it could be cancelled
            assert (reason, told) == ("length", whole)
        assert name not in repeated or (again.reasons[name], again.tokens[name]) == ("length", whole)
    assert not [sentence for kind, sentence in events if kind in ("bad-report", "failed")]
    assert thread_members.read_while == {"loading"}  # else a disk has the time that a step has, and others wait


@pytest.mark.parametrize("mode", ["coherent", "dispatch-combine"])
@pytest.mark.parametrize(
    "faults", [{3: [{"phase": "agreement", "at": 1}]}, {1: [{"phase": "agreement", "at": 2}]}], ids=["new", "old"]
)
def test_nobody_waits_for_a_rank_that_dies_where_ranks_agree(
    checkpoint: Path, thread_members: ThreadSpawner, mode: str, faults: dict[int, list[dict[str, Any]]]
) -> None:
    """One that joins, and one that was there: the others hear of it, who wait for it nowhere that would tell them."""
    requests = make_requests(0)
    expected = Engine(checkpoint, dtype=torch.float64, limits=LIMITS).generate(requests)
    options = ServiceOptions(mode=mode, dtype="float64", limits=LIMITS, keep_width=True, step_timeout=10 * WAIT)
    thread_members.open(checkpoint, torch.float64)
    client = Client()
    with Coordinator(checkpoint, ranks=3, spawner=thread_members, options=options, faults=faults) as service:
        service.wait_until_serving(timeout=WAIT)
        service.scale(4)
        for request in requests:
            service.submit(request, client)
        client.await_ends([request.request_id for request in requests], WAIT)
        assert service.wait_for(lambda status: len(status.active) == 4, timeout=WAIT)
    assert [phase for _, phase, _, _ in thread_members.fired()] == ["agreement"]
    assert thread_members.read_while == {"loading"}
    assert client.tokens == {completion.request_id: list(completion.token_ids) for completion in expected}


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("mode", ["coherent", "dispatch-combine"])
def test_a_rank_dies_while_forecasts_are_told(
    checkpoint: Path, thread_members: ThreadSpawner, mode: str, member: int
) -> None:
    """Rank 0, who tells them, or another: the others go on, choose alike in every step, and no token changes."""
    requests, limits = make_requests(3), replace(LIMITS, max_sequences=3, alike=4)
    expected = Engine(checkpoint, dtype=torch.float64, limits=LIMITS).generate(requests)
    options = ServiceOptions(
        mode=mode, dtype="float64", limits=limits, keep_width=True, check_steps=True, step_timeout=60.0, timeout=60.0
    )
    thread_members.open(checkpoint, torch.float64)
    client, faults = Client(), {member: [{"phase": "forecasts", "at": 2}]}
    with Coordinator(checkpoint, ranks=3, spawner=thread_members, options=options, faults=faults) as service:
        service.wait_until_serving(timeout=WAIT)
        for request in requests:
            service.submit(request, client)
        client.await_ends([request.request_id for request in requests], WAIT)
    assert thread_members.fired() == [(member, "forecasts", 2, False)]
    assert client.tokens == {completion.request_id: list(completion.token_ids) for completion in expected}
