"""Connections to the front: clients that go, readers that are slow, and a server that ends."""

import json
import queue
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from moeplace.launch.http_front.server import bind
from moeplace.launch.http_front.settings import FrontSettings
from tests.launch.http_front.http_services import (
    WAIT,
    ManualService,
    ThreadedFront,
    metric,
    post,
    send_raw,
    served,
    wait_until,
)


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_cancels(service: ManualService, stream: bool) -> None:
    """Of a client that waits for tokens and of one that waits for the whole answer."""
    with served(service) as front:
        connection = send_raw(front, {"prompt": "a", "n": 2, "stream": stream})
        names = {service.next_request().request_id for _ in range(2)}
        connection.close()
        assert {service.cancelled.get(timeout=WAIT) for _ in range(2)} == names
        assert metric(front, "moeplace_completions_total", outcome="cancelled") == 2
        assert metric(front, "moeplace_completions_in_flight") == 0


def test_a_slow_reader_holds_up_nobody(service: ManualService, pool: ThreadPoolExecutor) -> None:
    """One takes nothing: others are served meanwhile, and after the time allowed it is cut off."""
    with served(service, stall_timeout=0.5) as front:
        stuck = send_raw(front, {"prompt": "a", "stream": True, "max_tokens": 100_000}, receive_buffer=4096)
        slow = service.next_request()
        while service.cancelled.empty():
            service.give(slow, "x" * 20_000)
            answer = pool.submit(post, front, prompt="b")
            service.give(service.next_request(), "y", "length")
            assert answer.result(WAIT).json()["choices"][0]["text"] == "y"
        assert service.cancelled.get() == slow.request_id
        stuck.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the system has no such option")
def test_connections_end_when_nobody_takes_what_was_sent() -> None:
    """The system closes them after the stall timeout, also those that this process has let go of."""
    settings = FrontSettings("m", stall_timeout=2.5)
    with bind("127.0.0.1", 0, settings) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2500


def test_what_gathers_comes_in_one_piece(service: ManualService) -> None:
    """Every token once, in order, however the events and the reader interleave; no character is split."""
    text = "aé日😀" * 50
    body = {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    with (
        served(service) as front,
        httpx.stream("POST", f"{front.url}/v1/completions", json=body, timeout=WAIT) as answer,
    ):
        request = service.next_request()
        for token in text.encode():
            service.give(request, bytes([token]))
        service.give(request, end="length")
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks.pop()["usage"]["completion_tokens"] == len(text.encode())
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_shutdown_finishes_what_runs(service: ManualService, pool: ThreadPoolExecutor) -> None:
    """New connections are refused, the answer under way is complete."""
    with served(service, drain_timeout=WAIT) as front:
        answer = pool.submit(post, front, prompt="a", stream=True)
        request = service.next_request()
        front.server.stop()
        wait_until(lambda: not _accepts(front))
        service.give(request, "done", "length")
        assert answer.result(WAIT).text.endswith("data: [DONE]\n\n")
        front.join()
    assert service.cancelled.empty()


def test_shutdown_ends_what_does_not_finish(service: ManualService, pool: ThreadPoolExecutor) -> None:
    """After the time allowed it gets an error, and the service hears of it."""
    with served(service, drain_timeout=0.3) as front:
        answers = [pool.submit(post, front, prompt="a", stream=stream) for stream in (True, False)]
        names = {service.next_request().request_id for _ in answers}
        front.server.stop()
        assert all("shutting down" in answer.result(WAIT).text for answer in answers)
        assert answers[1].result().status_code == 503
        front.join()
    assert {service.cancelled.get_nowait(), service.cancelled.get_nowait()} == names
    with pytest.raises(queue.Empty):
        service.cancelled.get_nowait()


def _accepts(front: ThreadedFront) -> bool:
    try:
        front.connect().close()
    except OSError:
        return False
    return True
