"""JSON lines: one object a line, of bounded length."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeplace.profiling.errors import FormatError
from moeplace.profiling.files import require_file

_MOST_LINE_BYTES = 1 << 28


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path, line n", object) of every line; blank lines are skipped.

    Raises:
        InputError: there is no such file.
        FormatError: a line is not a JSON object, or longer than 256 MiB.
    """
    with open(require_file(path), "rb") as file:
        number = 0
        while line := file.readline(_MOST_LINE_BYTES):
            number += 1
            where = f"{path}, line {number}"
            if len(line) == _MOST_LINE_BYTES:
                raise FormatError(f"{where} is longer than {_MOST_LINE_BYTES} bytes")
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{where} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise FormatError(f"{where} is not a JSON object")
            yield where, record
