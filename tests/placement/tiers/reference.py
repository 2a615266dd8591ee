"""A second walk, from the description of the first: every rank is an object, and nothing is compiled."""

import math
from dataclasses import dataclass, field
from typing import Any

NEVER = float("inf")


@dataclass
class Waiting:
    layer: int
    expert: int
    since: float


@dataclass
class Rank:
    """One rank: what it keeps, what its link does."""

    pinned: set[tuple[int, int]]
    cached: dict[tuple[int, int], float]  # (layer, expert) -> moment it came
    rows: list[int]  # rows that are not pinned, by layer
    transit: list[float]  # moment from which each transit row is free
    speed: float
    terms: dict[str, Any]
    eviction: str
    load: dict[tuple[int, int], float]
    on_host: set[tuple[int, int]]
    size: dict[tuple[int, int], float]  # bytes
    held: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)  # in transit: row, moment it comes
    fresh: set[tuple[int, int]] = field(default_factory=set)
    worth: dict[tuple[int, int], float] = field(default_factory=dict)
    used: dict[tuple[int, int], int] = field(default_factory=dict)
    queue: list[Waiting] = field(default_factory=list)
    link: float = 0.0
    seen: float = 0.0
    loads: int = 0
    spared: float = 0.0
    carried: float = 0.0
    ahead: tuple[tuple[int, int], float] | None = None  # what was fetched ahead last, and when, pauses taken out

    def seconds(self, tokens: int) -> float:
        return (self.terms["per_activated"] + self.terms["per_token"] * tokens) / self.speed

    def wait(self, device: float, came: float) -> float:
        return came + self.terms["wake"] if came > device else device

    def has(self, key: tuple[int, int]) -> bool:
        return key in self.pinned or key in self.cached or key in self.held

    def victim(self, layer: int, step: int, needed: set[int]) -> tuple[int, int] | None:
        def rank_of(key: tuple[int, int]) -> tuple[float, ...]:
            last = self.used.get(key, 0)
            if self.eviction == "lru":
                return (last, last, key[1])
            value = self.worth.get(key, 0.0)
            if self.eviction == "score":
                value *= 0.9 ** (step - last)
            return (value, last, key[1])

        keys = [k for k in self.cached if k[0] == layer and k[1] not in needed and k not in self.fresh]
        return min(keys, key=rank_of) if keys else None

    def in_layer(self, layer: int) -> int:
        return sum(key[0] == layer for key in self.cached)

    def follow(self, until: float, step: int) -> None:
        while self.queue:
            head = self.queue[0]
            begin = max(self.link, head.since, self.seen)
            if begin >= until:
                break
            key = (head.layer, head.expert)
            if not self.has(key):
                if not self.make_room(key, begin, step):
                    break
                self.link = begin + self.load[key]
                self.loads += 1
                self.carried += self.size[key]
                self.fresh.add(key)
                self.ahead = (key, begin)
                self.comes(key, self.link)
            self.queue.pop(0)
        self.seen = max(self.seen, until)

    def comes(self, key: tuple[int, int], moment: float) -> None:
        if key in self.held:
            self.held[key] = (self.held[key][0], moment)
        else:
            self.cached[key] = moment

    def host_is_sooner(self, layer: int, expert: int, tokens: int, now: float) -> bool:
        key = (layer, expert)
        if self.terms["host"] is None or key not in self.on_host:
            return False
        per_expert, per_token = self.terms["host"]
        came = self.held[key][1] if key in self.held else self.cached.get(key, 0.0)
        return now + per_expert + per_token * tokens < came

    def pause(self, layer: int, now: float, asked: set[int]) -> float:
        """Leave what is fetched ahead and not needed now; seconds that are left of it if it is to go on."""
        if self.ahead is None or self.link <= now:
            return 0.0
        key, begun = self.ahead
        if key[0] == layer and key[1] in asked:
            return 0.0
        pieces = self.terms["pieces"]
        done = next(n for n in range(pieces + 1) if begun + n * self.load[key] / pieces >= now - 1e-9 or n == pieces)
        left = self.load[key] * (pieces - done) / pieces
        if math.isclose(left, 0.0, abs_tol=1e-9):
            return 0.0
        self.link -= left
        if key[0] > layer:
            return left
        self.spared += left / self.load[key]
        self.carried -= left / self.load[key] * self.size[key]
        self.ahead = None
        self.fresh.discard(key)
        self.cached.pop(key, None)
        if key in self.held:
            self.transit[self.held.pop(key)[0]] = self.link
        return 0.0

    def make_room(self, key: tuple[int, int], begin: float, step: int) -> bool:
        layer = key[0]
        if self.in_layer(layer) < self.rows[layer]:
            self.cached[key] = NEVER
            return True
        gone = self.victim(layer, step, set()) if self.rows[layer] else None
        if gone is not None:
            del self.cached[gone]
            self.cached[key] = NEVER
            return True
        free = [w for w, moment in enumerate(self.transit) if moment <= begin]
        if not free or len(self.held) + 1 >= len(self.transit):
            return False
        self.transit[free[0]] = NEVER
        self.held[key] = (free[0], NEVER)
        return True

    def compute(self, layer: int, step: int, now: float, asked: dict[int, tuple[int, float]], uses: Any) -> float:
        self.follow(now, step)
        self.queue = [item for item in self.queue if item.layer != layer]
        left = self.pause(layer, now, {e for e in asked if not self.host_is_sooner(layer, e, asked[e][0], now)})
        paused = self.link
        device, done = now + self.terms["fixed"], dict[int, float]()
        late: list[tuple[float, int]] = []
        missing = []
        for expert in sorted(asked):
            key = (layer, expert)
            came = self.cached.get(key, self.held.get(key, (0, 0.0))[1])
            if key in self.pinned:
                kind = "resident"
            elif not self.has(key):
                missing.append(expert)
                continue
            elif came > now:
                late.append((came, expert))
                uses["late"] += 1
                continue
            else:
                kind = "prefetched" if key in self.fresh else "cached"
            uses[kind] += 1
            device += self.seconds(asked[expert][0])
            done[expert] = device
        for came, expert in sorted(late):
            device = self.wait(device, came) + self.seconds(asked[expert][0])
            done[expert] = device
        missing.sort(key=lambda expert: (-asked[expert][0], expert))
        host = now
        while missing and self.terms["host"] is not None:
            last, before = missing[-1], max(self.link, now) + sum(self.load[layer, e] for e in missing)
            per_expert, per_token = self.terms["host"]
            ends = host + per_expert + per_token * asked[last][0]
            if (layer, last) not in self.on_host or ends >= before + self.seconds(asked[last][0]):
                break
            host = ends
            missing.pop()
            uses["host"] += 1
        for expert in missing:
            uses["loaded"] += 1
            device = self.fetch(layer, expert, step, now, device, asked, done)
            done[expert] = device
        if left:
            assert self.ahead is not None
            self.ahead = (self.ahead[0], self.ahead[1] + self.link - paused)
            self.link += left
            self.comes(self.ahead[0], self.link)
        for expert, (_, weight) in asked.items():
            self.note(layer, expert, step, weight)
        return max(device, host)

    def fetch(
        self,
        layer: int,
        expert: int,
        step: int,
        now: float,
        device: float,
        asked: dict[int, Any],
        done: dict[int, float],
    ) -> float:
        begin, row = max(self.link, now), None
        if not self.rows[layer]:
            row = min(range(len(self.transit)), key=self.transit.__getitem__)
            begin = max(begin, self.transit[row])
        elif self.in_layer(layer) == self.rows[layer]:
            gone = self.victim(layer, step, set(asked))
            if gone is None:
                here = sorted(key for key in self.cached if key[0] == layer)
                gone = min(here, key=lambda key: done.get(key[1], 0.0))
                begin = max(begin, done.get(gone[1], 0.0))
            del self.cached[gone]
            self.fresh.discard(gone)
        self.link = begin + self.load[layer, expert]
        self.loads += 1
        self.carried += self.size[layer, expert]
        device = self.wait(device, self.link) + self.seconds(asked[expert][0])
        if row is None:
            self.cached[layer, expert] = self.link
        else:
            self.transit[row] = device
        return device

    def note(self, layer: int, expert: int, step: int, weight: float) -> None:
        key = (layer, expert)
        before = self.worth.get(key, 0.0)
        if self.eviction == "score":
            before *= 0.9 ** (step - self.used.get(key, 0))
        self.worth[key] = before + (1 if self.eviction == "lfu" else 0.1 * weight)
        self.used[key] = step
        self.fresh.discard(key)

    def leave(self, layer: int, now: float, step: int) -> None:
        self.follow(now, step)
        self.fresh = {key for key in self.fresh if key[0] != layer}
        for key in [key for key in self.held if key[0] == layer]:
            row, came = self.held.pop(key)
            self.transit[row] = max(now, came)


def walk_reference(
    ranks: list[Rank], steps: list[list[dict[int, tuple[int, int, float]]]], outside: list[float], ahead: Any
) -> tuple[float, list[dict[str, int]]]:
    """Seconds of all steps, and the ways in which each rank found its experts.

    Args:
        ranks: at the start.
        steps: [step][layer] expert -> (rank, tokens, weight).
        outside: seconds before each layer's experts.
        ahead: (step, layer) -> [(target layer, rank, expert)] in the order in which they are queued.
    """
    kinds = ("resident", "cached", "prefetched", "late", "host", "loaded")
    uses = [dict.fromkeys(kinds, 0) for _ in ranks]
    now = 0.0
    for step, layers in enumerate(steps):
        for layer, routed in enumerate(layers):
            now += outside[layer]
            ends = []
            for index, rank in enumerate(ranks):
                asked = {e: (tokens, weight) for e, (r, tokens, weight) in routed.items() if r == index}
                ends.append(rank.compute(layer, step, now, asked, uses[index]))
            named = ahead(step, layer)
            for target in {target for target, _, _ in named}:
                for rank in ranks:
                    rank.queue = [item for item in rank.queue if item.layer != target]
            for target, index, expert in named:
                rank = ranks[index]
                waits = any((w.layer, w.expert) == (target, expert) for w in rank.queue)
                if not rank.has((target, expert)) and not waits:
                    rank.queue.append(Waiting(target, expert, now))
            now = max([now, *ends])
            for rank in ranks:
                rank.leave(layer, now, step)
    return now, uses
