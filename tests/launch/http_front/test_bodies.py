"""Bodies of requests: whatever a field holds is refused in a sentence or taken, and a note says the same again."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from moeplace.launch.http_front.completions import body as completions
from moeplace.launch.http_front.completions import chat
from moeplace.launch.http_front.completions.body import CompletionBody, parse_body
from moeplace.launch.http_front.completions.chat import parse_chat_body
from moeplace.launch.http_front.completions.fields import _NEUTRAL
from moeplace.launch.http_front.completions.forms import ChatForm, TextForm
from moeplace.launch.http_front.completions.note import recall, write_note
from moeplace.launch.http_front.completions.run import CompletionRun
from moeplace.launch.http_front.wire.errors import ApiError
from moeplace.runtime.service.api import RequestRecord

_HUGE = 10**400
NUMBERS = [-_HUGE, -1, 0, 1, 2, 21, 2**31, 2**64, _HUGE, -0.0, 1e-320, 0.5, 1.5, 1e308, math.inf, -math.inf, math.nan]
VALUES: list[Any] = [
    *(None, True, False, "", "x", "\ud800", "\x00", *NUMBERS),
    *([], [[]], ["x"], ["\ud800"], [1], [-1], [2**70], [True], [None], [1.5], [{}], [[1], [2]], [["x"]]),
    *({}, {"x": 1}, {"include_usage": 3}, {"include_usage": True}, {"include_event_ids": True}, {"type": "text"}),
]
TEXT_FIELDS, CHAT_FIELDS = sorted({*completions._KNOWN, *_NEUTRAL}), sorted({*chat._KNOWN, *_NEUTRAL})


def encode(text: str) -> list[int]:
    return list(text.encode())


def decode(token_ids: Sequence[int]) -> str:
    return bytes(token % 256 for token in token_ids).decode("utf-8", "replace")


def render(messages: Sequence[Mapping[str, str]]) -> list[int]:
    return encode("".join(message["content"] for message in messages))


def parse_text(document: dict[str, Any]) -> CompletionBody:
    return parse_body({"prompt": "ab", **document}, encode=encode, model="m", model_stop_ids=(0,), default_seed=3)


def parse_chat(document: dict[str, Any]) -> CompletionBody:
    whole = {"messages": [{"role": "user", "content": "a"}], **document}
    return parse_chat_body(whole, render=render, model="m", model_stop_ids=(0,), default_seed=3)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("is_chat", "field"), [*((False, field) for field in TEXT_FIELDS), *((True, field) for field in CHAT_FIELDS)]
)
def test_any_value_of_any_field(is_chat: bool, field: str, is_streamed: bool) -> None:
    """Refused with a sentence that can be sent, or taken; what is taken is recalled from what a service keeps."""
    parse, form = (parse_chat, ChatForm()) if is_chat else (parse_text, TextForm())
    taken, refusals = 0, []
    for value in VALUES:
        try:
            body = parse({"stream": is_streamed, field: value})
            if body.num_choices > 50:
                continue
            note = write_note(body, form, created=7)
            run = CompletionRun(None, None, None, body, name="r", decode=decode, note=note)  # type: ignore[arg-type]
        except ApiError as error:
            refusals.append((error.status, json.loads(error.response().body)["error"]["message"]))
            continue
        taken += 1
        requests = [choice.request for choice in run.choices]
        if None in requests:
            continue
        records = {r.request_id: RequestRecord(f"1:{r.request_id}", r) for r in requests if r is not None}
        again = recall("r", records.get)
        assert again is not None
        assert (type(again.form), again.created) == (type(form), 7)
        kept = CompletionRun(None, None, None, again.body, name="r", decode=decode, note=note)  # type: ignore[arg-type]
        assert [choice.request for choice in kept.choices] == requests
        assert [choice.pieces for choice in kept.choices] == [choice.pieces for choice in run.choices]
        assert (again.body.stops, again.body.return_token_ids) == (body.stops, body.return_token_ids)
    assert all(status in (400, 404) and message for status, message in refusals)
    assert taken or field in ("messages", "prompt")
