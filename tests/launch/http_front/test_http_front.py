"""The HTTP front on a service that the test plays by hand: limits, errors, doors, figures."""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeplace.launch.http_front.completions.body import parse_body
from moeplace.launch.http_front.completions.run import CompletionRun
from moeplace.launch.http_front.fair_queue import FairQueue
from moeplace.launch.http_front.keys import read_api_key
from moeplace.launch.http_front.settings import FrontSettings, parse_address
from moeplace.launch.http_front.wire.metrics import FrontMetrics
from moeplace.profiling.errors import InputError
from moeplace.runtime.service.api import TokenEvent
from tests.launch.http_front.http_services import WAIT, ManualService, ThreadedFront, metric, post, served

JSON = {"content-type": "application/json"}
UNSUPPORTED = [
    *(("response_format", {"type": "json_object"}), ("logit_bias", {"5": 1}), ("tools", [{"type": "function"}])),
    *(("suffix", "x"), ("length_penalty", 2), ("use_beam_search", True), ("best_of", True), ("num_beams", 4)),
]


@pytest.fixture(scope="module")
def idle_front() -> Iterator[ThreadedFront]:
    """A front whose service must hear of nothing."""
    service = ManualService()
    with served(service, max_concurrent=8, max_queue=0, max_prompt_tokens=20) as front:
        yield front
    assert service.submitted.empty()


def test_text_and_finish_reasons(service: ManualService, pool: ThreadPoolExecutor) -> None:
    """Prompts in order, each n times; the stop token is counted but not shown; every choice has its number."""
    with served(service) as front:
        answer = pool.submit(post, front, prompt=["ab", "é"], n=2, seed=7, max_tokens=5, echo=True)
        requests = [service.next_request() for _ in range(4)]
        assert [(request.sampling.seed, request.sampling.choice) for request in requests] == [(7, n) for n in range(4)]
        assert [request.token_ids for request in requests[1:3]] == [(97, 98), (195, 169)]
        for index, request in enumerate(reversed(requests)):
            service.give(request, f"{index}")
            service.give(request, "!" if index % 2 else "\0", "length" if index % 2 else "stop")
        document = answer.result(WAIT).json()
    assert [choice["text"] for choice in document["choices"]] == ["ab3!", "ab2", "é1!", "é0"]
    assert [choice["finish_reason"] for choice in document["choices"]] == ["length", "stop", "length", "stop"]
    assert document["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}


def test_a_stop_string_ends_the_request_in_the_service(service: ManualService, pool: ThreadPoolExecutor) -> None:
    """Spread over two events; nothing of it is shown."""
    with served(service) as front:
        answer = pool.submit(post, front, prompt="a", stop=["END"], max_tokens=50)
        request = service.next_request()
        service.give(request, "text EN")
        service.give(request, "D and more")
        choice = answer.result(WAIT).json()["choices"][0]
        assert service.cancelled.get(timeout=WAIT) == request.request_id
    assert (choice["text"], choice["finish_reason"]) == ("text ", "stop")


def test_no_tokens_are_a_complete_answer(service: ManualService) -> None:
    """max_tokens 0 with echo gives the prompt back and asks the service for nothing."""
    with served(service) as front:
        choice = post(front, prompt="abc", max_tokens=0, echo=True).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert service.submitted.empty()


@pytest.mark.parametrize(
    ("body", "status", "sentence", "param"),
    [
        ({}, 400, "prompt must be text", "prompt"),
        ({"prompt": []}, 400, "prompt must be text", "prompt"),
        ({"prompt": ""}, 400, "at least one token", "prompt"),
        ({"prompt": ["a", [1]]}, 400, "prompt must be text", "prompt"),
        ({"prompt": [1, True]}, 400, "prompt must be text", "prompt"),
        ({"prompt": [[1], []]}, 400, "at least one token", "prompt"),
        ({"prompt": "\ud800"}, 400, "surrogate", "prompt"),
        ({"prompt": "a", "n": 0}, 400, "n (0)", "n"),
        ({"prompt": "a", "n": 9}, 400, "9 completions in one request", "n"),
        ({"prompt": "a", "n": True}, 400, "n must be of type integer", "n"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens (-1)", "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, 400, "max_tokens must be of type integer", "max_tokens"),
        ({"prompt": "a", "max_tokens": 200_000}, 400, "can never fit", "prompt"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature (-1.0)", "temperature"),
        ({"prompt": "a", "temperature": 10**400}, 400, "must be numbers", None),
        ({"prompt": "a", "top_p": 0}, 400, "top_p (0.0)", "top_p"),
        ({"prompt": "a", "min_p": 2}, 400, "min_p (2.0)", "min_p"),
        ({"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty (0.0)", "repetition_penalty"),
        ({"prompt": "a", "presence_penalty": 3}, 400, "presence_penalty (3.0)", "presence_penalty"),
        ({"prompt": "a", "top_k": -2}, 400, "top_k (-2)", "top_k"),
        ({"prompt": "a", "min_tokens": -2}, 400, "min_tokens (-2)", "min_tokens"),
        ({"prompt": "a", "stop_token_ids": [1] * 1025}, 400, "has 1025 ids", "stop_token_ids"),
        ({"prompt": "a", "stop": [""]}, 400, "none of them empty", "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, 400, "stop has 17 strings", "stop"),
        ({"prompt": "a", "stop_token_ids": ["x"]}, 400, "stop_token_ids must be", "stop_token_ids"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs (21) must lie in 0..20", "logprobs"),
        ({"prompt": "a", "logprobs": -1}, 400, "logprobs (-1) must lie in 0..20", "logprobs"),
        ({"prompt": "a", "logprobs": True}, 400, "logprobs must be of type integer", "logprobs"),
        ({"prompt": "a", "logprobs": 0, "echo": True}, 400, "logprobs together with echo", "logprobs"),
        ({"prompt": "a", "top_logprobs": 2}, 400, "top_logprobs is not supported", "top_logprobs"),
        *(({"prompt": "a", name: value}, 400, f"{name} is not supported", name) for name, value in UNSUPPORTED),
        ({"prompt": "a", "best_of": 3}, 400, "best_of is not supported", "best_of"),
        ({"prompt": "a", "tempature": 1}, 400, "unknown field 'tempature'", "tempature"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "needs stream", "stream_options"),
        ({"prompt": "a", "model": "other"}, 404, "'other' does not exist", "model"),
        ({"prompt": "a" * 21}, 400, "a prompt has 21 tokens, at most 20", "prompt"),
    ],
)
def test_bad_bodies_are_refused(
    idle_front: ThreadedFront, body: dict[str, Any], status: int, sentence: str, param: str | None
) -> None:
    """An OpenAI error object that names the field and the rule."""
    content = json.dumps(body).encode()
    answer = httpx.post(f"{idle_front.url}/v1/completions", content=content, headers=JSON, timeout=WAIT)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert sentence in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"])
def test_what_is_not_json_is_refused(idle_front: ThreadedFront, content: bytes) -> None:
    """Including nesting and numbers that Python refuses."""
    answer = httpx.post(f"{idle_front.url}/v1/completions", content=content, headers=JSON, timeout=WAIT)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(("the body is not JSON", "the body must be"))


def test_values_that_ask_for_nothing_are_accepted(service: ManualService, pool: ThreadPoolExecutor) -> None:
    """Clients and load generators send defaults; what nobody knows may be null."""
    neutral = {
        **{"best_of": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "suffix": None},
        **{"repetition_penalty": 1.0, "min_p": 0, "top_k": -1, "length_penalty": 1.0, "use_beam_search": False},
        **{"skip_special_tokens": True, "response_format": {"type": "text"}, "min_tokens": 0, "guided_json": None},
        **{"typical_p": 1, "no_repeat_ngram_size": 0, "tools": [], "metadata": {"a": "b"}, "priority": 0},
    }
    with served(service) as front:
        answer = pool.submit(post, front, prompt=[1, 2], user="me", logprobs=None, temperature=None, **neutral)
        request = service.next_request()
        assert (request.token_ids, request.sampling.temperature, request.max_new_tokens) == ((1, 2), 1.0, 16)
        service.give(request, "x", "length")
        assert answer.result(WAIT).status_code == 200


def test_stop_ids(service: ManualService, pool: ThreadPoolExecutor) -> None:
    """Added ones join the model's; ignore_eos leaves the model's out."""
    bodies = [{}, {"stop_token_ids": [5]}, {"stop_token_ids": [5], "ignore_eos": True}, {"ignore_eos": True}]
    with served(service) as front:
        found = []
        for body in bodies:
            pool.submit(post, front, prompt="a", **body)
            request = service.next_request()
            found.append(request.stop_ids)
            service.give(request, end="length")
    assert found == [None, (0, 5), (5,), ()]


@pytest.mark.parametrize("declared", [True, False])
def test_oversized_bodies(service: ManualService, declared: bool) -> None:
    """Declared or in pieces without end: status 413, nothing kept, and the next request is served."""

    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            yield b"a" * 4096

    with served(service, max_body_bytes=10_000) as front:
        content = b"a" * 40_960_000 if declared else endless()
        answer = httpx.post(f"{front.url}/v1/completions", content=content, headers=JSON, timeout=WAIT)
        assert answer.status_code == 413
        assert "10000 bytes" in answer.json()["error"]["message"]
        assert httpx.get(f"{front.url}/healthz", timeout=WAIT).status_code == 200


def test_a_body_that_does_not_come(service: ManualService) -> None:
    """The connection is not kept for it."""
    with served(service, body_timeout=0.2) as front, front.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_other_content_types_are_refused(service: ManualService) -> None:
    """A page in a browser may send text to a local port without asking; JSON it may not."""
    with served(service) as front:
        answer = httpx.post(f"{front.url}/v1/completions", content=b'{"prompt": "a"}', timeout=WAIT)
        assert answer.status_code == 415


def test_too_many_at_once(service: ManualService, pool: ThreadPoolExecutor) -> None:
    """Status 429 with Retry-After; there is room again when one has finished."""
    with served(service, max_concurrent=2, max_queue=0) as front:
        running = pool.submit(post, front, prompt="a", n=2)
        requests = [service.next_request() for _ in range(2)]
        refused = post(front, prompt="a")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        for request in requests:
            service.give(request, "x", "length")
        assert running.result(WAIT).status_code == 200
        answer = pool.submit(post, front, prompt="a", n=2)
        for _ in range(2):
            service.give(service.next_request(), "x", "length")
        assert answer.result(WAIT).status_code == 200


def test_room_is_looked_for_again_when_a_body_has_come(service: ManualService) -> None:
    """Two requests whose heads came while there was room for one: the second body is refused, nothing is submitted."""
    content = json.dumps({"prompt": "a"}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    with served(service, max_concurrent=1, max_queue=0) as front, front.connect() as first, front.connect() as second:
        for connection in (first, second):  # both are asked to go on: each has been let in
            connection.sendall(head.encode() + b"\r\nExpect: 100-continue\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        first.sendall(content)
        request = service.next_request()
        second.sendall(content)
        assert second.recv(100).startswith(b"HTTP/1.1 429 ")
        assert service.submitted.empty()
        service.give(request, "x", "length")
        assert first.recv(100).startswith(b"HTTP/1.1 200 ")


def test_seconds_are_observed(service: ManualService) -> None:
    """Each answer once, within the time that the test took; times between tokens are shared out to them."""
    with served(service) as front:
        started = time.perf_counter()
        with ThreadPoolExecutor(2) as both:
            answers = [both.submit(post, front, prompt="a", stream=stream) for stream in (True, False)]
            for _ in answers:
                request = service.next_request()
                for text in ("x", "yz"):
                    service.give(request, text)
                service.give(request, end="length")
            assert all(answer.result(WAIT).status_code == 200 for answer in answers)
        elapsed = time.perf_counter() - started
        for name, count in (("request", 2), ("time_to_first_token", 2), ("time_per_token", 4)):
            assert metric(front, f"moeplace_{name}_seconds_count") == count
            assert 0 < metric(front, f"moeplace_{name}_seconds_sum") < 2 * elapsed


def test_latencies_are_those_of_the_events() -> None:
    """By hand: the first token half a second after the request, three more a quarter of a second later."""
    metrics = FrontMetrics(ManualService(), FairQueue(1, 0))
    taken: list[tuple[Any, TokenEvent]] = []

    class Bridge:
        def post(self, take: Any, event: TokenEvent) -> None:
            taken.append((take, event))

        def aside(self, call: Any) -> None:
            raise AssertionError("nothing was cancelled")

    service = ManualService()
    body = parse_body({"prompt": [1]}, encode=None, model="toy", model_stop_ids=(), default_seed=0)
    run = CompletionRun(service, Bridge(), metrics, body, name="a", decode=lambda ids: "x" * len(ids))  # type: ignore[arg-type]
    asyncio.run(run.start())
    began = run.choices[0].last_moment
    request = service.next_request()
    for text, moment in (("a", began + 0.5), ("bcd", began + 0.75)):
        service.give(request, text)
        take, event = taken.pop()
        take(event, moment)
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }
    assert samples["moeplace_time_to_first_token_seconds_sum"] == pytest.approx(0.5)
    assert samples["moeplace_time_per_token_seconds_sum"] == pytest.approx(0.25)
    assert samples["moeplace_time_per_token_seconds_count"] == 3
    assert samples["moeplace_generated_tokens_total"] == 4


def test_bearer_token(service: ManualService) -> None:
    """Everything but the health check needs it."""
    with served(service, api_key="secret") as front:
        codes = {}
        for token in (None, "Bearer secret", "Bearer secre", "Bearer secret2", "Basic secret", "Bearer é"):
            headers = {} if token is None else {"Authorization": token.encode()}
            codes[token] = [
                httpx.get(f"{front.url}{path}", headers=headers, timeout=WAIT).status_code  # type: ignore[arg-type]
                for path in ("/healthz", "/v1/models", "/metrics", "/nothing")
            ]
    assert codes.pop("Bearer secret") == [200, 200, 200, 404]
    assert set(map(tuple, codes.values())) == {(200, 401, 401, 401)}


def test_administration(service: ManualService) -> None:
    """Where it was asked for, and only with the token: the number of ranks, and the state of the service."""

    def ask(front: ThreadedFront, content: object, key: str = "secret") -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{front.url}/admin/scale", json=content, headers=headers, timeout=WAIT)

    with served(service, api_key="secret", admin=True) as front:
        answer = ask(front, {"ranks": 3, "leaving": [1]})
        assert (answer.status_code, service.scaled) == (202, (3, [1]))
        assert answer.json()["desired"] == 4
        bodies = ({"ranks": 0}, {"ranks": -1}, {"ranks": True}, {}, {"ranks": 2, "leaving": 1}, {"rank": 2}, [1])
        assert [ask(front, body).status_code for body in bodies] == [400] * len(bodies)
        assert ask(front, {"ranks": 5}, key="other").status_code == 401
        assert service.scaled == (3, [1])
    with served(service, api_key="secret") as front:
        assert ask(front, {"ranks": 2}).status_code == 404
    with pytest.raises(InputError, match="needs a bearer token"):
        FrontSettings("m", admin=True)


@pytest.mark.parametrize("stream", [True, False])
def test_a_failed_request(service: ManualService, pool: ThreadPoolExecutor, stream: bool) -> None:
    """The service's sentence reaches the client, as an error object."""
    with served(service) as front:
        answer = pool.submit(post, front, prompt="a", stream=stream)
        request = service.next_request()
        service.give(request, "x")
        service.give(request, end="failed", error="rank 1 is gone")
        content = answer.result(WAIT)
    documents = [json.loads(line.removeprefix("data: ")) for line in content.text.splitlines() if line]
    assert content.status_code == (200 if stream else 500)
    assert "rank 1 is gone" in documents[-1]["error"]["message"]
    assert "[DONE]" not in content.text


def test_health_says_why_not(service: ManualService) -> None:
    """A service that does not serve: 503 with its reason, for the health check and for requests."""
    with served(service) as front:
        assert httpx.get(f"{front.url}/healthz", timeout=WAIT).json()["serving"] is True
        service.serving, service.reason = False, "the members are being started"
        health, refused = httpx.get(f"{front.url}/healthz", timeout=WAIT), post(front, prompt="a")
        assert (health.status_code, health.json()["reason"]) == (503, "the members are being started")
        assert (health.json()["generation"], health.json()["placement_version"]) == (3, 7)
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)


def test_metrics_have_bounded_cardinality(service: ManualService) -> None:
    """100 layers, unknown paths: the series stay the same, and say what the service says."""
    with served(service) as front:
        series = []
        for number in range(20):
            httpx.get(f"{front.url}/nothing/{number}", timeout=WAIT)
            families = text_string_to_metric_families(httpx.get(f"{front.url}/metrics", timeout=WAIT).text)
            series.append(sum(len(family.samples) for family in families))
        assert series[-1] == series[1] < 150
        assert metric(front, "moeplace_http_requests_total", route="other", status="404") == 20
        states = {state: metric(front, "moeplace_members", state=state) for state in ("desired", "allocated", "active")}
        assert states == {"desired": 4, "allocated": 3, "active": 2}
        assert metric(front, "moeplace_layer_imbalance", over="worst") == 1.99
        assert metric(front, "moeplace_sent_bytes_total", tier="inter_node") == 8
        assert metric(front, "moeplace_collectives_total", kind="dispatch") == 6
        assert metric(front, "moeplace_placement_version") == 7
        assert metric(front, "moeplace_migration_planned_bytes") == 9


@pytest.mark.parametrize(
    ("text", "address"),
    [("0.0.0.0:80", ("0.0.0.0", 80)), (":0", ("127.0.0.1", 0)), ("[::1]:8000", ("::1", 8000))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    """Loopback where no host is given."""
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "8000", "a:", "a:b", "a:65536", "::1:8000", "a:-1", "a:²"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(InputError, match="the address"):
        parse_address(text)


def test_api_key_sources(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file comes before the environment; without either there is none; a bad one is refused."""
    path = tmp_path / "key"
    monkeypatch.delenv("MOEPLACE_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("MOEPLACE_API_KEY", "from-environment")
    path.write_text("from-file\nanything\n")
    assert (read_api_key(path), read_api_key(None)) == ("from-file", "from-environment")
    for content in (b"", b"two words\n", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="key"):
            read_api_key(path)


@pytest.mark.parametrize(("name", "value"), [("max_concurrent", 0), ("drain_timeout", 0.0), ("model", "")])
def test_settings_are_checked(name: str, value: object) -> None:
    with pytest.raises(InputError):
        FrontSettings(**{"model": "m", name: value})  # type: ignore[arg-type]
