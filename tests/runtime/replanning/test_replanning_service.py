"""A service that watches its own routing: the ranks' rows come together, and the change that pays is carried out."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeplace.placement.cluster import Link
from moeplace.placement.cost.calibration import Calibration
from moeplace.placement.cost.evaluation import cluster_of
from moeplace.placement.cost.steps import StepShape
from moeplace.placement.replacement.review import ReviewSettings
from moeplace.placement.replacement.rule import ReplacementRule
from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.windows.rows import RecentRows, join_rows
from moeplace.runtime.replanning.controller import Controller, ControllerSettings
from moeplace.runtime.replanning.event_log import EventLog
from moeplace.runtime.replanning.replanner import Replanner
from moeplace.runtime.replanning.review_process import ReviewProcess
from moeplace.runtime.service.coordinator.actions import Append, CommandLog, Outbox
from moeplace.runtime.service.coordinator.coordinator import Coordinator
from moeplace.runtime.service.coordinator.routing_request import RoutingRequest
from moeplace.runtime.service.options import ServiceOptions
from moeplace.runtime.service.routing_text import from_text, to_text
from tests.runtime.checkpoints import save_checkpoint
from tests.runtime.forked_members import ForkingSpawner

LIMITS = EngineLimits(max_sequences=16, max_length=64, staging_rows=1, recent_ids=4096, max_prefill_tokens=20)
REQUESTS = [
    Request(str(n), tuple((n * 7 + p * 11) % 60 for p in range(2 + n % 9)), max_new_tokens=20, stop_ids=())
    for n in range(24)
]
SLOW = Link(latency=1e-6, bandwidth=1e6)  # so that copies decide
SETTLES = 90.0


def answer(service: Coordinator) -> dict[str, list[int]]:
    """The tokens of all requests."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in REQUESTS}
    for request in REQUESTS:
        service.submit(request, lambda event: tokens[event.request_id].extend(event.token_ids))
    assert service.wait_for(lambda status: all(len(t) == 20 for t in tokens.values()), timeout=SETTLES)
    return tokens


def repeat(service: Coordinator, act: Callable[[], object], until: Callable[[], bool]) -> None:
    """Act when the service has news, and some times a second for a review that ends without any, until it is done."""
    deadline = time.monotonic() + SETTLES
    act()
    while not until():
        assert time.monotonic() < deadline
        service.wait_for(lambda status: False, timeout=0.1)
        act()


def test_a_service_replaces_for_its_own_routing(tmp_path: Path) -> None:
    """Joined rows are the routing of one rank; a look at them ends in a migration; tokens stay those of the oracle."""
    save_checkpoint("mixtral", tmp_path)
    alone = Engine(tmp_path, dtype=torch.float64, limits=LIMITS)
    tickets = [replace(request, request_id=f"{n}:{request.request_id}") for n, request in enumerate(REQUESTS, 1)]
    answers = zip(REQUESTS, alone.generate(tickets), strict=True)  # under the names that the ranks know them by
    expected = {request.request_id: list(completion.token_ids) for request, completion in answers}
    assert alone.window.recent is not None
    options = ServiceOptions(mode="dispatch-combine", dtype="float64", limits=LIMITS)
    (tmp_path / "logs").mkdir()
    spawner = ForkingSpawner(tmp_path / "logs")
    with Coordinator(tmp_path, ranks=2, spawner=spawner, options=options) as service:
        service.wait_until_serving(timeout=SETTLES)
        assert answer(service) == expected
        found: list[RoutingTrace] = []

        def ask() -> None:
            routing = service.recent_routing()
            found.extend([] if routing is None else [routing])

        repeat(service, ask, lambda: bool(found))
        oracle = join_rows([alone.window.recent.snapshot()], alone.checkpoint.experts_per_layer)
        assert (found[0].topk_ids == oracle.topk_ids).all()
        replanner = make_replanner(service, tmp_path / "events.jsonl")
        assert answer(service) == expected  # the steps after which a look is due
        events = replanner.controller.log.events
        repeat(service, replanner.turn, lambda: events[-1].kind not in ("watching", "review-started", "move"))
        assert [event.kind for event in events[-3:]] == ["review-started", "move", "committed"]
        assert service.status().placement_digest == replanner.controller.placement.digest
        assert answer(service) == expected
        replanner.close()


def make_replanner(service: Coordinator, log: Path) -> Replanner:
    """Which takes any gain, whatever it costs: what is tested is the way, not the judgement."""
    calibration = Calibration(intra=SLOW)
    rule = ReplacementRule(least_gain=0.0, quiet_steps=0)
    settings = ReviewSettings(
        rule=rule, shape=StepShape(batch=16, hidden_size=16), calibration=calibration, time_limit=2.0, steps_left=10**9
    )
    controller = Controller(
        service.placement,
        calibration.apply(cluster_of(service.placement)),
        runner=ReviewProcess(),
        log=EventLog(log),
        settings=ControllerSettings(every_steps=5, least_tokens=64, review=settings),
        step=service.status().steps,
    )
    return Replanner(controller, service, calibration=calibration)


def test_answers_belong_to_one_request_of_one_generation() -> None:
    """Nothing is asked twice; late answers and those of members that were not asked are ignored."""
    out = Outbox()
    request, rows = RoutingRequest(CommandLog(out)), to_text(RecentRows(2, keep=1).snapshot())
    request.ask((0, 2))
    request.ask((0, 2))
    assert out.take() == [Append(0, {"kind": "routing", "number": 1})]
    for number, member in ((1, 0), (1, 0), (1, 1), (0, 2)):
        request.take({"number": number, "member": member, "rows": rows})
    assert request.collect() is None
    request.take({"number": 1, "member": 2, "rows": rows})
    parts = request.collect()
    assert parts is not None
    assert len(parts) == 2
    assert request.collect() is None
    request.ask((0,))
    request.give_up()
    request.take({"number": 2, "member": 0, "rows": rows})
    assert request.collect() is None
    with pytest.raises(FormatError, match="are not routed rows"):
        from_text("?")


def test_routing_that_is_not_kept_cannot_be_asked_for(tmp_path: Path) -> None:
    """The limit that is missing is named."""
    save_checkpoint("olmoe", tmp_path)
    with (
        Coordinator(tmp_path, ranks=1, spawner=ForkingSpawner(tmp_path)) as service,
        pytest.raises(InputError, match=r"recent_ids \(0\) must be at least 1"),
    ):
        service.recent_routing()
