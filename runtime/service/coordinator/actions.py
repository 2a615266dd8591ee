"""Actions: what the conductor wants done, as data. The coordinator does it, in this order."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeplace.placement.placement import Placement
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.event import Event
from moeplace.runtime.service.api import TokenEvent

Document = dict[str, Any]


@dataclass(frozen=True)
class Put:
    """Write a key of the store."""

    key: str
    value: Any


@dataclass(frozen=True)
class Delete:
    """Delete keys of the store."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class DropGroup:
    """Delete what the ranks of a generation told each other when they met."""

    generation: int


@dataclass(frozen=True)
class Append:
    """Write command `index` of the log."""

    index: int
    command: Document


@dataclass(frozen=True)
class StartMember:
    """Start a process; reports "ready" or "died" follow."""

    member: int
    node: int


@dataclass(frozen=True)
class Kill:
    """End a member at once; a report "died" follows."""

    member: int


@dataclass(frozen=True)
class Remind:
    """Report something after some seconds."""

    seconds: float
    report: Document


@dataclass(frozen=True, eq=False)
class MakePlan:
    """Plan a re-placement in the background; a report "planned" with the plan or an error follows.

    Attributes:
        number: of the plan.
        placement: in force.
        goal: to go to; None = what lets `holders` hold all experts with as little moved as possible.
        holders: ranks.
        load: (L, E) routed assignments, None = unknown.
        expert_bytes: of one expert.
    """

    number: int
    placement: Placement
    goal: Placement | None
    holders: tuple[int, ...]
    load: np.ndarray | None
    expert_bytes: int


@dataclass(frozen=True)
class Accept:
    """A request was taken: keep it until it has ended."""

    ticket: str
    request: Request


@dataclass(frozen=True)
class Tell:
    """A request has got something: keep it, then tell who asked.

    Attributes:
        ticket: whose.
        first: index of the first of its tokens.
        event: what.
        is_final: whether an end is the request's own; else the service ends, and another one with its state goes on.
    """

    ticket: str
    first: int
    event: TokenEvent
    is_final: bool = True


@dataclass(frozen=True)
class Note:
    """Write into the event log."""

    event: Event


Action = Put | Delete | DropGroup | Append | StartMember | Kill | Remind | MakePlan | Accept | Tell | Note


class Outbox:
    """Actions that wait to be carried out. The parts of the conductor share it; it alone knows what time it is.

    Attributes:
        now: seconds since the epoch, of the report at hand.
        steps: of the service, for the event log.
        losses: events of ranks that were lost.
    """

    def __init__(self) -> None:
        self.now, self.steps, self.losses = 0.0, 0, 0
        self._actions: list[Action] = []

    def add(self, action: Action) -> None:
        """Want something done."""
        self._actions.append(action)

    def note(self, kind: str, sentence: str, **figures: Any) -> None:
        """Want something in the event log."""
        self.losses += kind == "loss"
        self.add(Note(Event(self.now, kind, sentence, figures, self.steps)))

    def take(self) -> list[Action]:
        """All of them, once."""
        actions, self._actions = self._actions, []
        return actions


class CommandLog:
    """Commands in order; those that every rank has applied are deleted.

    Attributes:
        length: commands written.
    """

    def __init__(self, out: Outbox) -> None:
        self._out = out
        self.length = self._deleted = 0

    def append(self, command: Mapping[str, Any]) -> int:
        """Write a command; its index."""
        self._out.add(Append(self.length, dict(command)))
        self.length += 1
        return self.length - 1

    def forget(self, applied: int) -> None:
        """Delete the commands before `applied`, which all ranks have read."""
        stop = min(applied, self.length)
        if stop > self._deleted:
            self._out.add(Delete(tuple(f"log/{index}" for index in range(self._deleted, stop))))
            self._deleted = stop
