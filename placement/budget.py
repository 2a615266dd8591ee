"""Budget: how long a solver may run, what it draws its random numbers from, and whom it tells."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


class Spread(Protocol):
    """Runs a function for several items somewhere else, such as on the nodes of a cluster."""

    def __call__(
        self, function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any], report: Callable[[float], None]
    ) -> list[Any]:
        """[function(shared, item) for item in items]; all of it can be pickled."""


@dataclass(frozen=True)
class Budget:
    """Handed to every solver.

    Attributes:
        time_limit: seconds from `started` on. Searches do a fixed amount of work that follows from this number and
            the problem's size, so that a seed gives the same placement on every machine fast enough to finish it; the
            clock only cuts in on slower ones.
        seed: of all random draws.
        started: clock reading at the start, from `time.monotonic`.
        report: called with the share of the work done (0..1), for a progress bar.
        spread: where layers that do not depend on each other are searched, if not in threads of this process.
        waited: seconds that do not count: what `spread` took beyond its share, such as to start workers.
    """

    time_limit: float
    seed: int = 0
    started: float = field(default_factory=lambda: time.monotonic())
    report: Callable[[float], None] = lambda share: None
    spread: Spread | None = None
    waited: list[float] = field(default_factory=list)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started - sum(self.waited)

    @property
    def remaining(self) -> float:
        return max(self.time_limit - self.elapsed, 0.0)

    @property
    def expired(self) -> bool:
        return self.remaining <= 0

    def rng(self, *key: int) -> np.random.Generator:
        """A generator for one purpose, independent of the others: (seed, key) determine it."""
        return np.random.default_rng((self.seed, *key))

    @contextmanager
    def alarm(self, seconds: float) -> Iterator[np.ndarray]:
        """A (1,) uint8 flag that turns 1 when this many seconds have passed.

        Kernels run without the interpreter's lock and look at it between moves, so that a run that is longer than
        planned, on a busy machine or a very large layer, ends in time.
        """
        flag = np.zeros(1, np.uint8)
        timer = threading.Timer(max(seconds, 0.0), flag.fill, args=(1,))
        timer.daemon = True
        timer.start()
        try:
            yield flag
        finally:
            timer.cancel()
