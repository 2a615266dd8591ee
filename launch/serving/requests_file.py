"""Serve a file of requests; every rank runs this."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import atomic_write, require_file

if TYPE_CHECKING:
    from moeplace.runtime.engine.engine import Engine
    from moeplace.runtime.engine.requests import Completion, Request

_SAMPLING: dict[str, type] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), float),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), float),
    **dict.fromkeys(("top_k", "min_tokens", "seed"), int),
}
_KEYS = {"id", "prompt", "token_ids", "max_new_tokens", "stop_ids", "logprobs", *_SAMPLING}


class Tokenizer:
    """The checkpoint's tokenizer, loaded when the first text asks for it: token ids need none."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder
        self._loaded: Any = None

    @property
    def exists(self) -> bool:
        """Whether the checkpoint has one."""
        return any(Path(self._folder).glob("tokenizer*"))

    def load(self) -> None:
        """Load it now rather than with the first text.

        Raises:
            FormatError: it cannot be read.
        """
        self._get()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Text -> token ids, with the special tokens that the model expects unless `special` is False."""
        return list(self._get()(text, add_special_tokens=special)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Token ids -> text, without special tokens."""
        return str(self._get().decode(list(token_ids), skip_special_tokens=True))

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids that the checkpoint's chat template makes of messages, up to where the assistant speaks.

        Raises:
            InputError: there is no template, or it refuses the messages.
        """
        tokenizer = self._get()
        if not tokenizer.chat_template:
            raise InputError("the checkpoint has no chat template; /v1/completions takes text")
        try:
            text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program; what it raises is about its input
            raise InputError(f"the chat template refuses the messages: {' '.join(str(error).split())[:160]}") from error
        return self.encode(text, special=False)  # the template has them

    def _get(self) -> Any:
        if self._loaded is None:
            from transformers import AutoTokenizer

            try:
                self._loaded = AutoTokenizer.from_pretrained(
                    self._folder, local_files_only=True, trust_remote_code=False
                )
            except Exception as error:  # a damaged tokenizer can fail anywhere in transformers
                reason = " ".join(str(error).split())[:160]
                raise FormatError(f"{self._folder} has no readable tokenizer: {reason}") from error
        return self._loaded


def read_requests(
    path: str | Path, encode: Callable[[str], list[int]], *, max_new_tokens: int, seed: int
) -> "list[Request]":
    """Requests from a JSONL file; its lines may lack anything but a prompt.

    Args:
        path: one JSON object a line: `prompt` (text) or `token_ids`, and optionally `id`, `max_new_tokens`,
            `temperature`, `top_k`, `top_p`, `seed`, `stop_ids`, `logprobs`.
        encode: text -> token ids.
        max_new_tokens: where a line does not say.
        seed: where a line does not say, plus the number of the line.

    Raises:
        InputError: there is no such file, or a value breaks a rule.
        FormatError: a line is not a request.
    """
    requests = []
    try:
        lines = require_file(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not a text file: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            if not isinstance(document, dict):
                raise ValueError("a request must be an object")
            requests.append(_parse(document, number, encode, max_new_tokens, seed))
        except InputError as error:
            raise type(error)(f"{path} line {number}: {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise FormatError(f"{path} line {number} is not a request: {error}") from error
    if not requests:
        raise FormatError(f"{path} has no requests")
    return requests


def _parse(
    document: Mapping[str, Any], number: int, encode: Callable[[str], list[int]], max_new_tokens: int, seed: int
) -> "Request":
    from moeplace.runtime.engine.requests import Request
    from moeplace.runtime.engine.sampling import SamplingParameters

    unknown = set(document) - _KEYS
    if unknown:
        raise InputError(f"unknown key {sorted(unknown)[0]!r}; known are {', '.join(sorted(_KEYS))}")
    if ("prompt" in document) == ("token_ids" in document):
        raise InputError("a request needs either prompt or token_ids")
    stop_ids = document.get("stop_ids")
    given: dict[str, Any] = {name: kind(document[name]) for name, kind in _SAMPLING.items() if name in document}
    sampling = SamplingParameters(**{"seed": seed + number, **given})
    ids = document["token_ids"] if "token_ids" in document else encode(str(document["prompt"]))
    return Request(
        request_id=str(document.get("id", number)),
        token_ids=tuple(ids),
        max_new_tokens=int(document.get("max_new_tokens", max_new_tokens)),
        sampling=sampling,
        stop_ids=None if stop_ids is None else tuple(int(token) for token in stop_ids),
        logprobs=None if document.get("logprobs") is None else int(document["logprobs"]),
    )


def write_completions(path: str | Path, completions: "Sequence[Completion]", tokenizer: Tokenizer) -> None:
    """One JSON object a line: id, token_ids, text (where there is a tokenizer), finish_reason. Atomic.

    Where they were asked for, logprobs too: of each token its own, and (id, value) of the likeliest.
    """
    with atomic_write(path) as file:
        for completion in completions:
            document: dict[str, Any] = {"id": completion.request_id, "token_ids": list(completion.token_ids)}
            if tokenizer.exists:
                document["text"] = tokenizer.decode(completion.token_ids)
            document["finish_reason"] = completion.finish_reason
            if completion.logprobs:
                document["logprobs"] = [None if found is None else found.to_json() for found in completion.logprobs]
            file.write(json.dumps(document).encode() + b"\n")


def serve(engine: "Engine", requests: "Sequence[Request] | None") -> tuple["list[Completion]", dict[str, Any]]:
    """Complete all requests; what it took, as data. The requests of rank 0 count."""
    engine.group.counters.reset()
    start = time.perf_counter()
    completions = engine.generate(requests)
    seconds = time.perf_counter() - start
    tokens = sum(len(completion.token_ids) for completion in completions)
    report = {
        "requests": len(completions),
        "new_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "ranks": engine.group.size,
        "placement": engine.placement.digest,
        "counters": engine.counters(),
    }
    return completions, report
