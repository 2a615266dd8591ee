"""How a completion looks in an answer: as text, or as a message of a chat."""

from typing import Any, Protocol

from moeplace.launch.http_front.completions.token_texts import TokenTexts


class AnswerForm(Protocol):
    """The objects of one route of OpenAI's API.

    Attributes:
        prefix: of ids.
        whole_object, piece_object: `object` of a whole answer and of a piece of a streamed one.
    """

    prefix: str
    whole_object: str
    piece_object: str

    def whole(self, text: str, tokens: TokenTexts | None) -> dict[str, Any]:
        """The text of a choice, in a whole answer, with log-probabilities of its tokens where they are wanted."""

    def piece(self, text: str, tokens: TokenTexts | None, *, first: bool) -> dict[str, Any]:
        """The next piece of a choice's text; `first` = nothing of it has been sent."""


class TextForm:
    """Of POST /v1/completions."""

    prefix = "cmpl"
    whole_object = piece_object = "text_completion"

    def whole(self, text: str, tokens: TokenTexts | None) -> dict[str, Any]:
        """See `AnswerForm`."""
        return {"text": text, "logprobs": None if tokens is None else tokens.as_lists()}

    def piece(self, text: str, tokens: TokenTexts | None, *, first: bool) -> dict[str, Any]:
        """See `AnswerForm`."""
        return self.whole(text, tokens)


class ChatForm:
    """Of POST /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    piece_object = "chat.completion.chunk"

    def whole(self, text: str, tokens: TokenTexts | None) -> dict[str, Any]:
        """See `AnswerForm`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": _content(tokens)}

    def piece(self, text: str, tokens: TokenTexts | None, *, first: bool) -> dict[str, Any]:
        """See `AnswerForm`; who speaks is said once."""
        speaker = {"role": "assistant"} if first else {}
        return {"delta": {**speaker, "content": text}, "logprobs": _content(tokens)}


def _content(tokens: TokenTexts | None) -> dict[str, Any] | None:
    return None if tokens is None else {"content": tokens.as_objects(), "refusal": None}
