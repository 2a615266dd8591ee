"""What comes through the door: no route without the token, no body that ends in an error of the server."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from tests.launch.http_front.http_services import WAIT, ManualService, ThreadedFront, served

PROTECTED = (
    "/dashboard/state",
    "/v1/models",
    "/v1/models/toy",
    "/v1/completions",
    "/metrics",
    "/admin/scale",
    "/admin/status",
    "/nothing",
)
HOSTS = (
    "x",
    "x/healthz?",
    "x/healthz#",
    "healthz",
    "x/healthz",
    "/healthz?",
    "x:1/healthz?",
    "[",
    "[::1",
    "x\\",
    "",
    "%",
)
TARGETS = (
    "{path}",
    "{path}?/healthz",
    "{path}#/healthz",
    "http://x/healthz?{path}",
    "/healthz/..{path}",
    "//healthz{path}",
)


@pytest.fixture(scope="module")
def locked() -> Iterator[ThreadedFront]:
    service = ManualService()
    with served(service, api_key="secret", admin=True, dashboard=True) as front:
        yield front
    assert service.submitted.empty()
    assert service.scaled is None


def ask(front: ThreadedFront, method: str, target: str, *headers: str) -> tuple[int, bytes]:
    """Status and body of a request that no client library would send."""
    lines = [f"{method} {target} HTTP/1.1", *headers, "Connection: close", "", ""]
    with front.connect() as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize("path", PROTECTED)
def test_no_header_and_no_target_opens_a_route(locked: ThreadedFront, path: str) -> None:
    """Host headers and request targets that mention the health check, forwarded paths and malformed hosts: 401, 400
    where it is no HTTP, and never an error of the server; what health checks answer says nothing more than that."""
    for method in ("GET", "POST"):
        for target in TARGETS:
            for host in HOSTS:
                status, body = ask(locked, method, target.format(path=path), f"Host: {host}")
                healthy = status == 200 and json.loads(body).keys() >= {"serving", "generation"}
                assert status in (400, 401, 404, 405) or healthy, (method, target, host, status)
                if target == "{path}":
                    assert status in (400, 401), (method, target, host, status)
        for name in ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Path", "X-Forwarded-Prefix", "Forwarded"):
            assert ask(locked, method, path, "Host: x", f"{name}: /healthz")[0] == 401


@pytest.mark.parametrize(
    ("header", "opens"),
    [
        *(("Bearer secret", True), ("bearer secret", True), ("BEARER  secret", True)),
        *(("Bearer secre", False), ("Bearer secrets", False), ("Bearer", False), ("secret", False), ("", False)),
        *(("Bearer Secret", False), ("Basic secret", False), ("Bearer secret x", False), ("Bearer s\xe9cret", False)),
    ],
)
def test_only_the_token_opens(locked: ThreadedFront, header: str, opens: bool) -> None:
    """The scheme in any case (RFC 7235), the token exactly."""
    assert ask(locked, "GET", "/v1/models", "Host: x", f"Authorization: {header}")[0] == (200 if opens else 401)


def test_a_missing_slash_is_not_mended_by_the_host_header(locked: ThreadedFront) -> None:
    """No redirect to where the client's header says."""
    key = "Authorization: Bearer secret"
    assert ask(locked, "GET", "/healthz/", "Host: evil.example", key)[0] == 404
    assert ask(locked, "GET", "/metrics/", "Host: [", key)[0] in (400, 404)


def put_somewhere(document: dict[str, Any], value: str, rng: np.random.Generator) -> None:
    """The value as a key or as a value, of the body or of an object in it."""
    name = str(rng.choice(["model", "prompt", "stop", "user", "suffix", "logprobs", "stream_options", "seed", "new"]))
    kind = int(rng.integers(5))
    document[name] = [value, [value], {value: 1}, {"a": value}, [1, value]][kind]
    if rng.integers(2):
        document[value] = None if rng.integers(2) else value


@pytest.fixture(params=[1, 2, "today"])
def seed(request: pytest.FixtureRequest, dated_seed: int) -> int:
    return dated_seed if request.param == "today" else int(request.param)


def test_half_a_character_anywhere_is_the_clients_fault(seed: int) -> None:
    """Surrogates without their half, in keys, values, nested or not: a 4xx with an error object."""
    rng = np.random.default_rng(seed)
    service = ManualService()
    service.serving, service.reason = False, "a test"
    with served(service) as front, httpx.Client(base_url=front.url, timeout=WAIT) as client:
        for _ in range(60):
            document: dict[str, Any] = {"prompt": "a"}
            put_somewhere(document, str(rng.choice(["\ud800", "a\udfff", "\udc80b", "\udcff\ud800"])), rng)
            content = json.dumps(document).encode()
            answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert 400 <= answer.status_code < 500 or "not serving" in answer.text, document
            assert answer.json()["error"]["message"]
        for path in ("/v1/models/%ed%a0%80", "/v1/models/%ff", "/admin/%ed%a0%80"):
            assert client.get(path).status_code == 404
