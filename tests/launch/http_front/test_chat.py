"""Chats: the official client, request shapes of load generators, bad messages, and the checkpoint's own template."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from moeplace.launch.serving.requests_file import Tokenizer
from moeplace.profiling.errors import InputError
from tests.launch.http_front.http_services import WAIT, ByteCoder, ManualService, ThreadedFront, served
from tests.shared_data import tiny_moe_path

MESSAGES: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "é"}, {"type": "text", "text": "?"}], "name": None},
]
PROMPT = "<system>be brief<user>é?<assistant>"


@pytest.fixture(scope="module")
def service() -> ManualService:
    return ManualService()


@pytest.fixture(scope="module")
def front(service: ManualService) -> Iterator[ThreadedFront]:
    with served(service, max_concurrent=8) as front:
        yield front


@pytest.fixture(scope="module")
def client(front: ThreadedFront) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{front.url}/v1", api_key="none", timeout=WAIT, max_retries=0) as client:
        yield client


def test_whole_answers(service: ManualService, client: OpenAI, pool: ThreadPoolExecutor) -> None:
    """The template makes the prompt; each choice is a message of the assistant; usage counts the rendered prompt."""
    asked = pool.submit(
        client.chat.completions.create,
        model="toy",
        messages=MESSAGES,
        n=2,
        seed=9,
        max_completion_tokens=30,
        frequency_penalty=0.5,
        stop="END",
    )
    requests = [service.next_request() for _ in range(2)]
    assert {bytes(request.token_ids).decode() for request in requests} == {PROMPT}
    assert [(r.max_new_tokens, r.sampling.choice, r.sampling.frequency_penalty) for r in requests] == [
        (30, 0, 0.5),
        (30, 1, 0.5),
    ]
    service.give(requests[0], "yes\0", "stop")
    service.give(requests[1], "no E")
    service.give(requests[1], "ND")
    answer = asked.result(WAIT)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert [(c.message.role, c.message.content, c.finish_reason) for c in answer.choices] == [
        ("assistant", "yes", "stop"),
        ("assistant", "no ", "stop"),
    ]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT.encode())


def test_streams(service: ManualService, client: OpenAI, pool: ThreadPoolExecutor) -> None:
    """Each choice says once who speaks; the pieces join; usage comes last; the client's own types fit."""

    def read() -> list[Any]:
        with client.chat.completions.create(
            model="toy", messages=MESSAGES, n=2, stream=True, stream_options={"include_usage": True}
        ) as stream:
            return list(stream)

    asked = pool.submit(read)
    requests = [service.next_request() for _ in range(2)]
    assert requests[0].max_new_tokens == 256
    for token in "naïve":
        for request in requests:
            service.give(request, token)
    for request in requests:
        service.give(request, end="length")
    *chunks, last = asked.result(WAIT)
    assert last.usage.completion_tokens == 2 * len("naïve".encode())
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert [choice.delta.role for choice in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert "".join(choice.delta.content for choice in mine) == "naïve"
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["length"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


SHAPES = [  # what load generators send: `vllm bench serve` (openai, openai-chat), guidellm, genai-perf
    (
        "completions",
        {
            **{"prompt": "a", "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None},
            **{"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True},
        },
    ),
    (
        "chat/completions",
        {
            **{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "temperature": 0.0},
            **{"max_completion_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
        },
    ),
    (
        "chat/completions",
        {
            **{
                "messages": [{"role": "user", "content": "a"}],
                "max_tokens": 8,
                "max_completion_tokens": 8,
                "stop": None,
            },
            **{"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}, "user": "bench"},
        },
    ),
    (
        "completions",
        {"prompt": ["a"], "max_tokens": 8, "min_tokens": 8, "ignore_eos": True, "stream": True, "best_of": 1, "n": 1},
    ),
]


@pytest.mark.parametrize(("route", "body"), SHAPES)
def test_shapes_of_load_generators(
    front: ThreadedFront, service: ManualService, pool: ThreadPoolExecutor, route: str, body: dict[str, Any]
) -> None:
    """Accepted, and answered by a stream that ends as they expect."""
    asked = pool.submit(httpx.post, f"{front.url}/v1/{route}", json={"model": "toy", **body}, timeout=WAIT)
    request = service.next_request()
    assert request.max_new_tokens == 8
    service.give(request, "x" * 8, "length")
    answer = asked.result(WAIT)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert answer.text.endswith("data: [DONE]\n\n")


USER = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("changes", "sentence", "param"),
    [
        ({"messages": None}, "messages must be a list", "messages"),
        ({"messages": []}, "messages must be a list", "messages"),
        ({"messages": ["a"]}, "messages[0] must be an object", "messages"),
        ({"messages": [*USER, {"content": "a"}]}, "messages[1] must be an object with a role", "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "must have text", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must have text", "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate", "messages"),
        ({"messages": [{"role": "\udfff", "content": "a"}]}, "surrogate", "messages"),
        ({"messages": [{**USER[0], "tool_calls": [{}]}]}, "'tool_calls', which is not supported", "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the assistant cannot begin", "messages"),
        ({"messages": USER * 5000}, "5000 entries", "messages"),
        ({"max_tokens": 0}, "max_tokens (0) must be at least 1", "max_tokens"),
        ({"prompt": "a"}, "unknown field 'prompt'", "prompt"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format is not supported", "response_format"),
        ({"tools": [{"type": "function"}]}, "tools is not supported", "tools"),
        ({"logprobs": 3}, "logprobs must be of type boolean", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs (21) must lie in 0..20", "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs", "top_logprobs"),
        ({"n": 9}, "9 completions in one request", "n"),
    ],
)
def test_bad_chats_are_refused(
    front: ThreadedFront, service: ManualService, changes: dict[str, Any], sentence: str, param: str
) -> None:
    """An error object that names the field; the service hears nothing."""
    content = json.dumps({"messages": USER, **changes}).encode()
    answer = httpx.post(
        f"{front.url}/v1/chat/completions", content=content, headers={"content-type": "application/json"}, timeout=WAIT
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert sentence in error["message"]
    assert service.submitted.empty()


def test_the_client_hears_of_errors(client: OpenAI) -> None:
    """As its own exceptions."""
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="response_format is not supported"):
        client.chat.completions.create(model="toy", messages=MESSAGES, response_format={"type": "json_object"})


TEMPLATE = """{%- if messages[0]['role'] == 'assistant' %}{{ raise_exception('nobody has asked') }}{% endif -%}
{%- for message in messages %}[{{ message['role'] }}] {{ message['content'] }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""


def test_the_checkpoints_template_renders(tmp_path: Path) -> None:
    """Its text, tokenised without further special tokens; its own refusal; a checkpoint without one."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_moe_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    plain = Tokenizer(folder)
    with pytest.raises(InputError, match="has no chat template"):
        plain.render_chat([{"role": "user", "content": "hello"}])
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer(folder)
    ids = tokenizer.render_chat([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "so"}])
    assert tokenizer.decode(ids) == "[user] hello\n[assistant] so\n[assistant]"
    with pytest.raises(InputError, match="refuses the messages: nobody has asked"):
        tokenizer.render_chat([{"role": "assistant", "content": "hello"}])


def test_a_service_that_does_not_answer_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 503 with the reason, whatever the service raises."""

    def fail() -> None:
        raise RuntimeError("its thread has died")

    service = ManualService()
    monkeypatch.setattr(service, "status", fail)
    with served(service) as front:
        answer = httpx.get(f"{front.url}/healthz", timeout=WAIT)
    assert (answer.status_code, answer.json()["serving"]) == (503, False)
    assert "its thread has died" in answer.json()["reason"]


def test_bytes_have_a_chat_template_too() -> None:
    """The oracle of the prompts above."""
    assert bytes(ByteCoder().render_chat([{"role": "a", "content": "b"}])) == b"<a>b<assistant>"
