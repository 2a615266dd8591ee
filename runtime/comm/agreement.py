"""Agreement: ranks compare, through their store and without a collective, what must be the same on all of them.

A store does not say that a rank has died, as a collective does. So who waits looks up now and then.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch.distributed as dist

from moeplace.runtime.errors import DisagreementError

_GAVE_UP = "gave up: "
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.05
"""Seconds between two looks; a wait inside the store could be ended by nobody, and logs that it was."""


class Agreement:
    """The agreements of one rank of a group, one after the other."""

    def __init__(
        self, store: dist.Store, *, rank: int, size: int, guard: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        """`guard(what is waited for)` turns what a store raises about a lost peer into a PeerLostError."""
        self._store, self._rank, self._size, self._guard = store, rank, size, guard
        self._count = 0

    def reach(self, items: dict[str, str], *, timeout: float, look: Callable[[], None] = lambda: None) -> None:
        """Compare values over all ranks.

        Args:
            timeout: seconds for each of the others.
            look: called while this rank waits, time and again; what it raises ends the wait, and the agreement for this
                rank.

        Raises:
            DisagreementError: some rank has another value, or gave up; every rank raises it.
            PeerLostError: a rank did not report in time.
        """
        if self._size == 1:
            return
        mine = "\n".join(f"{name}={value}" for name, value in items.items())
        self._count += 1  # a key of its own per agreement: stores keep what was written
        self._store.set(self._key(self._count, self._rank), mine)
        for peer in range(self._size):
            theirs = self._wait_for(peer, timeout, look)
            if theirs.startswith(_GAVE_UP):
                raise DisagreementError(f"rank {peer} {theirs}")
            if theirs != mine:
                raise DisagreementError(self._describe_difference(peer, mine, theirs))
        # Who agrees for the k-th time has read all of the time before.
        self._store.delete_key(self._key(self._count - 1, self._rank))

    def give_up(self, reason: str) -> None:
        """Tell ranks that wait for the next agreement that this one will not come: for this rank it is over."""
        if self._size > 1:
            self._count += 1  # theirs ends as well, and the one after it must be the same on all
            self._store.set(self._key(self._count, self._rank), _GAVE_UP + " ".join(reason.split()))

    def _wait_for(self, peer: int, timeout: float, look: Callable[[], None]) -> str:
        key, deadline, pause = self._key(self._count, peer), time.monotonic() + timeout, _FIRST_PAUSE
        with self._guard(f"waiting for rank {peer}"):
            while not self._store.check([key]):
                look()
                if time.monotonic() >= deadline:
                    raise dist.DistStoreError("it did not report in time")
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            return self._store.get(key).decode()

    def _describe_difference(self, peer: int, mine: str, theirs: str) -> str:
        for ours, other in zip(mine.split("\n"), theirs.split("\n"), strict=False):
            if ours != other:
                name, value = ours.split("=", 1)
                other_value = other.split("=", 1)[-1]
                return (
                    f"ranks {min(self._rank, peer)} and {max(self._rank, peer)} disagree about the {name}: "
                    f"{value} on rank {self._rank}, {other_value} on rank {peer}; all ranks must be given the same"
                )
        return f"ranks {self._rank} and {peer} compare different things"

    @staticmethod
    def _key(number: int, rank: int) -> str:
        return f"agree/{number}/{rank}"
