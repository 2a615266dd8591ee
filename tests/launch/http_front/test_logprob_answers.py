"""Log-probabilities in answers, on a service that the test plays by hand: both routes, whole and streamed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from moeplace.runtime.engine.logprobs import TokenLogprob
from tests.launch.http_front.http_services import WAIT, ManualService, served

OWN = (-0.5, -1.0, -1.5, -2.0, -2.5)
TEXT = "naïf".encode()


def told(index: int) -> TokenLogprob:
    """Of token `index`: its own number, and two likeliest."""
    return TokenLogprob(OWN[index], ((TEXT[index], OWN[index]), (ord("z"), -9.0 - index)))


@pytest.fixture
def client(service: ManualService) -> Iterator[OpenAI]:
    with served(service) as front:
        yield OpenAI(base_url=f"{front.url}/v1", api_key="none", timeout=WAIT, max_retries=0)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def play(service: ManualService, *, wish: int) -> None:
    """Five tokens in three events, of which one ends in the middle of a character."""
    request = service.next_request()
    assert request.logprobs == wish
    for start, end in ((0, 1), (1, 3), (3, 5)):
        reason = "length" if end == 5 else None
        service.give(request, TEXT[start:end], reason, logprobs=tuple(told(index) for index in range(start, end)))


TOKENS = ["n", "a", "\ufffd", "\ufffd", "f"]


def test_completions(service: ManualService, client: OpenAI, pool: ThreadPoolExecutor) -> None:
    """Lists by token; offsets in what those lists say."""
    whole = pool.submit(client.completions.create, model="toy", prompt="a", logprobs=2)
    play(service, wish=2)
    choice = whole.result(WAIT).choices[0]
    assert choice.text == "naïf"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == TOKENS
    assert choice.logprobs.token_logprobs == list(OWN)
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[4] == {"f": -2.5, "z": -13.0}
    assert [list(top) for top in choice.logprobs.top_logprobs] == [[token, "z"] for token in TOKENS]


def test_streamed_completions(service: ManualService, client: OpenAI, pool: ThreadPoolExecutor) -> None:
    """The pieces join to the same lists, and none is shown twice."""
    read = pool.submit(lambda: list(client.completions.create(model="toy", prompt="a", logprobs=0, stream=True)))
    play(service, wish=0)
    shown = [chunk.choices[0].logprobs for chunk in read.result(WAIT)]
    assert [token for part in shown for token in part.tokens] == TOKENS  # type: ignore[union-attr]
    assert [value for part in shown for value in part.token_logprobs] == list(OWN)  # type: ignore[union-attr]
    assert [offset for part in shown for offset in part.text_offset] == [0, 1, 2, 3, 4]  # type: ignore[union-attr]


def test_chats(service: ManualService, client: OpenAI, pool: ThreadPoolExecutor) -> None:
    """Objects by token, with bytes; whole and streamed alike."""
    messages = [{"role": "user", "content": "a"}]
    asked = {"model": "toy", "messages": messages, "logprobs": True}
    whole = pool.submit(client.chat.completions.create, top_logprobs=2, **asked)  # type: ignore[arg-type]
    play(service, wish=2)
    found = whole.result(WAIT).choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert [(entry.token, entry.logprob) for entry in found.content] == list(zip(TOKENS, OWN, strict=True))
    assert found.content[0].bytes == [ord("n")]
    assert [(top.token, top.logprob) for top in found.content[1].top_logprobs] == [("a", -1.0), ("z", -10.0)]
    read = pool.submit(lambda: list(client.chat.completions.create(stream=True, **asked)))  # type: ignore[call-overload]
    play(service, wish=0)
    pieces = [chunk.choices[0].logprobs for chunk in read.result(WAIT)]
    assert [entry.logprob for piece in pieces for entry in piece.content] == list(OWN)


def test_what_is_not_known_is_null(service: ManualService, client: OpenAI, pool: ThreadPoolExecutor) -> None:
    """A token that was delivered to somebody else before; and an answer that wants none has none."""
    whole = pool.submit(client.completions.create, model="toy", prompt="a", logprobs=1)
    service.give(service.next_request(), b"x", "length", logprobs=(None,))
    found = whole.result(WAIT).choices[0].logprobs
    assert found is not None
    assert (found.token_logprobs, found.top_logprobs) == ([None], [{}])
    whole = pool.submit(client.completions.create, model="toy", prompt="a")
    service.give(service.next_request(), b"x", "length")
    assert whole.result(WAIT).choices[0].logprobs is None
