"""Asking again for a request by its id: after a lost connection, and of a service that has been started again."""

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service.api import TokenEvent
from tests.launch.http_front.http_process import ServerProcess, running_server
from tests.launch.http_front.http_services import WAIT, ManualService, ThreadedFront, served, wait_until
from tests.seeds import TODAY

TEXT = "aé日😀 end. " * 3


def post(front: ThreadedFront, *, path: str = "/v1/completions", name: str | None = "mine", **body: Any) -> Any:
    headers = {} if name is None else {"X-Request-Id": name}
    return httpx.post(f"{front.url}{path}", json=body, headers=headers, timeout=WAIT)


def ask(front: ThreadedFront, name: str, **options: Any) -> httpx.Response:
    return httpx.get(f"{front.url}/v1/requests/{name}", timeout=WAIT, **options)


def events_of(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
    """Id and data of each server-sent event, data as JSON but for the last."""
    mark = ""
    for line in answer.iter_lines():
        if line.startswith("id: "):
            mark = line.removeprefix("id: ")
        elif line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield mark, data if data == "[DONE]" else json.loads(data)


@pytest.mark.parametrize("shown", [{"echo": True}, {"logprobs": 1}])
def test_a_finished_answer_is_given_again(
    service: ManualService, pool: ThreadPoolExecutor, shown: dict[str, Any]
) -> None:
    """All choices, the same document, by the client's id and by that of the answer; texts stop where they did."""
    with served(service) as front:
        answer = pool.submit(
            post, front, prompt=["ab", "é"], n=2, stop="END", max_tokens=9, return_token_ids=True, **shown
        )
        for index in range(4):
            logprobs = tuple(TokenLogprob(-float(place), ((97, -0.5),)) for place in range(3))
            service.give(request := service.next_request(), f"{index}EN", logprobs=logprobs)
            service.give(request, "D!" if index % 2 else "\0", None if index % 2 else "stop")
        first = answer.result(WAIT)
        document = first.json()
        assert first.headers["x-request-id"] == "mine"
        for name in ("mine", document["id"]):
            again = ask(front, name)
            assert (again.status_code, again.json()) == (200, {**document, "status": "completed"})
            assert again.headers["cache-control"] == "no-store"


def test_clients_with_names_meet_their_own_requests_alone(service: ManualService) -> None:
    """One id, chosen by three: each finds and ends what it asked for; no spelling of an id leads to another's."""
    tokens = {"a": "token-a", "a-b": "token-b", "": "token-0"}  # the last one has no name
    keys = {name: token for name, token in tokens.items() if name}
    with served(service, api_key=tokens[""], client_keys=keys, max_concurrent=3) as front:

        def reach(client: str, method: str, path: str, **body: Any) -> httpx.Response:
            headers = {"Authorization": f"Bearer {tokens[client]}", "X-Request-Id": "b-job"}
            url = f"{front.url}/v1/{path}"
            return httpx.request(method, url, headers=headers, timeout=WAIT, **({"json": body} if body else {}))

        requests = {}
        for client in tokens:
            assert reach(client, "POST", "completions", prompt=f"<{client}>", background=True).status_code == 202
            requests[client] = service.next_request()
            service.give(requests[client], f"for {client}")
        for client in tokens:
            for name in ("b-job", "cmpl-b-job"):
                assert reach(client, "GET", f"requests/{name}").json()["choices"][0]["text"] == f"for {client}"
        for other in ("a cmpl-b-job", "a%20cmpl-b-job", "a%2520cmpl-b-job", "a-b%20cmpl-b-job", "%20cmpl-b-job"):
            for client in tokens:
                assert reach(client, "GET", f"requests/{other}").status_code == 404, (client, other)
                assert reach(client, "POST", f"requests/{other}/cancel").status_code == 404
        assert reach("a", "POST", "requests/b-job/cancel").status_code == 202
        assert service.cancelled.get(timeout=WAIT) == requests["a"].request_id
        for client in ("a-b", ""):
            service.give(requests[client], "!", "length")
            again = reach(client, "GET", "requests/b-job").json()
            assert (again["status"], again["choices"][0]["text"]) == ("completed", f"for {client}!")


@pytest.mark.parametrize(("path", "kind"), [("/v1/completions", "text"), ("/v1/chat/completions", "message")])
def test_in_the_background(service: ManualService, path: str, kind: str) -> None:
    """At once an answer without tokens; asked again, what there is; it goes on without a client, and then is whole."""
    body = {"prompt": "a"} if kind == "text" else {"messages": [{"role": "user", "content": "a"}]}
    with served(service, max_concurrent=1, max_queue=0) as front:
        begun = post(front, path=path, background=True, name=None, **body)
        name = begun.headers["x-request-id"]
        assert (begun.status_code, begun.json()["status"], begun.json()["id"]) == (202, "in_progress", name)
        assert post(front, path=path, **body).status_code == 429  # it still takes its place
        request = service.next_request()
        service.give(request, "x")
        assert _text(ask(front, name).json()["choices"][0], kind) == "x"
        service.give(request, "y", "length")
        whole = ask(front, name).json()
        assert (whole["status"], _text(whole["choices"][0], kind)) == ("completed", "xy")
        assert whole["usage"]["completion_tokens"] == 2
        assert post(front, path=path, background=True, **body).status_code == 202


def _text(choice: dict[str, Any], kind: str) -> str:
    return str(choice["text"] if kind == "text" else choice["message"]["content"])


def test_a_stream_is_taken_up_where_it_broke_off(service: ManualService) -> None:
    """From any event on, whatever had gathered: joined, the pieces are the text, of every choice, each character once;
    while the rest is still to come and after the end."""
    seed = TODAY
    print(f"seed {seed}")
    rng = random.Random(seed)
    body = {"prompt": "a", "n": 2, "max_tokens": 500, "stream": True, "background": True, "return_token_ids": True}
    options = {"stream_options": {"include_event_ids": True, "include_usage": True}}
    url, headers = "/v1/completions", {"X-Request-Id": "a/b"}
    with served(service) as front:
        with httpx.stream(
            "POST", f"{front.url}{url}", json={**body, **options}, headers=headers, timeout=WAIT
        ) as answer:
            requests = [service.next_request() for _ in range(2)]
            stream = events_of(answer)
            seen: list[tuple[str, Any]] = []
            for byte in TEXT.encode()[: rng.randrange(8, 30)]:
                for request in requests:
                    service.give(request, bytes([byte]))
            while not seen or rng.random() < 0.7:
                if all("".join(_pieces(seen, index)) for index in range(2)):
                    break
                seen.append(next(stream))
        # The client is gone here; the request is in the background and goes on.
        cut = rng.randrange(len(seen))
        mark, kept = seen[cut][0], seen[: cut + 1]
        rest: list[tuple[str, Any]] = []

        def resume() -> None:
            last = {"Last-Event-ID": mark}
            with httpx.stream("GET", f"{front.url}/v1/requests/a/b?stream=true", headers=last, timeout=WAIT) as again:
                rest.extend(events_of(again))

        thread = threading.Thread(target=resume)
        thread.start()
        given = len(service.find(requests[0].request_id).token_ids)  # type: ignore[union-attr]
        for byte in TEXT.encode()[given:]:
            for request in requests:
                service.give(request, bytes([byte]))
        for request in requests:
            service.give(request, end="length")
        thread.join(WAIT)
        assert rest[-1][1] == "[DONE]"
        assert rest[-2][1]["usage"]["completion_tokens"] == 2 * len(TEXT.encode())
        first, rest = rest, []
        resume()
        for later in (first, rest):
            for index in range(2):
                assert "".join([*_pieces(kept, index), *_pieces(later, index)]) == TEXT
                ids = [token for _, chunk in [*kept, *later] for token in _ids(chunk, index)]
                assert ids == list(TEXT.encode())
        assert service.cancelled.empty()


def _pieces(events: list[tuple[str, Any]], index: int) -> list[str]:
    return [c["text"] for _, chunk in events if chunk != "[DONE]" for c in chunk["choices"] if c["index"] == index]


def _ids(chunk: Any, index: int) -> list[int]:
    choices = [] if chunk == "[DONE]" else chunk["choices"]
    return [token for choice in choices if choice["index"] == index for token in choice["token_ids"]]


def test_who_only_looks_ends_nothing(service: ManualService) -> None:
    """A client that asks again as a stream, and leaves: the request is not its own to cancel."""
    with served(service) as front:
        post(front, prompt="a", background=True)
        service.give(request := service.next_request(), "x")
        url = f"{front.url}/v1/requests/mine?stream=true"
        with httpx.stream("GET", url, timeout=WAIT) as answer:
            assert _pieces([next(events_of(answer))], 0) == ["x"]
        while 'route="/v1/requests",status="499"} 1.0' not in httpx.get(f"{front.url}/metrics", timeout=WAIT).text:
            pass  # the server has seen that it is gone
        service.give(request, "y", "length")
        assert ask(front, "mine").json()["status"] == "completed"
    assert service.cancelled.empty()


def test_ids_of_events_are_only_given_on_request(service: ManualService) -> None:
    """Load generators know no other line than data."""
    body = {"prompt": "a", "stream": True}
    with (
        served(service) as front,
        httpx.stream("POST", f"{front.url}/v1/completions", json=body, timeout=WAIT) as answer,
    ):
        service.give(service.next_request(), "x", "length")
        assert all(line.startswith("data: ") for line in answer.iter_lines() if line)


@pytest.mark.parametrize("position", ["x", "1:2", "1:2:3,3:4:5", "::", "1:2:3,", "-1:0:0", "9" * 20 + ":0:0"])
def test_positions_that_are_none(service: ManualService, position: str) -> None:
    with served(service) as front:
        assert post(front, prompt="a", background=True).status_code == 202
        answer = ask(front, "mine", params={"stream": "true"}, headers={"Last-Event-ID": position})
        assert (answer.status_code, "Last-Event-ID" in answer.text) == (400, True)


def test_what_is_not_known(service: ManualService) -> None:
    """Another id, a request without tokens, a value that is none."""
    with served(service) as front:
        assert post(front, prompt="a", max_tokens=0).status_code == 200
        assert ask(front, "mine").status_code == ask(front, "other").status_code == 404
        post(front, prompt="a", background=True)
        assert ask(front, "mine", params={"stream": "yes"}).status_code == 400
        assert ask(front, "mine/cancel").status_code == 404


@pytest.mark.parametrize("name", ["", "a b", "é", "x" * 201, "a\tb"])
def test_ids_that_are_refused(service: ManualService, name: str) -> None:
    with served(service) as front:
        headers = {"X-Request-Id": name.encode()}
        answer = httpx.post(f"{front.url}/v1/completions", json={"prompt": "a"}, headers=headers, timeout=WAIT)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Request-Id")
    assert service.submitted.empty()


def test_requests_of_one_name_are_independent(service: ManualService, pool: ThreadPoolExecutor) -> None:
    """Two clients that count alike: the newest is found, and the end of one is not that of the other."""
    with served(service) as front:
        post(front, prompt="a", background=True)
        first = service.find("cmpl-mine-0")
        service.next_request()
        answer = pool.submit(post, front, prompt="bc", max_tokens=9, stop="!")
        service.give(service.next_request(), "two!")
        assert answer.result(WAIT).json()["choices"][0]["text"] == "two"
        assert service.cancelled.get(timeout=WAIT) == "cmpl-mine-0"
        found = ask(front, "mine").json()
        assert (found["choices"][0]["text"], found["usage"]["prompt_tokens"]) == ("two", 2)
        assert first is not None
        assert service.num_in_flight == 1


def test_ended_by_its_id(service: ManualService) -> None:
    """All its choices, and only they; the state says so."""
    with served(service) as front:
        post(front, prompt="a", n=2, background=True)
        post(front, prompt="a", background=True, name="other")
        names = {service.next_request().request_id for _ in range(2)}
        answer = httpx.post(f"{front.url}/v1/requests/mine/cancel", timeout=WAIT)
        assert (answer.status_code, answer.json()["id"]) == (202, "mine")
        assert {service.cancelled.get(timeout=WAIT) for _ in range(2)} == names
        assert ask(front, "mine").json()["status"] == "cancelled"
        assert ask(front, "other").json()["status"] == "in_progress"


def test_a_failure_is_said_again(service: ManualService) -> None:
    with served(service) as front:
        post(front, prompt="a", background=True)
        service.give(service.next_request(), "x", "failed", error="rank 1 is gone")
        found = ask(front, "mine").json()
    assert (found["status"], found["choices"][0]["text"]) == ("failed", "x")
    assert "rank 1 is gone" in found["error"]["message"]


def test_a_stop_string_may_come_before_the_ticket(pool: ThreadPoolExecutor) -> None:
    """A service that is quick: the request is cancelled all the same, once its ticket is known."""

    class Quick(ManualService):
        def submit(self, request: Request, on_event: Callable[[TokenEvent], None]) -> str:
            ticket = super().submit(request, on_event)
            self.give(request, "text END")
            assert told.wait(WAIT)
            return ticket

    told = threading.Event()
    service = Quick()
    with served(service) as front:
        answer = pool.submit(post, front, prompt="a", stop="END", max_tokens=90)
        service.next_request()
        while 'outcome="stop"} 1.0' not in httpx.get(f"{front.url}/metrics", timeout=WAIT).text:
            pass  # the loop has taken the tokens; the service has not said the ticket
        told.set()
        assert answer.result(WAIT).json()["choices"][0]["text"] == "text "
        assert service.cancelled.get(timeout=WAIT) == "cmpl-mine-0"


@pytest.mark.parametrize("busy", ["status", "submit", "cancel", "find"])
def test_a_busy_service_holds_up_no_other_request(pool: ThreadPoolExecutor, busy: str) -> None:
    """Whatever call of it does not return, the front answers: health within its patience, models at once."""
    released = threading.Event()

    class Busy(ManualService):
        def __getattribute__(self, name: str) -> Any:
            if name == busy:
                return lambda *args, **options: (
                    released.wait(WAIT) and getattr(ManualService, name)(self, *args, **options)
                )
            return super().__getattribute__(name)

    service = Busy()
    calls = {
        "status": lambda front: httpx.get(f"{front.url}/metrics", timeout=WAIT),
        "submit": lambda front: post(front, prompt="a", background=True),
        "cancel": lambda front: [
            post(front, prompt="a", background=True),
            httpx.post(f"{front.url}/v1/requests/mine/cancel", timeout=WAIT),
        ][-1],
        "find": lambda front: ask(front, "mine"),
    }
    with served(service, patience=0.1 if busy == "status" else WAIT) as front:
        waiting = [pool.submit(calls[busy], front) for _ in range(3)]
        for _ in range(2):
            health = httpx.get(f"{front.url}/healthz", timeout=WAIT)
            assert health.status_code == (503 if busy == "status" else 200)
            assert ("has not answered for 0.1 s" in health.json()["reason"]) is (busy == "status")
            assert httpx.get(f"{front.url}/v1/models", timeout=WAIT).status_code == 200
        assert not any(answer.done() for answer in waiting)
        released.set()
        assert all(answer.result(WAIT).status_code in (200, 202, 404) for answer in waiting)
        assert httpx.get(f"{front.url}/healthz", timeout=WAIT).status_code == 200


def test_they_need_the_token_too(service: ManualService) -> None:
    with served(service, api_key="secret") as front:
        assert ask(front, "mine").status_code == 401
        assert httpx.post(f"{front.url}/v1/requests/mine/cancel", timeout=WAIT).status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert ask(front, "mine", headers=headers).status_code == 404
        content = httpx.get(f"{front.url}/metrics", headers=headers, timeout=WAIT).text
    assert 'route="/v1/requests",status="404"} 1.0' in content


@pytest.mark.parametrize("keeps", [True, False])
def test_a_shutdown_leaves_what_the_service_keeps(
    service: ManualService, pool: ThreadPoolExecutor, keeps: bool
) -> None:
    """With a state folder an interrupted request is not cancelled, and its client is told how to go on; a front that
    is started afterwards, on a service that knows the request, shows it."""
    with served(service, keeps_requests=keeps, drain_timeout=0.05) as front:
        answer = pool.submit(post, front, prompt="a")
        request = service.next_request()
        service.give(request, "x")
        front.server.stop()
        front.join()
        sentence = answer.result(WAIT).json()["error"]["message"]
    assert ("ask for the request again by its id" in sentence) is keeps
    if not keeps:
        assert service.cancelled.get(timeout=WAIT) == request.request_id
        return
    with served(service) as front:
        service.give(request, "y", "length")
        assert ask(front, "mine").json()["choices"][0]["text"] == "xy"
    assert service.cancelled.empty()


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_server_that_was_killed_and_started_again(tmp_path: Path) -> None:
    """With its state folder: by the id the answer comes that an undisturbed server gives, whole or streamed, for a
    client that waited and for one in the background."""
    options = ("--ranks", "2", "--state", str(tmp_path / "state"), "--dtype", "float64")
    body = {"prompt": "import os", "max_tokens": 150, "temperature": 0.9, "seed": 5, "ignore_eos": True, "n": 2}

    def send(url: str, name: str, **more: Any) -> httpx.Response:
        headers = {"X-Request-Id": name}
        return httpx.post(f"{url}/v1/completions", json={**body, **more}, headers=headers, timeout=120.0)

    with ServerProcess(tmp_path / "first.log", *options) as server, ThreadPoolExecutor(1) as pool:
        expected = send(server.url, "undisturbed").json()["choices"]
        waiting = pool.submit(send, server.url, "waiting")
        assert send(server.url, "background", background=True).status_code == 202
        url = f"{server.url}/v1/requests"
        for name in ("waiting", "background"):
            wait_until(lambda name=name: _has_begun(httpx.get(f"{url}/{name}", timeout=60.0)))  # type: ignore[misc]
        server.process.kill()
        server.process.wait()
        with pytest.raises(httpx.TransportError):
            waiting.result(WAIT)
    with running_server(tmp_path / "second.log", *options) as server:
        for name in ("waiting", "background"):
            url = f"{server.url}/v1/requests/{name}"
            with httpx.stream("GET", url, params={"stream": "true"}, timeout=120.0) as answer:
                events = list(events_of(answer))
            texts = ["".join(_pieces(events, index)) for index in range(2)]
            whole = httpx.get(url, timeout=60.0).json()
            assert (whole["status"], whole["choices"]) == ("completed", expected)
            assert texts == [choice["text"] for choice in expected]


def _has_begun(answer: httpx.Response) -> bool:
    return answer.status_code == 200 and all(choice["text"] for choice in answer.json()["choices"])
