"""The body of POST /v1/chat/completions: messages, which the checkpoint's chat template makes a prompt.

The fields are those of OpenAI's API (platform.openai.com/docs/api-reference/chat), with the additions of
`/v1/completions`. Messages are text: a string, or a list of parts of type text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeplace.launch.http_front.completions.body import COMMON, CompletionBody, Prompt, parse_common, require_count
from moeplace.launch.http_front.completions.fields import Fields, require_unicode
from moeplace.launch.http_front.wire.errors import ApiError
from moeplace.profiling.errors import InputError

DEFAULT_TOKENS = 256
"""OpenAI's API has no limit there; a service that others wait for has one."""
MOST_MESSAGES = 4096
_KNOWN = {"messages", "max_completion_tokens", "logprobs", "top_logprobs", *COMMON}
_MESSAGE_KEYS = {"role", "content", "name"}

Message = Mapping[str, str]
RenderChat = Callable[[Sequence[Message]], list[int]]
"""Messages -> token ids, up to where the assistant speaks; InputError where the template refuses them."""


def parse_chat_body(
    document: Mapping[str, Any],
    *,
    render: RenderChat | None,
    model: str,
    model_stop_ids: Sequence[int],
    default_seed: int,
) -> CompletionBody:
    """Check the fields of a body; arguments and errors as of `parse_body`.

    Args:
        render: None = the model has no tokenizer.
    """
    fields = Fields(document, known=_KNOWN)
    fields.refuse_what_is_not_supported()
    limit = fields.get("max_completion_tokens", int, None)
    common = parse_common(
        fields,
        model=model,
        model_stop_ids=model_stop_ids,
        default_seed=default_seed,
        default_tokens=DEFAULT_TOKENS if limit is None else limit,
    )
    if common["max_tokens"] < 1:
        raise ApiError(400, f"max_tokens ({common['max_tokens']}) must be at least 1", param="max_tokens")
    messages = _messages(document.get("messages"))
    if render is None:
        raise ApiError(400, "the model has no tokenizer; only /v1/completions with token ids is possible")
    try:
        token_ids = tuple(render(messages))
    except InputError as error:
        raise ApiError(400, str(error), param="messages") from error
    if not token_ids:
        raise ApiError(400, "the chat template makes no token of the messages", param="messages")
    return CompletionBody(prompts=(Prompt(token_ids, None),), echo=False, logprobs=_logprobs(fields), **common)


def _logprobs(fields: Fields) -> int | None:
    """How many of the likeliest tokens are wanted beside each token; None = not even the token's own."""
    top = require_count(fields.get("top_logprobs", int, 0), "top_logprobs")
    if fields.get("logprobs", bool, False):
        return top
    if top:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return None


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of at least one message", param="messages")
    if len(value) > MOST_MESSAGES:
        raise ApiError(
            400, f"messages has {len(value)} entries, at most {MOST_MESSAGES} are possible", param="messages"
        )
    return [_message(item, f"messages[{index}]") for index, item in enumerate(value)]


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ApiError(400, f"{name} must be an object with a role", param="messages")
    for key, found in value.items():
        if key not in _MESSAGE_KEYS and found not in (None, [], ""):
            raise ApiError(
                400,
                f"{name} has the field {key!r}, which is not supported",
                param="messages",
                code="unsupported_parameter",
            )
    message = {"role": require_unicode(value["role"], "messages"), "content": _content(value.get("content"), name)}
    if value.get("name") is not None:
        message["name"] = require_unicode(str(value["name"]), "messages")
    return message


def _content(value: Any, name: str) -> str:
    """Text; parts are joined, no content is an empty one."""
    parts = value if isinstance(value, list) else [{"type": "text", "text": "" if value is None else value}]
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{name} must have text as content: a string or parts of type text", param="messages")
        texts.append(require_unicode(part["text"], "messages"))
    return "".join(texts)
