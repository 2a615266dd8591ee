"""Who asked a local service for what: those who ask again hear the same, once and in order."""

import random

import pytest

from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service import local_requests
from moeplace.runtime.service.api import TokenEvent
from moeplace.runtime.service.local_requests import LocalRequests
from tests.seeds import TODAY


def ask(requests: LocalRequests, name: str, heard: list[TokenEvent] | None = None, note: str = "") -> str:
    """Take a request; its ticket."""
    request = Request(name, (1, 2), note=note)
    taken = requests.take(request, (heard if heard is not None else []).append)
    assert (taken.note, taken.token_ids) == ("", (1, 2))  # notes are not the engine's
    return taken.request_id


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


@pytest.mark.parametrize("seed", [1, 2, TODAY])
def test_those_who_ask_again_hear_the_rest(seed: int) -> None:
    """From any token on and at any moment, after the end too: every token once, in order, and one end."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    requests, first = LocalRequests(), []
    ticket, all_tokens = ask(requests, "a", first, note="n"), [rng.randrange(9) for _ in range(20)]
    others: list[tuple[int, list[TokenEvent]]] = []
    for count in range(21):
        if rng.random() < 0.4:
            start, events = rng.randrange(23), []
            assert requests.follow("a", events.append, first=start)
            others.append((start, events))
        ended = "length" if count == 20 else None
        assert requests.tell(ticket, all_tokens[:count], ended)
        record = requests.find("a")
        assert record is not None
        assert (record.ticket, record.token_ids, record.finish_reason) == (ticket, tuple(all_tokens[:count]), ended)
        assert record.request.note == "n"
    late: list[TokenEvent] = []
    assert requests.follow("a", late.append, first=5)
    for start, events in [(0, first), *others, (5, late)]:
        assert tokens_of(events) == all_tokens[start:]
        assert [event.finish_reason for event in events if event.finish_reason] == ["length"]
        assert events[-1].finish_reason == "length"
    assert requests.num_tokens == 20
    assert not requests.follow("b", late.append, first=0)


def test_the_newest_of_a_name_is_found() -> None:
    """Whichever ends first; and the end of an old one does not take the new one with it."""
    requests = LocalRequests()
    old, new = ask(requests, "a"), ask(requests, "a")
    assert requests.tickets_of("a", None) == [old, new]
    assert requests.tell(new, [7], "stop")
    assert requests.tickets_of("a", None) == requests.tickets_of("a", old) == [old] != [new]
    assert requests.tell(new, [7, 9])  # late: nobody minds
    assert requests.tell(old, [8], "stop")
    record = requests.find("a")
    assert record is not None
    assert (record.ticket, record.token_ids) == (new, (7,))


def test_those_that_ended_are_forgotten_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many are kept; those in flight do not count, and a name that is in use again stays known."""
    monkeypatch.setattr(local_requests, "KEPT", 2)
    requests = LocalRequests()
    running = ask(requests, "running")
    for name in "abcd":
        requests.tell(ask(requests, name), [1], "stop")
    assert [name for name in "abcd" if requests.find(name)] == ["c", "d"]
    again = ask(requests, "c")
    for name in "ef":
        requests.tell(ask(requests, name), [1], "stop")
    record = requests.find("c")
    assert record is not None
    assert record.ticket == again
    assert requests.find("d") is None
    assert requests.tickets_of("running", None) == [running]


def test_who_cannot_listen_is_not_told_again(caplog: pytest.LogCaptureFixture) -> None:
    """The request goes on while anybody can take its tokens; each that fails is logged; that none is left is said."""

    def fail(event: TokenEvent) -> None:
        calls.append(event)
        raise ValueError("no")

    calls: list[TokenEvent] = []
    requests, heard = LocalRequests(), []
    ticket = ask(requests, "a", heard)
    requests.follow("a", fail, first=0)
    assert requests.tell(ticket, [1])
    assert requests.tell(ticket, [1, 2])
    assert (len(calls), tokens_of(heard)) == (1, [1, 2])
    alone = requests.take(Request("b", (1,)), fail).request_id
    assert not requests.tell(alone, [1])
    assert [record.getMessage() for record in caplog.records] == [
        f"the listener of request {name!r} failed: ValueError: no" for name in "ab"
    ]
