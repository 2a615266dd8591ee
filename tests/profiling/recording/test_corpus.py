"""Text files as token sequences."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.profiling.recording import corpus
from moeplace.profiling.recording.corpus import token_sequences


def code_points(text: str) -> list[int]:
    return [ord(c) for c in text]


@given(
    st.text(st.sampled_from("ab\n\u00e9"), min_size=1, max_size=60), st.integers(2, 9), st.none() | st.integers(2, 70)
)
def test_sequences_are_the_text_in_order(text: str, length: int, limit: int | None) -> None:
    """All sequences but the last have the full length; together they are the text, less a rest of one token."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_BLOCK_BYTES", 7)
        path = Path(folder) / "text"
        path.write_bytes(text.encode())
        sequences = list(token_sequences(path, code_points, length=length, max_tokens=limit))
    expected = code_points(text)[:limit]
    if len(expected) % length == 1:
        expected = expected[:-1]
    assert np.concatenate([np.zeros(0, int), *sequences]).tolist() == expected
    assert all(len(s) == length for s in sequences[:-1])
