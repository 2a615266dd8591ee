"""CompletionBody: the body of POST /v1/completions, checked field by field.

The fields are those of OpenAI's API (platform.openai.com/docs/api-reference/completions); `top_k`, `min_p`,
`repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos` and `return_token_ids` are additions that other
servers have too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moeplace.launch.http_front.completions.fields import SAMPLING, Fields, is_id, require_unicode
from moeplace.launch.http_front.wire.errors import ApiError
from moeplace.runtime.engine.logprobs import MOST
from moeplace.runtime.engine.sampling import SamplingParameters

DEFAULT_TOKENS = 16
"""As in OpenAI's API."""
MOST_STOPS = 16
MOST_STOP_IDS = 1024
COMMON = {
    *("model", "max_tokens", "n", "stop", "stop_token_ids", "ignore_eos", "stream", "stream_options"),
    *("return_token_ids", "background", *SAMPLING),
}
"""Fields that completions and chats share."""
_KNOWN = {"prompt", "echo", "logprobs", *COMMON}


@dataclass(frozen=True)
class Prompt:
    """One prompt: its token ids, and its text where it came as text."""

    token_ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True)
class CompletionBody:
    """What a client wants.

    Attributes:
        prompts: at least one.
        n: completions of each prompt.
        max_tokens: most tokens of a completion; 0 = none (with `echo`: the prompt alone).
        sampling: of all completions; each draws as the choice that it is.
        stops: strings that end a completion and are not part of it.
        stop_ids: token ids that end a completion; None = the model's.
        stream: pieces as they come.
        include_usage: a streamed answer ends with its usage.
        include_event_ids: events of a streamed answer have ids, from which it can be taken up again.
        background: it goes on without a client; one that does not stream gets its answer by asking again.
        echo: the text begins with the prompt.
        return_token_ids: choices have their token ids beside the text.
        logprobs: choices have log-probabilities of their tokens, and of this many of the likeliest; None = they do not.
    """

    prompts: tuple[Prompt, ...]
    n: int
    max_tokens: int
    sampling: SamplingParameters
    stops: tuple[str, ...]
    stop_ids: tuple[int, ...] | None
    stream: bool
    include_usage: bool
    echo: bool
    return_token_ids: bool
    logprobs: int | None = None
    include_event_ids: bool = False
    background: bool = False

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    def sampling_of(self, choice: int) -> SamplingParameters:
        """Each choice draws numbers of its own."""
        return replace(self.sampling, choice=choice)


def parse_body(
    document: Mapping[str, Any],
    *,
    encode: Callable[[str], list[int]] | None,
    model: str,
    model_stop_ids: Sequence[int],
    default_seed: int,
) -> CompletionBody:
    """Check the fields of a body.

    Args:
        encode: text -> token ids; None = the model has no tokenizer.
        model: the name that `model` must have if it is given.
        model_stop_ids: the model's end-of-sequence ids.
        default_seed: where the body has none.

    Raises:
        ApiError: 400 with the field's name, or 404 for another model.
    """
    fields = Fields(document, known=_KNOWN)
    fields.refuse_what_is_not_supported()
    common = parse_common(
        fields,
        model=model,
        model_stop_ids=model_stop_ids,
        default_seed=default_seed,
        default_tokens=DEFAULT_TOKENS,
    )
    echo, logprobs = fields.get("echo", bool, False), _logprobs(fields)
    if echo and logprobs is not None:
        rule = "logprobs together with echo are not supported: those of a prompt are not known"
        raise ApiError(400, rule, param="logprobs", code="unsupported_parameter")
    return CompletionBody(prompts=_prompts(document.get("prompt"), encode), echo=echo, logprobs=logprobs, **common)


def parse_common(
    fields: Fields, *, model: str, model_stop_ids: Sequence[int], default_seed: int, default_tokens: int
) -> dict[str, Any]:
    """What `COMMON` says, as arguments of `CompletionBody`; errors as of `parse_body`.

    Args:
        default_tokens: where `max_tokens` is not given.
    """
    if fields.get("model", str, model) != model:
        rule = f"the model {fields.raw('model')!r} does not exist; {model!r} does"
        raise ApiError(404, rule, param="model", code="model_not_found")
    stream = fields.get("stream", bool, False)
    options = fields.get("stream_options", dict, {})
    if options and not stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    max_tokens = fields.get("max_tokens", int, default_tokens)
    if max_tokens < 0:
        raise ApiError(400, f"max_tokens ({max_tokens}) must be at least 0", param="max_tokens")
    n = fields.get("n", int, 1)
    if n < 1:
        raise ApiError(400, f"n ({n}) must be at least 1", param="n")
    return {
        "n": n,
        "max_tokens": max_tokens,
        "sampling": fields.sampling(default_seed),
        "stops": _stops(fields.raw("stop")),
        "stop_ids": _stop_ids(fields, model_stop_ids),
        "stream": stream,
        "include_usage": Fields(options).get("include_usage", bool, False),
        "include_event_ids": Fields(options).get("include_event_ids", bool, False),
        "background": fields.get("background", bool, False),
        "return_token_ids": fields.get("return_token_ids", bool, False),
    }


def _logprobs(fields: Fields) -> int | None:
    """How many of the likeliest tokens are wanted beside each token; false is the same as absent."""
    return None if fields.raw("logprobs") is False else require_count(fields.get("logprobs", int, None), "logprobs")


def require_count(wanted: int | None, name: str) -> int | None:
    """A number of likeliest tokens.

    Raises:
        ApiError: 400, it is out of range.
    """
    if wanted is not None and not 0 <= wanted <= MOST:
        raise ApiError(400, f"{name} ({wanted}) must lie in 0..{MOST}", param=name)
    return wanted


def _prompts(value: Any, encode: Callable[[str], list[int]] | None) -> tuple[Prompt, ...]:
    """A string, a list of strings, token ids, or a list of lists of token ids."""
    many = value if isinstance(value, list) and value and not is_id(value[0]) else [value]
    if value is None or value == [] or len({type(item) for item in many}) != 1:
        raise ApiError(400, "prompt must be text, token ids, or a list of either", param="prompt")
    prompts = tuple(_prompt(item, encode) for item in many)
    if not all(prompt.token_ids for prompt in prompts):
        raise ApiError(400, "a prompt must have at least one token", param="prompt")
    return prompts


def _prompt(value: Any, encode: Callable[[str], list[int]] | None) -> Prompt:
    if isinstance(value, str):
        if encode is None:
            raise ApiError(400, "the model has no tokenizer; prompts must be token ids", param="prompt")
        return Prompt(tuple(encode(require_unicode(value, "prompt"))), value)
    if isinstance(value, list) and all(is_id(item) for item in value):
        return Prompt(tuple(value), None)
    raise ApiError(400, "prompt must be text, token ids, or a list of either", param="prompt")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, "stop must be a string or a list of strings, none of them empty", param="stop")
    if len(stops) > MOST_STOPS:
        raise ApiError(400, f"stop has {len(stops)} strings, at most {MOST_STOPS} are possible", param="stop")
    return tuple(stops)


def _stop_ids(fields: Fields, model_stop_ids: Sequence[int]) -> tuple[int, ...] | None:
    """None = the model's own, which the service knows."""
    added = fields.get("stop_token_ids", list, [])
    if not all(is_id(token) for token in added):
        raise ApiError(400, "stop_token_ids must be a list of token ids", param="stop_token_ids")
    if len(added) > MOST_STOP_IDS:
        rule = f"stop_token_ids has {len(added)} ids, at most {MOST_STOP_IDS} are possible"
        raise ApiError(400, rule, param="stop_token_ids")
    ignore = fields.get("ignore_eos", bool, False)
    if not added and not ignore:
        return None
    return tuple(added) if ignore else (*model_stop_ids, *added)
