"""TokenTexts: tokens with their log-probabilities, as the two routes of OpenAI's API show them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from moeplace.launch.http_front.completions.text_stream import Decode
from moeplace.runtime.engine.logprobs import TokenLogprob


@dataclass(frozen=True)
class TokenTexts:
    """Tokens of a choice that follow each other. A token's text is that of the token alone: of a character that is
    spread over several tokens it is a replacement character.

    Attributes:
        token_ids: what they are.
        logprobs: of each; None = not known.
        first_offset: characters in the texts of the tokens before.
        decode: token ids -> text.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob | None]
    first_offset: int
    decode: Decode

    @property
    def next_offset(self) -> int:
        """`first_offset` of the tokens that follow."""
        return self.first_offset + sum(len(self.decode([token])) for token in self.token_ids)

    def as_lists(self) -> dict[str, Any]:
        """Of POST /v1/completions: lists with an entry for every token."""
        texts = [self.decode([token]) for token in self.token_ids]
        return {
            "tokens": texts,
            "token_logprobs": [None if found is None else found.value for found in self.logprobs],
            "top_logprobs": [self._by_text(found) for found in self.logprobs],
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=self.first_offset))[: len(texts)],
        }

    def as_objects(self) -> list[dict[str, Any]]:
        """Of POST /v1/chat/completions: an object for every token."""
        return [
            {
                **self._describe(token, None if found is None else found.value),
                "top_logprobs": [self._describe(*pair) for pair in (() if found is None else found.top)],
            }
            for token, found in zip(self.token_ids, self.logprobs, strict=True)
        ]

    def _by_text(self, found: TokenLogprob | None) -> dict[str, float]:
        """Text -> logarithm; of tokens with the same text the likeliest stays."""
        values: dict[str, float] = {}
        for token, value in () if found is None else found.top:
            values.setdefault(self.decode([token]), value)
        return values

    def _describe(self, token: int, value: float | None) -> dict[str, Any]:
        text = self.decode([token])
        return {"token": text, "logprob": value, "bytes": list(text.encode())}
