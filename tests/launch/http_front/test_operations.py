"""What runs a server: health checks, the time before it is ready and after it is asked to end, TLS, logs."""

import json
import logging
import shutil
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from moeplace.launch.http_front.loading import answering_while_loading
from moeplace.launch.http_front.server import bind
from moeplace.launch.http_front.settings import FrontSettings
from moeplace.launch.serving.logs import JsonFormatter
from moeplace.profiling.errors import InputError
from tests.launch.http_front.http_services import WAIT, ManualService, ThreadedFront, served, wait_until


def state_of(front: ThreadedFront) -> tuple[int, str]:
    answer = httpx.get(f"{front.url}/readyz", timeout=WAIT)
    return answer.status_code, answer.json()["state"]


def test_ready_and_alive_are_two_things() -> None:
    """A change of ranks takes requests; a service that cannot go on is not alive; neither needs a token."""
    service = ManualService()
    with served(service, api_key="secret") as front:
        assert state_of(front) == (200, "changing")
        service.changing = False
        assert state_of(front) == (200, "ready")
        service.serving, service.reason = False, "all ranks are gone"
        assert state_of(front) == (503, "unavailable")
        assert httpx.get(f"{front.url}/livez", timeout=WAIT).status_code == 200
        service.ended = True
        assert httpx.get(f"{front.url}/livez", timeout=WAIT).status_code == 503


def test_a_service_that_hangs_is_alive() -> None:
    """Who kills what is busy loses requests."""

    class Hanging(ManualService):
        def status(self):  # type: ignore[no-untyped-def]
            raise RuntimeError("busy")

    with served(Hanging()) as front:
        assert httpx.get(f"{front.url}/livez", timeout=WAIT).status_code == 200
        assert httpx.get(f"{front.url}/readyz", timeout=WAIT).status_code == 503


def test_requests_are_taken_in_the_grace() -> None:
    """After the signal the health check fails at once, and a request that still comes is answered."""
    service = ManualService()
    with served(service, drain_grace=WAIT, drain_timeout=WAIT) as front, ThreadPoolExecutor(1) as pool:
        front.server.stop()
        wait_until(lambda: state_of(front)[1] == "draining")
        body = {"prompt": "a"}
        late = pool.submit(httpx.post, f"{front.url}/v1/completions", json=body, timeout=WAIT)
        service.give(service.next_request(), "late", "length")
        assert late.result(WAIT).json()["choices"][0]["text"] == "late"
        front.server.force_exit = True  # what a second signal does: it does not wait any longer
        front.join()


def test_somebody_answers_while_ranks_start() -> None:
    """200 for /livez, 503 for all else; the socket then goes to the front, with what waits in it."""
    listener = bind("127.0.0.1", 0, FrontSettings("toy"))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listener:
        for _ in range(2):  # the socket outlives it
            with answering_while_loading(listener):
                assert httpx.get(f"{url}/livez", timeout=WAIT).json() == {"alive": True}
                assert httpx.get(f"{url}/readyz", timeout=WAIT).json()["state"] == "starting"
                refused = httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=WAIT)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
                assert int(refused.headers["retry-after"]) > 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_tls(tmp_path: Path) -> None:
    """HTTPS with the certificate that was given; a key of another one is refused before anything starts."""
    pairs = [(str(tmp_path / f"{name}.pem"), str(tmp_path / f"{name}.key")) for name in ("one", "other")]
    for certificate, key in pairs:
        options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        command = ["openssl", "req", *options, "-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate]
        subprocess.run([*command, "-keyout", key], check=True, capture_output=True)
    (certificate, key), (_, other) = pairs
    context = ssl.create_default_context(cafile=certificate)
    with served(ManualService(), tls_certificate=certificate, tls_key=key) as front:
        assert httpx.get(f"{front.url}/livez", verify=context, timeout=WAIT).status_code == 200
    with pytest.raises(InputError, match="cannot be used for TLS"):
        FrontSettings("toy", tls_certificate=certificate, tls_key=other)
    with pytest.raises(InputError, match="needs both files"):
        FrontSettings("toy", tls_certificate=certificate)


def test_the_access_log_has_the_callers_id(caplog: pytest.LogCaptureFixture) -> None:
    """A line for every answer, which stays a line whatever clients send; as JSON, with its fields."""
    caplog.set_level(logging.INFO, "moeplace.access")
    service = ManualService()
    with served(service) as front, ThreadPoolExecutor(1) as pool:
        headers = {"X-Request-Id": "mine-7"}
        body = {"prompt": "a"}
        asked = pool.submit(httpx.post, f"{front.url}/v1/completions", json=body, headers=headers, timeout=WAIT)
        service.give(service.next_request(), "x", "length")
        length = len(asked.result(WAIT).content)
        httpx.get(f"{front.url}/no%0Aline", headers={"X-Request-Id": "a b"}, timeout=WAIT)
    first, second = (record for record in caplog.records if record.name == "moeplace.access")
    found = json.loads(JsonFormatter().format(first))
    assert (found["path"], found["status"], found["request_id"]) == ("/v1/completions", 200, "mine-7")
    assert (found["bytes"], found["client"], found["method"]) == (length, "127.0.0.1", "POST")
    assert found["seconds"] > 0
    assert second.getMessage().count("\n") == 0
    assert "404" in second.getMessage()
    assert second.getMessage().endswith("id=a\\x20b")


def test_clients_may_ask_for_so_many_ranks() -> None:
    """--max-ranks."""
    service = ManualService()
    with served(service, api_key="secret", admin=True, max_ranks=4) as front:
        headers = {"Authorization": "Bearer secret"}
        for ranks, status in ((5, 400), (4, 202)):
            answer = httpx.post(f"{front.url}/admin/scale", json={"ranks": ranks}, headers=headers, timeout=WAIT)
            assert answer.status_code == status
    assert service.scaled == (4, None)
