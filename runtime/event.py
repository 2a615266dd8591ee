"""Event: one thing that happened to a service, for people and for programs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """An entry of an event log.

    Attributes:
        time: seconds since the epoch.
        kind: a word, or words with hyphens, for programs: "loss", "move-failed".
        sentence: for people.
        figures: what the sentence rests on.
        step: of the service.
    """

    time: float
    kind: str
    sentence: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
