"""What takes time beside the coordinator: reminders in their order, and tokens to all who listen."""

import queue
import random
import threading
import time
from collections.abc import Iterator

import pytest

from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.service.api import TokenEvent
from moeplace.runtime.service.coordinator.actions import Tell
from moeplace.runtime.service.coordinator.helpers import Deliveries, Reminders, Threads
from tests.seeds import TODAY

WAIT = 20.0


def test_reminders_come_when_they_are_due() -> None:
    """In the order in which they are due, whatever the order in which they were added; none before."""
    came: queue.Queue[tuple[str, float]] = queue.Queue()
    reminders = Reminders(lambda report: came.put((report["kind"], time.monotonic())))
    begun = time.monotonic()
    for name, seconds in (("c", 0.2), ("a", 0.0), ("never", 1000.0), ("b", 0.1)):
        reminders.add(seconds, {"kind": name})
    found = [came.get(timeout=WAIT) for _ in range(3)]
    assert [name for name, _ in found] == ["a", "b", "c"]
    assert all(moment - begun >= due for (_, moment), due in zip(found, (0.0, 0.1, 0.2), strict=True))
    reminders.close()
    assert not reminders.thread.is_alive()
    assert came.empty()


def test_a_reminder_under_way_is_waited_for() -> None:
    """Whoever closes comes back when nothing is reported any more; nothing that was still to come is."""
    begun, released, told = threading.Event(), threading.Event(), []

    def report(document: dict[str, str]) -> None:
        begun.set()
        assert released.wait(WAIT)
        told.append(document["kind"])

    reminders = Reminders(report)  # type: ignore[arg-type]
    for name in ("first", "second"):
        reminders.add(0.0, {"kind": name})
    assert begun.wait(WAIT)
    closer = threading.Thread(target=reminders.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    released.set()
    closer.join(WAIT)
    assert not closer.is_alive()
    assert not reminders.thread.is_alive()
    assert told == ["first"]


def test_a_reminder_may_close_them() -> None:
    """The thread of the reminders does not wait for itself."""
    done = threading.Event()

    def report(_: object) -> None:
        reminders.close()
        done.set()

    reminders = Reminders(report)
    reminders.add(0.0, {"kind": "end"})
    assert done.wait(WAIT)
    reminders.thread.join(WAIT)
    assert not reminders.thread.is_alive()


def test_threads_are_waited_for() -> None:
    """All of them; one that does not end, no longer than was said."""
    threads, released, ended = Threads(), threading.Event(), []
    for number in range(3):
        threads.start(f"t{number}", lambda number=number: (released.wait(WAIT), ended.append(number)))  # type: ignore[misc]
    threads.join(0.05)
    assert ended == []
    released.set()
    threads.join(WAIT)
    assert sorted(ended) == [0, 1, 2]


@pytest.fixture
def deliveries() -> Iterator[Deliveries]:
    made = Deliveries()
    yield made
    made.close()
    made.thread.join(WAIT)
    assert not made.thread.is_alive()


class Client:
    """What one that listens has heard."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self.ended = threading.Event()

    def __call__(self, event: TokenEvent) -> None:
        assert not self.ended.is_set()
        self.events.append(event)
        if event.finish_reason is not None:
            self.ended.set()

    def tokens(self) -> list[int]:
        assert self.ended.wait(WAIT)
        assert all(event.token_ids or event.finish_reason for event in self.events)
        return [token for event in self.events for token in event.token_ids]


def event_of(tokens: list[int], first: int, end: bool) -> TokenEvent:
    """Of which each token has a log-probability that names it."""
    logprobs = tuple(TokenLogprob(float(token)) for token in tokens)
    return TokenEvent("a", tuple(tokens), "length" if end else None, None, logprobs)


@pytest.mark.parametrize("seed", [1, 2, 3, TODAY])
def test_every_listener_hears_each_token_once(deliveries: Deliveries, seed: int) -> None:
    """Whoever asks again, from any token on, at any moment and after the end; tokens may be told twice."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    tokens, clients = [rng.randrange(100) for _ in range(30)], [(0, Client())]
    deliveries.listen("1:a", clients[0][1])
    told = 0
    while told < 30:
        if rng.random() < 0.4:
            clients.append((rng.randrange(34), Client()))
            known = Tell("1:a", 0, event_of(tokens[:told], 0, False))
            deliveries.repeat(known, clients[-1][1], first=clients[-1][0])
        first = max(told - rng.randrange(3), 0)
        told = min(told + rng.randrange(4), 30)
        deliveries.tell(Tell("1:a", first, event_of(tokens[first:told], first, told == 30)))
    clients.append((7, Client()))
    deliveries.repeat(Tell("1:a", 0, event_of(tokens, 0, True)), clients[-1][1], first=7)
    deliveries.tell(Tell("2:a", 0, event_of([5], 0, True)))  # of somebody who does not listen
    for first, client in clients:
        assert client.tokens() == tokens[first:]
        logprobs = [found.value for event in client.events for found in event.logprobs if found is not None]
        assert logprobs == tokens[first:]


def test_a_listener_that_fails_costs_nobody_else(deliveries: Deliveries, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: TokenEvent) -> None:
        raise ValueError("no")

    client = Client()
    deliveries.listen("1:a", fail)
    deliveries.listen("1:a", client)
    deliveries.tell(Tell("1:a", 0, event_of([4], 0, True)))
    assert client.tokens() == [4]
    assert "who asked for request 'a' could not take an event" in caplog.text
