"""EventLog: what a service decided and did, as JSON lines and in memory."""

import json
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from moeplace.profiling.errors import FormatError, InputError
from moeplace.profiling.files import require_file, require_folder_of
from moeplace.runtime.event import Event

logger = logging.getLogger(__name__)

_START = '{"time": '
"""With which every line begins, also one that was cut off."""


class EventLog:
    """Appends events to a file, one JSON object a line, each on disk before the next thing happens.

    Attributes:
        events: what happened so far, oldest first.
    """

    def __init__(self, path: str | Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        """Open the file for appending; None = memory alone.

        Raises:
            InputError: it cannot be written.
        """
        self.events: list[Event] = []
        self._clock = clock
        self._file: TextIO | None = None
        if path is not None:
            require_folder_of(path)
            try:
                self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close
                if _is_cut(Path(path)):
                    self._file.write("\n")
            except OSError as error:
                raise InputError(f"cannot write {path}: {error.strerror}") from error

    def add(self, kind: str, sentence: str, *, step: int, **figures: Any) -> Event:
        """Note what happened now; a figure that is not finite becomes None."""
        clean = {name: _finite(value) for name, value in figures.items()}
        event = Event(self._clock(), kind, sentence, clean, step)
        self.events.append(event)
        if self._file is not None:
            try:
                self._file.write(json.dumps(asdict(event), allow_nan=False) + "\n")
                self._file.flush()
            except OSError as error:  # a full disk must not end a service
                logger.warning("events are kept in memory only from now on: %s", error)
                self._drop_file()
        return event

    def close(self) -> None:
        """Close the file; `events` stays."""
        self._drop_file()

    def _drop_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written before cannot be now
                self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: str | Path) -> list[Event]:
    """The events of a log file; a line that was cut off by the end of its process is left out.

    Raises:
        InputError: there is no such file.
        FormatError: a line is not an event.
    """
    try:
        lines = require_file(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not a text file: {error}") from error
    events = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            events.append(_event(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and line.startswith(_START):
                continue
            raise FormatError(f"{path} line {number} is not an event: it needs time, kind and sentence") from error
    return events


def _event(document: dict[str, Any]) -> Event:
    figures = document.get("figures", {})
    event = Event(
        float(document["time"]),
        str(document["kind"]),
        str(document["sentence"]),
        dict(figures),
        int(document.get("step", 0)),
    )
    if not math.isfinite(event.time):
        raise ValueError("time")
    return event


def _is_cut(path: Path) -> bool:
    """Whether the file does not end with a line."""
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
