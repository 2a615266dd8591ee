"""From tokens to text, piece by piece: whole characters, stop strings, whatever the pieces."""

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from moeplace.launch.http_front.completions.text_stream import Detokenizer, TextStream
from moeplace.launch.serving.requests_file import Tokenizer
from tests.launch.http_front.http_services import ByteCoder
from tests.shared_data import tiny_moe_path

decode = ByteCoder().decode
texts = st.text(st.sampled_from("abé日😀\N{REPLACEMENT CHARACTER}"), max_size=30)


def cut(tokens: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    """Consecutive pieces of some sizes; the last takes the rest."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(tokens[start : start + size])
        start += size
    return [*pieces, tokens[start:]]


def run(stream: Detokenizer | TextStream, pieces: Sequence[Sequence[int]]) -> list[str]:
    return [*(stream.add(piece) for piece in pieces), stream.finish()]


@given(texts, st.lists(st.integers(0, 5)), st.binary(max_size=6))
def test_pieces_join_to_the_text(text: str, sizes: list[int], prompt: bytes) -> None:
    """And each is a whole number of characters: none has half of one in it."""
    pieces = run(Detokenizer(decode, list(prompt)), cut(list(text.encode()), sizes))
    assert "".join(pieces) == text
    assert "".join(piece for piece in pieces if piece.isprintable()) == text


@given(st.binary(max_size=80), st.lists(st.integers(0, 40)))
def test_bytes_that_are_no_text(content: bytes, sizes: list[int]) -> None:
    """They come out as decoding all at once would give them."""
    assert "".join(run(Detokenizer(decode), cut(content, sizes))) == content.decode("utf-8", "replace")


def test_noise_is_not_held_back_for_ever() -> None:
    """Work per token is bounded: what can no longer be a character is given out."""
    longest = 0

    def watched(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    detokenizer = Detokenizer(watched)
    text = "".join(detokenizer.add([0xFF]) for _ in range(500)) + detokenizer.finish()
    assert text == "\N{REPLACEMENT CHARACTER}" * 500
    assert longest < 50


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 4)),
)
def test_stop_strings(text: str, stops: list[str], sizes: list[int]) -> None:
    """The text ends before the stop string that is complete first, however it comes in pieces."""
    stream = TextStream(decode, stops)
    pieces = run(stream, cut(list(text.encode()), sizes))
    assert ("".join(pieces), stream.stopped) == _until_stop(text, stops)


def _until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The slow way: look at every beginning of the text, shortest first."""
    for end in range(len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


def test_the_shipped_tokenizer() -> None:
    """Byte-level tokens of a real tokenizer, one by one."""
    tokenizer = Tokenizer(tiny_moe_path())
    text = "Hello naïve café 😀 日本語, and more"
    tokens = tokenizer.encode(text)
    assert any(tokenizer.decode([token]).endswith("\N{REPLACEMENT CHARACTER}") for token in tokens)
    assert "".join(run(Detokenizer(tokenizer.decode), [[token] for token in tokens])) == text


class WordCoder:
    """Like SentencePiece: a word has its blank in front, and the first one of a text loses it."""

    @staticmethod
    def decode(tokens: Sequence[int]) -> str:
        return "".join(f" w{token}" for token in tokens)[1:]


def test_a_blank_after_the_prompt_is_kept() -> None:
    """The completion continues the prompt: its first word does not begin a text."""
    word: Callable[[Sequence[int]], str] = WordCoder.decode
    assert "".join(run(Detokenizer(word, [1, 2]), [[3], [4], [5, 6], [7]])) == " w3 w4 w5 w6 w7"
    assert "".join(run(Detokenizer(word), [[3], [4]])) == "w3 w4"
