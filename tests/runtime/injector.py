"""EventInjector: faults of members at chosen moments, and whether they have happened."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

from moeplace.runtime.event import Event


class EventInjector:
    """Collects faults: `EventInjector().fail_at(0, "step", 12).fail_at(1, "tokens", 3)`.

    Attributes:
        faults: per member id, as `Coordinator` wants them.
    """

    def __init__(self) -> None:
        self.faults: dict[int, list[dict[str, Any]]] = {}

    def fail_at(self, member: int, phase: str, at: int, *, after: bool = False, action: str = "kill") -> Self:
        """Let a member fail when it comes to a moment for the `at`-th time; see `moeplace.runtime.service.faults`."""
        fault = {"phase": phase, "at": at, "after": after, "action": action}
        self.faults.setdefault(member, []).append(fault)
        return self

    def check(self, events: Sequence[Event]) -> None:
        """Each fault has fired, exactly once, and nothing else was lost."""
        lost = Counter(
            event.figures["member"] for event in events if event.kind in ("loss", "join-failed") and event.figures
        )
        assert lost == {member: len(faults) for member, faults in self.faults.items()}
