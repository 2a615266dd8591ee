"""Liveness: which members give no sign of life, and which are at a step that does not end.

A member's signs come from a thread of its own and say at which turn of its work it is. So a rank that is stopped or cut
off is told from one that is busy, and a busy one may take its time; one that reads experts another time.
"""

import math
from dataclasses import dataclass

from moeplace.runtime.service.options import ServiceOptions


@dataclass(eq=False)
class Sign:
    """The last sign of a member.

    Attributes:
        seen: when it came.
        turn: of its work.
        since: when it began with that.
        state: "busy", "loading" or "idle".
    """

    seen: float
    turn: int
    since: float
    state: str


class Liveness:
    """Signs of life. Times are those of the reports, in seconds."""

    def __init__(self, options: ServiceOptions) -> None:
        self._timeout = options.timeout
        self._limits = {"busy": options.step_timeout, "loading": options.start_timeout}
        self.interval = min(max(options.timeout / 4, 0.1), 5.0)
        self._signs: dict[int, Sign] = {}
        self._looked: float | None = None

    def hear(self, member: int, turn: int, *, state: str, now: float) -> None:
        """A sign of life."""
        sign = self._signs.get(member)
        same = sign is not None and (sign.turn, sign.state) == (turn, state)
        since = sign.since if sign is not None and same else now
        self._signs[member] = Sign(now, turn, since, state)

    def forget(self, member: int) -> None:
        """It is gone."""
        self._signs.pop(member, None)

    def look(self, now: float) -> dict[int, str]:
        """Members that have to be given up, and why. To be called every `interval` seconds."""
        late = now - (now if self._looked is None else self._looked) - self.interval
        self._looked = now
        if late > self.interval or late < -self.interval:  # it was this process that slept, or the clock that was set
            for sign in self._signs.values():
                sign.seen = sign.since = now
            return {}
        found = {}
        for member, sign in self._signs.items():
            if now - sign.seen > self._timeout:
                found[member] = f"it hung: no sign of life for {self._timeout:g} s"
            elif now - sign.since > self._limits.get(sign.state, math.inf):
                what = "its step did not end" if sign.state == "busy" else "it had not read its experts"
                found[member] = f"{what} within {self._limits[sign.state]:g} s"
        return found
