"""AlikeOrder: which waiting request gets the next place: one whose experts are like those that the batch asks for.

Requests that ask for alike experts share what is loaded (ExpertFlow, arXiv 2410.17954). What a request asks for is a
forecast (`ExpertForecast`), the same on every rank to the last bit: profiles are whole numbers, and sums of their
products are exact in whatever order they are added. So all ranks choose alike.

Nobody starves. A request is overtaken N times at most; then it goes before all that came later. The choice is among
the first N + 1 that wait: looking farther would use up the N of many at once, and leave no choice for long (on the
models that were tried, N + 1 was best or near it, for every N).

Shape letters: X = layers x experts, G requests.
"""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from moeplace.placement.tiers.likeness import likeness, most_alike


class AlikeOrder:
    """See the module. Requests are known by their names; those that wait are in the order in which they came.

    Attributes:
        most_overtaken: N; 0 = requests go as they came.
    """

    def __init__(self, most_overtaken: int = 0) -> None:
        self.most_overtaken = most_overtaken
        self._overtaken: dict[str, int] = {}
        self._profiles: dict[str, np.ndarray] = {}

    def overtaken(self, name: str) -> int:
        """How many that came later have gone before a waiting request."""
        return self._overtaken.get(name, 0)

    def restore(self, name: str, overtaken: int) -> None:
        """A request waits on that has been overtaken so often."""
        self._overtaken[name] = overtaken

    def insist(self, name: str) -> None:
        """A request had a place and lost it: nobody may overtake it any more."""
        self.restore(name, self.most_overtaken)

    def forget(self, name: str) -> None:
        """A request does not wait any more."""
        self._overtaken.pop(name, None)

    def choose(self, waiting: Iterable[str], running: Iterable[str]) -> int:
        """Index of the request that goes next; where nothing is forecast, the first."""
        batch = [self._profiles[name] for name in running if name in self._profiles]
        could: list[int] = []
        profiles: list[np.ndarray] = []
        for index, name in enumerate(islice(waiting, self.most_overtaken + 1)):
            if name in self._profiles:
                could.append(index)
                profiles.append(self._profiles[name])
            if self.overtaken(name) >= self.most_overtaken:
                break
        if not batch or not could:
            return 0
        return could[most_alike(likeness(np.array(profiles, np.float64), np.array(batch, np.float64)))]

    def admit(self, passed: Iterable[str], name: str) -> None:
        """A request gets its place before those that are `passed`."""
        for other in passed:
            self._overtaken[other] = self.overtaken(other) + 1
        self.forget(name)

    def unforeseen(self, waiting: Sequence[str], running: Sequence[str], *, places: int) -> list[str]:
        """Those whose forecast choices need, before `places` are given away; where there is none to make, nobody."""
        if not self.most_overtaken or not places or len(waiting) < 2:
            return []
        in_flight = {*running, *waiting}
        self._profiles = {name: profile for name, profile in self._profiles.items() if name in in_flight}
        wanted = (*running, *islice(waiting, self.most_overtaken + places))
        return [name for name in wanted if name not in self._profiles]

    def learn(self, names: Sequence[str], profile_GX: np.ndarray) -> None:
        """Forecasts: (G, X) whole numbers, the same on all ranks."""
        self._profiles.update(zip(names, profile_GX, strict=True))
