"""Routed rows as text, as a report carries them."""

import base64
import binascii

from moeplace.profiling.errors import FormatError
from moeplace.runtime.engine.windows.rows import RoutedRows


def to_text(rows: RoutedRows) -> str:
    """As a report carries them."""
    return base64.b64encode(rows.to_bytes()).decode()


def from_text(text: str) -> RoutedRows:
    """From a report.

    Raises:
        FormatError: it is something else.
    """
    try:
        return RoutedRows.from_bytes(base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise FormatError(f"{len(text)} characters are not routed rows: {error}") from error
