"""FaultPlan: a member that kills, stops or delays itself at a chosen moment, so that tests need no luck.

    {"phase": "step", "at": 12, "after": true}           after its 12th step
    {"phase": "tokens", "at": 3}                         before the 3rd collective of the kind "tokens"
    {"phase": "migration", "at": 2, "action": "stop"}    before its 2nd advance of a migration, as if it hung
    {"phase": "step", "at": 5, "action": "sleep", "seconds": 4}     its 5th step takes long
    {"phase": "request:bad", "at": 1}                    before a step when a request named "bad" is there

Phases are the kinds of collectives (see `Counters.collectives`), before which it happens, and what a member names
itself: starting, before it reads anything; forming, before it connects to the next generation; loading, before it reads
experts; step and migration, before or after; request:NAME.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class FaultPlan:
    """Faults of one member; none by default."""

    def __init__(self, faults: Sequence[Mapping[str, Any]]) -> None:
        self._faults = list(faults)
        self._seen: Counter[tuple[str, bool]] = Counter()

    @property
    def is_empty(self) -> bool:
        """Whether nothing will ever happen."""
        return not self._faults

    def reach(self, phase: str, *, after: bool = False) -> None:
        """A moment has come: does not return where a fault is due."""
        if not self._faults:
            return
        self._seen[phase, after] += 1
        for fault in self._faults:
            same = fault["phase"] == phase and bool(fault.get("after", False)) == after
            if same and fault["at"] == self._seen[phase, after]:
                self._do(fault)

    def _do(self, fault: Mapping[str, Any]) -> None:
        action = fault.get("action", "kill")
        if action == "sleep":
            time.sleep(fault["seconds"])
        else:
            os.kill(os.getpid(), _SIGNALS[action])
