"""JSON lines: one object a line, of bounded length; or one document over several lines."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeplace.profiling.errors import FormatError
from moeplace.profiling.imports.tables.text import open_bytes, plain_suffix, read_bounded

_MOST_LINE_BYTES = 1 << 28
_SUFFIXES = (".json", ".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"


def is_json(path: str | Path) -> bool:
    """Whether a file's name says JSON or JSON lines."""
    return plain_suffix(path) in _SUFFIXES


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path, line n", object) of every line; blank lines are skipped.

    A file that holds one document instead, or a list of objects, gives ("path, request n", object).

    Raises:
        InputError: there is no such file.
        FormatError: a line is not a JSON object, or longer than 256 MiB.
    """
    try:
        first = True
        for where, line in _lines(path):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                if first and line.lstrip()[:1] in (b"{", b"["):
                    yield from _one_document(path)
                    return
                raise FormatError(f"{where} is not JSON: {str(error)[:200]}") from error
            if first and isinstance(record, list):
                yield from _records(path, record)
                return
            if not isinstance(record, dict):
                raise FormatError(f"{where} is not a JSON object")
            yield where, record
            first = False
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path} is not readable: {str(error)[:200]}") from error


def has_key(path: str | Path, key: str) -> bool:
    """Whether the first object of a file has a key; False where it is not JSON."""
    try:
        return any(key in record for _, record in _first(path))
    except FormatError:
        return False


def _first(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for found in read_json_lines(path):
        yield found
        return


def _lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    with open_bytes(path) as file:
        number = 0
        while line := file.readline(_MOST_LINE_BYTES):
            number += 1
            where = f"{path}, line {number}"
            if len(line) == _MOST_LINE_BYTES:
                raise FormatError(f"{where} is longer than {_MOST_LINE_BYTES} bytes")
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield where, line


def _one_document(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_bounded(path, _MOST_LINE_BYTES).removeprefix(_BOM)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is neither JSON nor JSON lines: {str(error)[:200]}") from error
    yield from _records(path, document if isinstance(document, list) else [document])


def _records(path: str | Path, records: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, record in enumerate(records, 1):
        where = f"{path}, request {number}"
        if not isinstance(record, dict):
            raise FormatError(f"{where} is not a JSON object")
        yield where, record
