"""Errors in one sentence, as they travel and are logged."""

from moeplace.profiling.errors import MoeplaceError


def sentence_of(error: BaseException) -> str:
    """One sentence for a failure."""
    text = str(error) if isinstance(error, MoeplaceError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
