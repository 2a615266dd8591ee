"""Text files as token sequences of a fixed length, read in pieces."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moeplace.profiling.errors import InputError
from moeplace.profiling.files import require_file

Tokenize = Callable[[str], list[int]]

_BLOCK_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 16


def token_sequences(
    path: str | Path, tokenize: Tokenize, *, length: int, max_tokens: int | None = None
) -> Iterator[np.ndarray]:
    """Consecutive sequences of `length` tokens of a text file; a rest shorter than two tokens is dropped.

    The text is tokenised in blocks of whole lines of about 1 MiB, so a long file needs little memory.

    Raises:
        InputError: the file does not exist or holds no text.
    """
    left = max_tokens if max_tokens is not None else np.inf
    rest = np.zeros(0, dtype=np.int64)
    any_token = False
    for text in _blocks(path):
        tokens = np.concatenate([rest, np.asarray(tokenize(text), dtype=np.int64)])
        any_token = any_token or len(tokens) > 0
        whole = len(tokens) // length * length
        for start in range(0, whole, length):
            sequence = tokens[start : start + int(min(length, left))]
            if len(sequence) >= 2:
                yield sequence
            left -= len(sequence)
            if left <= 0:
                return
        rest = tokens[whole:]
    if not any_token:
        raise InputError(f"text file {path} is empty: there is nothing to profile on")
    rest = rest[: int(min(len(rest), left))]
    if len(rest) >= 2:
        yield rest


def estimate_tokens(path: str | Path, tokenize: Tokenize, max_tokens: int | None = None) -> int:
    """About how many tokens a text file has, from its beginning: for progress bars only."""
    size = require_file(path).stat().st_size
    with open(path, "rb") as file:
        sample = file.read(_SAMPLE_BYTES)
    tokens = len(tokenize(sample.decode(errors="replace"))) * size // max(len(sample), 1)
    return min(tokens, max_tokens) if max_tokens is not None else tokens


def _blocks(path: str | Path) -> Iterator[str]:
    """Text of a file in blocks that end with a line, where lines are of sane length."""
    with open(require_file(path), encoding="utf-8", errors="replace", newline="") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block + file.readline(_BLOCK_BYTES)
