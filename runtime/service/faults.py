"""FaultPlan: a member that kills or stops itself at a chosen moment, so that tests need no luck.

    {"phase": "step", "at": 12, "after": true}           after its 12th step
    {"phase": "tokens", "at": 3}                         before the 3rd collective of the kind "tokens"
    {"phase": "migration", "at": 2, "action": "stop"}    before its 2nd advance of a migration, as if it hung

Phases are the kinds of collectives (see `Counters.collectives`), before which it happens, and what a member names
itself: step and migration, before or after, and forming, before it connects to the next generation.
"""

import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class FaultPlan:
    """Faults of one member; none by default."""

    def __init__(self, faults: Sequence[Mapping[str, Any]]) -> None:
        self._faults = list(faults)
        self._seen: Counter[tuple[str, bool]] = Counter()

    def reach(self, phase: str, *, after: bool = False) -> None:
        """A moment has come: does not return where a fault is due."""
        if not self._faults:
            return
        self._seen[phase, after] += 1
        for fault in self._faults:
            same = fault["phase"] == phase and bool(fault.get("after", False)) == after
            if same and fault["at"] == self._seen[phase, after]:
                os.kill(os.getpid(), _SIGNALS[fault.get("action", "kill")])
