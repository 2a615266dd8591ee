"""Typed access to the fields of a request's body, and those that are known but not supported.

A field that cannot be honoured is refused by its name, unless its value asks for nothing: load generators and client
libraries send many such values. null is the same as absent, everywhere.
"""

from collections.abc import Collection, Mapping
from typing import Any

from moeplace.launch.http_front.wire.errors import ApiError
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.sampling import SEEDS, SamplingParameters

_ANYTHING = object()
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # of OpenAI's API
    "best_of": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": (_ANYTHING,),
    "modalities": (["text"],),
    "parallel_tool_calls": (_ANYTHING,),
    "response_format": ({"type": "text"},),
    "safety_identifier": (_ANYTHING,),
    "prompt_cache_key": (_ANYTHING,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "user": (_ANYTHING,),
    # of other servers of open models
    "add_special_tokens": (True,),
    "bad_words": ([],),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "priority": (0,),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "top_a": (0,),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
"""Fields that are not supported, with the values that ask for nothing."""
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_tokens", "seed"),
)
_JSON_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}


class Fields:
    """A JSON object.

    Args:
        known: names that its reader supports.
    """

    def __init__(self, document: Mapping[str, Any], *, known: Collection[str] = ()) -> None:
        self._document, self._known = document, frozenset(known)

    def get(self, name: str, kind: type, default: Any) -> Any:
        """A value of a type, or the default where there is none.

        Raises:
            ApiError: 400, it is of another type.
        """
        value = self._document.get(name)
        if value is None:
            return default
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise ApiError(400, f"{name} must be of type {_JSON_NAMES[kind]}", param=name)
        return value

    def raw(self, name: str) -> Any:
        """Whatever it is; None = absent."""
        return self._document.get(name)

    def refuse_what_is_not_supported(self) -> None:
        """Every field must be known, or ask for nothing.

        Raises:
            ApiError: 400 with the first one that does not.
        """
        for name, value in sorted(self._document.items()):
            if value is None or name in self._known:
                continue
            if name not in _NEUTRAL:
                raise ApiError(400, f"unknown field {name!r}", param=name)
            neutral = (*_NEUTRAL[name], self._document.get("n")) if name == "best_of" else _NEUTRAL[name]
            if not any(_is_same(value, one) for one in neutral):
                raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")

    def sampling(self, default_seed: int) -> SamplingParameters:
        """How tokens are drawn; OpenAI's defaults.

        Raises:
            ApiError: 400, a value is out of range.
        """
        top_k = self.get("top_k", int, 0)  # -1 = all, as other servers have it
        try:
            return SamplingParameters(
                temperature=float(self.get("temperature", float, 1.0)),
                top_k=0 if top_k == -1 else top_k,
                top_p=float(self.get("top_p", float, 1.0)),
                min_p=float(self.get("min_p", float, 0.0)),
                repetition_penalty=float(self.get("repetition_penalty", float, 1.0)),
                presence_penalty=float(self.get("presence_penalty", float, 0.0)),
                frequency_penalty=float(self.get("frequency_penalty", float, 0.0)),
                min_tokens=self.get("min_tokens", int, 0),
                seed=self.get("seed", int, default_seed) % SEEDS,
            )
        except OverflowError as error:
            raise ApiError(400, "temperature, top_p and the like must be numbers that a computer can hold") from error
        except InputError as error:
            raise ApiError(400, str(error), param=str(error).split()[0]) from error


def is_id(value: Any) -> bool:
    """Whether a JSON value is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def require_unicode(text: str, name: str) -> str:
    """The text, which JSON may have given half of a surrogate pair.

    Raises:
        ApiError: 400, it has.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ApiError(400, f"{name} must be valid Unicode, but it has half of a surrogate pair", param=name)
    return text


def _is_same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return neutral is _ANYTHING or (value == neutral and isinstance(value, bool) == isinstance(neutral, bool))
