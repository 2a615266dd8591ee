"""TextStream: token ids in, text out, piece by piece.

A character may be spread over several tokens, and a stop string over several pieces: nothing is given out before it is
certain. The pieces of a stream, joined, are the text of all its tokens up to the stop string.
"""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_OPEN = 16
"""Tokens that may wait for the rest of a character; one has four bytes at most, so more are not text at all."""
_CONTEXT = 4
"""Tokens that are decoded again with the next ones: decoders treat the first token of a text in a special way."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Text of a growing list of tokens, whole characters only.

    Args:
        decode: token ids -> text, called on short pieces.
        prompt: token ids before the first one; a word that follows text begins with a blank, one that begins a text
            may not.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        before = list(prompt[-_CONTEXT:])
        if decode(before).endswith(_REPLACEMENT):
            before = []  # half a character is no context
        self._tokens = before
        self._given = len(before)  # of these tokens, how many are in the text that was given out

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now and was not before."""
        self._tokens += token_ids
        text = self._text_up_to(len(self._tokens))
        if text.endswith(_REPLACEMENT):
            return self._break_noise() if len(self._tokens) - self._given > _MOST_OPEN else ""
        self._keep(len(self._tokens))
        return text

    def finish(self) -> str:
        """What is left: the beginning of a character that never ended, as replacement characters."""
        text = self._text_up_to(len(self._tokens))
        self._keep(len(self._tokens))
        return text

    def _text_up_to(self, end: int) -> str:
        """Text of the tokens between what was given and `end`, decoded with those before."""
        before = self._decode(self._tokens[: self._given])
        return self._decode(self._tokens[:end])[len(before) :]

    def _break_noise(self) -> str:
        """Bytes that are no text: give out all but the last few, which may begin a character."""
        everything = self._text_up_to(len(self._tokens))
        for end in range(len(self._tokens) - 1, len(self._tokens) - 5, -1):
            head, tail = self._text_up_to(end), self._decode(self._tokens[end:])
            if head + tail == everything:
                self._keep(end)
                return head
        return ""

    def _keep(self, given: int) -> None:
        """Forget tokens that cannot matter any more."""
        context = max(given - _CONTEXT, 0)
        self._tokens, self._given = self._tokens[context:], given - context


class TextStream:
    """Text of a completion as it grows, up to a stop string.

    Attributes:
        stopped: a stop string came; what follows is not part of the text.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = (), *, prompt: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(decode, prompt)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, token_ids: Sequence[int]) -> str:
        """The piece of text that these tokens make certain; empty after a stop string."""
        return self._pass(self._detokenizer.add(token_ids), last=False)

    def finish(self) -> str:
        """The rest."""
        return self._pass(self._detokenizer.finish(), last=True)

    def _pass(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:  # the one that is complete first, so that it does not matter how the text is cut into pieces
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
