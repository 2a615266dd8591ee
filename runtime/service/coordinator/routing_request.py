"""RoutingRequest: the coordinator's end of asking all ranks for their recent routing.

The request is a command of the log, so all ranks answer at the same step boundary and their rows are of the same
passes.
"""

from moeplace.runtime.engine.windows.rows import RoutedRows
from moeplace.runtime.service.coordinator.actions import CommandLog, Document
from moeplace.runtime.service.routing_text import from_text


class RoutingRequest:
    """One request at a time; its answer is there once all members of the generation have answered."""

    def __init__(self, log: CommandLog) -> None:
        self._log = log
        self._number = 0
        self._missing: set[int] | None = None
        self._parts: list[RoutedRows] = []

    def ask(self, members: tuple[int, ...]) -> None:
        """Ask the members of the generation in force, unless that has been done."""
        if self._missing is None and members:
            self._number += 1
            self._missing, self._parts = set(members), []
            self._log.append({"kind": "routing", "number": self._number})

    def take(self, report: Document) -> None:
        """A member's answer; those to requests that were given up are ignored."""
        if self._missing is not None and report["number"] == self._number and report["member"] in self._missing:
            self._missing.remove(report["member"])
            self._parts.append(from_text(report["rows"]))

    def collect(self) -> list[RoutedRows] | None:
        """The answers of all members, once; None = some are missing."""
        if self._missing is None or self._missing:
            return None
        self._missing = None
        return self._parts

    def give_up(self) -> None:
        """The generation has ended: its members count passes anew, and one that is gone will not answer."""
        self._missing = None
