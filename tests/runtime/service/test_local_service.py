"""LocalService: the tokens of an engine, from a thread."""

import threading
from collections.abc import Iterator

import pytest
import torch

from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.service.api import TokenEvent
from moeplace.runtime.service.local import LocalService
from tests.shared_data import tiny_moe_path

WAIT = 30.0


class Listener:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.first, self.ended = threading.Event(), threading.Event()

    def __call__(self, event: TokenEvent) -> None:
        assert not self.ended.is_set(), "an event after the last one"
        self.events.append(event)
        self.first.set()
        if event.finish_reason is not None:
            self.ended.set()

    def wait(self) -> tuple[tuple[int, ...], str | None]:
        """All tokens, and why it ended."""
        assert self.ended.wait(WAIT)
        return tuple(token for event in self.events for token in event.token_ids), self.events[-1].finish_reason


def make_engine(sequences: int = 4) -> Engine:
    limits = EngineLimits(max_sequences=sequences, staging_rows=2)
    return Engine(tiny_moe_path(), dtype=torch.float32, limits=limits)


def long_request(name: str) -> Request:
    return Request(name, (5, 6, 7), max_new_tokens=300, stop_ids=())


@pytest.fixture
def service() -> Iterator[LocalService]:
    service = LocalService(make_engine())
    yield service
    service.close(drain=False, timeout=WAIT)


def test_tokens_are_those_of_the_engine(service: LocalService) -> None:
    """More requests than places, sampled ones too; each token comes once."""
    requests = [
        Request(f"r{n}", tuple(range(10 + n, 15 + 2 * n)), 5 + n, SamplingParameters(n % 2 * 0.8, seed=n), ())
        for n in range(9)
    ]
    listeners = {request.request_id: Listener() for request in requests}
    for request in requests:
        service.submit(request, listeners[request.request_id])
    for completion in make_engine().generate(requests):
        assert listeners[completion.request_id].wait() == (completion.token_ids, completion.finish_reason)
    service.close(timeout=WAIT)
    status = service.status()
    assert (status.tokens, status.running, status.waiting) == (sum(5 + n for n in range(9)), 0, 0)
    assert (status.serving, status.reason) == (False, "it is closed")


def test_cancel_frees_the_place(service: LocalService) -> None:
    """Of a running request and of a waiting one; unknown names are ignored; the others go on."""
    listeners = [Listener() for _ in range(6)]
    for index, listener in enumerate(listeners):
        service.submit(long_request(f"r{index}"), listener)
    assert listeners[0].first.wait(WAIT)
    service.cancel("r0")
    service.cancel("r5")
    service.cancel("unknown")
    assert listeners[0].wait()[1] == listeners[5].wait()[1] == "cancelled"
    tokens, reason = listeners[4].wait()
    assert (len(tokens), reason) == (300, "length")
    service.submit(Request("r0", (1,), 1), again := Listener())
    assert again.wait()[1] in ("length", "stop")


def test_requests_of_one_name_are_independent(service: LocalService) -> None:
    """Two clients use a name at once, and one of them again after it has cancelled: each gets its own tokens."""
    requests = [Request("a", (n + 5, 6), 30 + n, stop_ids=()) for n in range(3)]
    listeners = [Listener() for _ in requests]
    tickets = [service.submit(request, listener) for request, listener in zip(requests[:2], listeners[:2], strict=True)]
    service.cancel("a", ticket=tickets[0])
    service.submit(requests[2], listeners[2])
    service.cancel("b", ticket=tickets[1])  # the ticket is of another name
    assert listeners[0].wait()[1] == "cancelled"
    for request, listener in zip(requests[1:], listeners[1:], strict=True):
        (expected,) = make_engine().generate([request])
        assert listener.wait() == (expected.token_ids, "length")


def test_what_cannot_be_served_is_refused(service: LocalService) -> None:
    """At once, in the caller's thread."""
    for request, sentence in (
        (Request("long", (1,), 10_000), "10001 positions"),
        (Request("id", (10**6,), 1), "token id 1000000"),
    ):
        with pytest.raises(InputError, match=sentence):
            service.submit(request, Listener())
    with pytest.raises(InputError, match="cannot have 2"):
        service.scale(2)


def test_close_without_drain_cancels(service: LocalService) -> None:
    """Everything in flight hears of it, and nothing more is taken."""
    listeners = [Listener() for _ in range(6)]
    for index, listener in enumerate(listeners):
        service.submit(long_request(f"r{index}"), listener)
    service.close(drain=False, timeout=WAIT)
    assert {listener.wait()[1] for listener in listeners} == {"cancelled"}
    with pytest.raises(MoeplaceError, match="is not served"):
        service.submit(long_request("late"), Listener())


def test_a_failing_engine_fails_its_requests(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hear one sentence, and so does whoever asks for the status."""
    monkeypatch.setattr(service._engine, "step_with_note", _break)
    service.submit(long_request("a"), listener := Listener())
    assert listener.wait() == ((), "failed")
    assert listener.events[-1].error == "internal error: out of cheese"
    status = service.status()
    assert (status.serving, status.reason) == (False, "internal error: out of cheese")
    assert [event.kind for event in service.events()] == ["started", "failed"]


def _break(_: int) -> None:
    raise RuntimeError("out of\n cheese")


def test_a_failing_listener_harms_nobody_else(service: LocalService) -> None:
    """Its request is dropped, the others finish."""
    service.submit(long_request("bad"), _raise)
    service.submit(Request("good", (5,), 20, stop_ids=()), listener := Listener())
    assert len(listener.wait()[0]) == 20
    service.close(timeout=WAIT)
    assert service.status().tokens < 300


def _raise(event: TokenEvent) -> None:
    raise ValueError("not interested")


def test_replace_while_serving(service: LocalService) -> None:
    """Another order of slots: the tokens stay the same, the version counts."""
    old = service._engine.placement
    new = old.replace(slot_to_expert=old.slot_to_expert[:, ::-1])
    request = Request("a", (5, 6, 7), 60, stop_ids=())
    service.submit(request, listener := Listener())
    assert listener.first.wait(WAIT)
    service.replace(new)
    (expected,) = make_engine().generate([request])
    assert listener.wait()[0] == expected.token_ids
    service.close(timeout=WAIT)
    assert service.status().placement_digest == new.digest
    assert service.status().placement_version >= 1
    assert service.events()[1].kind == "re-placement done"


def test_one_rank_only(service: LocalService) -> None:
    """A placement for two is refused."""
    two: Placement = service._engine.placement
    with pytest.raises(InputError, match="for 2 ranks"):
        service.replace(two.replace(node_of_rank=[0, 0], slots_of_rank=[8, 8]))
