"""Heartbeat: a member's signs of life, from a thread of its own: a member at work gives them, one that hangs does not.

They say at which turn the member is, so that a step that never ends is noticed as well.
"""

import os
import threading
from collections.abc import Callable
from typing import Any

from moeplace.runtime.service.store import ServiceEndedError, ServiceStore


class Heartbeat:
    """See the module.

    Attributes:
        turn: of the member's work; the member counts it up.
        state: "busy", "loading" (what a disk may take is another matter than what a step may), or "idle" = it waits for
            something to do, or for others.
    """

    def __init__(self, connect: Callable[[], ServiceStore], member: int, *, every: float) -> None:
        """`connect` gives a connection of its own, in the thread of its own."""
        self.turn, self.state = 0, "idle"
        self._connect, self._member, self._every = connect, member, every
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """A turn begins."""
        self.turn, self.state = self.turn + 1, "busy"

    def load(self) -> None:
        """The member reads experts from a disk."""
        self.turn, self.state = self.turn + 1, "loading"

    def rest(self) -> None:
        """The member waits for something to do, or for others."""
        self.state = "idle"

    def stop(self) -> None:
        """Give none any more."""
        self._stopping.set()
        self._thread.join(1.0)

    def sign(self) -> dict[str, Any]:
        """The report that is a sign of life."""
        return {"kind": "alive", "member": self._member, "turn": self.turn, "state": self.state}

    def _beat(self) -> None:
        try:
            store = self._connect()
            while not self._stopping.wait(self._every):
                store.report(self.sign())
        except ServiceEndedError:
            if not self._stopping.is_set():
                os._exit(1)  # whatever it is doing: nobody is there to take what comes of it
