"""The note that the service keeps with each choice of a request, so that its answer can be written again without it.

A service knows prompts, sampling and tokens; how many choices there are, and how they are to look, is the front's.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from moeplace.launch.http_front.completions.body import CompletionBody, Prompt
from moeplace.launch.http_front.completions.forms import AnswerForm, ChatForm, TextForm
from moeplace.runtime.service.api import RequestRecord

FORMS: tuple[type[TextForm] | type[ChatForm], ...] = (TextForm, ChatForm)
_OF_THE_REQUEST = {"prompts", "sampling", "stream", "include_usage", "include_event_ids"}
"""Fields of a body that are not kept: requests have them, or who asks again says them."""


@dataclass(frozen=True)
class Recalled:
    """A request that a service knows.

    Attributes:
        form: how its answer looks.
        created: seconds since the epoch.
        body: what was asked.
        records: of its choices.
    """

    form: AnswerForm
    created: int
    body: CompletionBody
    records: tuple[RequestRecord, ...]


def write_note(body: CompletionBody, form: AnswerForm, *, created: int) -> str:
    """The note of every choice of a request."""
    kept = {name.name: getattr(body, name.name) for name in fields(body) if name.name not in _OF_THE_REQUEST}
    texts = [prompt.text for prompt in body.prompts] if body.echo else [None] * len(body.prompts)
    return json.dumps({"form": form.prefix, "created": created, "texts": texts, "body": kept})


def recall(name: str, find: Callable[[str], RequestRecord | None]) -> Recalled | None:
    """The newest request whose choices have names that begin with `name`; None = not all of them are known."""
    first = find(f"{name}-0")
    if first is None or not first.request.note:
        return None
    note: dict[str, Any] = json.loads(first.request.note)
    kept: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in note["body"].items()
    }
    each: int = kept["n"]
    count = len(note["texts"]) * each
    records = [first, *(find(f"{name}-{index}") for index in range(1, count))]
    known = [record for record in records if record is not None]
    if len(known) < count:
        return None
    prompts = tuple(
        Prompt(record.request.token_ids, text) for record, text in zip(known[::each], note["texts"], strict=True)
    )
    body = CompletionBody(
        prompts=prompts,
        sampling=replace(first.request.sampling, choice=0),
        stream=False,
        include_usage=False,
        **kept,
    )
    form = next(form() for form in FORMS if form.prefix == note["form"])
    return Recalled(form, int(note["created"]), body, tuple(known))
