"""Alike requests side by side: whoever is chosen, nobody waits longer than was promised, and all ranks choose alike."""

from collections.abc import Sequence

import numpy as np
import pytest

from moeplace.placement.tiers.likeness import unit_profile
from moeplace.runtime.engine.admission.alike import AlikeOrder
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.scheduler import Scheduler
from tests.runtime.engine.test_scheduler_fairness import Rows, look
from tests.seeds import FIXED_AND_TODAY

LAYERS, EXPERTS = 3, 8


def draw_profile(draw: np.random.Generator) -> np.ndarray:
    """Of a request that asks for two of the experts of each layer above all."""
    count_LE = draw.integers(0, 3, (LAYERS, EXPERTS))
    count_LE[:, draw.integers(0, EXPERTS, 2)] += 20
    return np.rint(1024 * unit_profile(count_LE)).astype(np.int16)


class World:
    """Two schedulers, as two ranks have them, under drawn arrivals; what was drawn, and who got a place when."""

    def __init__(self, seed: int, most_overtaken: int) -> None:
        draw = self.draw = np.random.default_rng(seed)
        self.most = most_overtaken
        self.pages = None if draw.random() < 0.5 else int(draw.integers(4, 9))
        options = {
            "num_ranks": int(draw.integers(1, 4)), "rows": int(draw.integers(1, 4)), "positions": 64,
            "replicated": bool(draw.random() < 0.5), "max_prefill_tokens": int(draw.choice([1, 7, 16, 100])),
            "reuses_prefixes": bool(draw.random() < 0.5), "pages": self.pages, "most_overtaken": most_overtaken,
        }  # fmt: skip
        self.pair = (Scheduler(**options), Scheduler(**options))
        self.rows = [Rows(one, self.pages) for one in self.pair]
        count = int(draw.integers(2, 30))
        self.arrival = np.sort(draw.integers(0, 1 + count * int(draw.integers(0, 3)), count))
        self.requests = []
        for number in range(count):
            prompt, new = draw.integers(0, 5, draw.integers(1, 30)), int(draw.integers(1, 12))
            self.requests.append(Request(str(number), tuple(prompt.tolist()), new, stop_ids=()))
        self.profiles = {request.request_id: draw_profile(draw) for request in self.requests}
        self.placed: list[int] = []
        self.passes = 0

    def run(self) -> None:
        """Until all have ended."""
        while self.passes <= self.arrival[-1] or not self.pair[0].is_idle:
            for one in self.pair:
                for number in np.flatnonzero(self.arrival == self.passes):
                    one.add(self.requests[number])
                self.foresee(one)
            for one, held in zip(self.pair, self.rows, strict=True):
                held.carry_out(one.next_batch())
            assert look(self.pair[0]) == look(self.pair[1])
            assert [list(one.waiting) for one in self.pair[:1]] == [list(one.waiting) for one in self.pair[1:]]
            self.passes += 1
            assert self.passes < 3000

    def foresee(self, scheduler: Scheduler) -> None:
        """As an engine does; who has a place now for the first time is noted."""
        unforeseen = scheduler.unforeseen()
        if unforeseen:
            names = [r.request_id for r in unforeseen]
            scheduler.order.learn(names, np.stack([self.profiles[name] for name in names]))
        before = [int(s.request.request_id) for s in scheduler.running]
        scheduler.foresee()
        if scheduler is self.pair[0]:
            now = [int(s.request.request_id) for s in scheduler.running]
            self.placed += [number for number in now if number not in before and number not in self.placed]


@pytest.mark.parametrize("most_overtaken", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_nobody_is_overtaken_more_often_than_may_be(seed: int, most_overtaken: int) -> None:
    """Whatever arrives, with memory for all rows or for few: all end, ranks plan alike, and before no request have more
    than N later ones got their first place. With N = 0 places go as requests came."""
    for number in range(12):
        world = World(seed * 1000 + number, most_overtaken)
        world.run()
        assert sorted(world.placed) == list(range(len(world.requests)))
        for place, request in enumerate(world.placed):
            assert sum(other > request for other in world.placed[:place]) <= most_overtaken, world.placed
        if not most_overtaken:
            assert world.placed == sorted(world.placed)


def best_by_hand(profiles: Sequence[Sequence[int]], batch: Sequence[Sequence[int]]) -> int:
    """The first request whose products with those of the batch add up to most, in whole numbers of any size."""
    sums = [sum(a * b for other in batch for a, b in zip(one, other, strict=True)) for one in profiles]
    return sums.index(max(sums))


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
def test_the_most_alike_of_those_that_may_go_is_chosen(seed: int) -> None:
    """Among the first N + 1, up to the first that nobody may overtake any more."""
    draw = np.random.default_rng(seed)
    for _ in range(60):
        most, count = int(draw.integers(1, 6)), int(draw.integers(2, 9))
        order = AlikeOrder(most)
        names = [str(n) for n in range(count + 3)]
        waiting, running = names[:count], names[count:]
        profiles = [draw_profile(draw) for _ in names]
        order.learn(names, np.stack(profiles))
        overtaken = draw.integers(0, most + 1, count).tolist()
        for name, times in zip(waiting, overtaken, strict=True):
            order.restore(name, times)
        end = min([n + 1 for n in range(count) if overtaken[n] == most] + [most + 1, count])
        expected = best_by_hand([p.tolist() for p in profiles[:end]], [p.tolist() for p in profiles[count:]])
        assert order.choose(waiting, running) == expected
        order.admit(waiting[:expected], waiting[expected])
        assert [order.overtaken(name) for name in waiting] == [
            times + 1 if n < expected else 0 if n == expected else times for n, times in enumerate(overtaken)
        ]


def test_who_had_a_place_is_not_overtaken() -> None:
    """A sequence that gave its memory to an older one goes next, however unlike the others it is."""
    order = AlikeOrder(3)
    order.learn("abc", np.eye(2, dtype=np.int16)[[0, 1, 1]] * 1024)
    assert order.choose("ab", "c") == 1
    order.insist("a")
    assert order.choose("ab", "c") == 0


def test_forecasts_are_asked_for_where_there_is_a_choice() -> None:
    """Of those that run, and of the first that wait, as many as can be chosen from; of nobody twice; of nobody where
    no place is free, one waits, or places go as requests come."""
    order = AlikeOrder(2)
    waiting, running = [str(n) for n in range(9)], ["r"]
    assert order.unforeseen(waiting, running, places=0) == []
    assert order.unforeseen(waiting[:1], running, places=1) == []
    assert AlikeOrder(0).unforeseen(waiting, running, places=3) == []
    asked = order.unforeseen(waiting, running, places=2)
    assert asked == [*running, *waiting[:4]]
    order.learn(asked, np.ones((5, 4), np.int16))
    assert order.unforeseen(waiting[1:], [*running, waiting[0]], places=2) == [waiting[4]]
    assert order.unforeseen(waiting[4:], [], places=1) == waiting[4:7]
    assert order.unforeseen(waiting[:2], [], places=1) == waiting[:2]  # what has ended was forgotten


def test_without_forecasts_requests_go_as_they_came() -> None:
    """Of those that wait, or of all that run."""
    order = AlikeOrder(5)
    assert order.choose("ab", "r") == 0
    order.learn("ab", np.array([[0, 9], [9, 0]], np.int16))
    assert order.choose("ab", "r") == 0
    order.learn("r", np.array([[9, 0]], np.int16))
    assert order.choose("ab", "r") == 1
    assert order.choose("ab", "") == 0


def test_one_that_does_not_fit_leaves_its_turn_to_the_first() -> None:
    """It would need more memory than there is; the first, which fits, goes, and nobody is overtaken."""
    scheduler = Scheduler(
        num_ranks=1, rows=4, positions=64, replicated=False, max_prefill_tokens=100, pages=4, most_overtaken=3
    )
    requests = [Request("run", (1,) * 20, 40), Request("short", (2,), 4), Request("long", (1,) * 40, 4)]
    scheduler.add(requests[0])
    rows = Rows(scheduler, 4)
    rows.carry_out(scheduler.next_batch())
    for request in requests[1:]:
        scheduler.add(request)
    names = [request.request_id for request in requests]
    scheduler.order.learn(names, np.array([[0, 9], [9, 0], [0, 9]], np.int16))
    assert scheduler.order.choose(names[1:], names[:1]) == 1
    scheduler.next_batch()
    assert [s.request.request_id for s in scheduler.running] == ["run", "short"]
    assert scheduler.order.overtaken("long") == 0
