"""Steps of a descent against all steps there are, what each is worth counted from slots alone."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from moeplace.placement.rebalancing.packing import pack_with_replicas
from moeplace.placement.rebalancing.search import fill_empty, seat_missing
from moeplace.placement.rebalancing.seating import (
    Floor,
    Seating,
    empty_seating,
    floor_of,
    remember,
    repoint,
    set_times,
    sit,
    swap,
)
from moeplace.placement.rebalancing.steps import (
    ACROSS,
    FREE,
    SPREAD,
    Free,
    Goal,
    Limits,
    Step,
    Trial,
    best_lightening,
    best_relay,
    best_repoint,
    best_swap,
    set_losses,
)
from tests.seeds import TODAY

EXPERTS = 7
SCENES = 100
NO_STEP = Step(0.0, -1, -1, -1, -1)


class Scene(NamedTuple):
    """A layer in the middle of a descent: the slots in force, those of now, and what is wanted."""

    start_S: np.ndarray
    now_S: np.ndarray
    load_E: np.ndarray
    home_E: np.ndarray
    floor: Floor
    goal: Goal
    limits: Limits

    def held(self, row_S: np.ndarray) -> list[list[int]]:
        """Experts of each rank."""
        return [row_S[self.floor.rank_S == r].tolist() for r in range(len(self.floor.node_R))]

    def times(self, row_S: np.ndarray) -> np.ndarray:
        """(R,) every slot of an expert serving the same share."""
        count_E = np.array([max((row_S == e).sum(), 1) for e in range(EXPERTS)])
        share_E = self.load_E / count_E
        return np.array([sum(share_E[e] for e in held if e >= 0) for held in self.held(row_S)]) * self.floor.slow_R

    def fetched(self, row_S: np.ndarray) -> tuple[np.ndarray, int]:
        """(experts each rank fetched since the start (R,), how many of all are new to their node)."""
        old, node_R = self.held(self.start_S), self.floor.node_R.tolist()
        on_node: dict[int, set[int]] = {}
        for held, node in zip(old, node_R, strict=True):
            on_node.setdefault(node, set()).update(held)
        arrived = [set(new) - set(had) - {-1} for new, had in zip(self.held(row_S), old, strict=True)]
        return np.array([len(a) for a in arrived]), sum(
            len(a - on_node[n]) for a, n in zip(arrived, node_R, strict=True)
        )

    def may_get(self, e: int, r: int) -> bool:
        """Whether rank r lacks expert e and may fetch it."""
        if e in self.held(self.now_S)[r] or (self.home_E[e] >= 0 and self.home_E[e] != self.floor.node_R[r]):
            return False
        return e in self.held(self.start_S)[r] or self.fetched(self.now_S)[0][r] < self.limits.per_rank

    def worth(self, changes: dict[int, int]) -> float:
        """Overload ended and load spread per move by giving slots other experts; 0 where it breaks a limit."""
        after_S = self.now_S.copy()
        after_S[list(changes)] = list(changes.values())
        before, after, target = self.times(self.now_S), self.times(after_S), self.goal.target
        gain = float(np.maximum(before - target, 0).sum() - np.maximum(after - target, 0).sum())
        for e in range(EXPERTS):
            had, has = int((self.now_S == e).sum()), int((after_S == e).sum())
            if has > had and self.load_E[e] > had * self.goal.room:
                gain += self.goal.mean
            if has < had and self.load_E[e] > has * self.goal.room:
                gain -= self.goal.mean
        (old_R, old_across), (new_R, new_across) = self.fetched(self.now_S), self.fetched(after_S)
        moves, across = int(new_R.sum() - old_R.sum()), new_across - old_across
        broken = (moves > 0 and new_R.sum() > self.limits.moves) or (across > 0 and new_across > self.limits.across)
        if broken or gain <= 1e-9 * self.goal.mean:
            return 0.0
        spread = float((before**2 - after**2).sum())
        return max((gain + SPREAD / self.goal.mean * spread) / max(moves + ACROSS * across, FREE), 0.0)

    def free_slots(self) -> list[int]:
        """Slots that can be given to another expert."""
        spare = [e < 0 or (self.now_S == e).sum() > self.limits.min_replicas for e in self.now_S.tolist()]
        return np.flatnonzero(spare).tolist()

    def top_slots(self) -> list[int]:
        """Slots of the busiest rank with an expert."""
        return [s for s in np.flatnonzero(self.floor.rank_S == self.goal.top).tolist() if self.now_S[s] >= 0]

    def seating(self) -> Seating:
        """The kernels' tables."""
        tables = empty_seating(EXPERTS, self.floor)
        remember(self.start_S, self.load_E, self.home_E, self.floor, tables)
        sit(self.now_S, self.floor, tables)
        return tables


def random_floor(rng: np.random.Generator) -> Floor:
    """Two to five ranks of unequal slots and speeds on one to three nodes."""
    ranks = int(rng.integers(2, 6))
    slots_R = rng.integers(2, 5, ranks)
    slots_R[0] += max(EXPERTS + 2 - slots_R.sum(), 0)
    return floor_of(
        slots_R, np.sort(np.arange(ranks) * int(rng.integers(1, 4)) // ranks), rng.choice([1.0, 2.0], ranks)
    )


def random_row(rng: np.random.Generator, floor: Floor) -> np.ndarray:
    """(S,) int64 every expert in a slot, then replicas, duplicates on a rank and empty slots."""
    row = np.concatenate([np.arange(EXPERTS), rng.integers(-1, EXPERTS, len(floor.rank_S) - EXPERTS)])
    return rng.permutation(row).astype(np.int64)


def scene(seed: int, number: int) -> Scene:
    """A random one: a start, and a row a few changes away that puts no further expert on a rank twice."""
    rng = np.random.default_rng((seed, number))
    floor = random_floor(rng)
    start_S, load_E = random_row(rng, floor), np.rint(rng.lognormal(3, 1, EXPERTS)) + 1
    now_S = start_S.copy()
    for _ in range(int(rng.integers(0, 4))):
        slot, expert = int(rng.integers(len(now_S))), int(rng.integers(EXPERTS))
        here = now_S[floor.rank_S == floor.rank_S[slot]]
        if expert not in here and (now_S[slot] < 0 or (now_S == now_S[slot]).sum() > 1):
            now_S[slot] = expert
    mean = float(load_E.sum() / (1 / floor.slow_R).sum())
    home_E = np.where(rng.random(EXPERTS) < 0.2, rng.integers(0, floor.node_R[-1] + 1, EXPERTS), -1)
    limits = Limits(*(int(rng.choice([1, 2, 3, 99])) for _ in range(3)), 1)
    made = Scene(start_S, now_S, load_E, home_E, floor, Goal(0, 0.0, mean, 0.0), limits)
    time_R = made.times(now_S)
    target = float(mean + rng.random() * 0.8 * max(time_R.max() - mean, 0.0))
    return made._replace(goal=Goal(int(time_R.argmax()), target, mean, float(load_E.max() * rng.uniform(0.3, 1.5))))


def all_swaps(s: Scene) -> Iterator[float]:
    """Of a slot of the busiest rank with one of a rank below the target, which does not become the busiest."""
    time_R = s.times(s.now_S)
    for a, b in itertools.product(s.top_slots(), range(len(s.now_S))):
        i, j, h = int(s.now_S[a]), int(s.now_S[b]), int(s.floor.rank_S[b])
        if h == s.goal.top or time_R[h] >= s.goal.target or not s.may_get(i, h):
            continue
        after_S = s.now_S.copy()
        after_S[[a, b]] = j, i
        if (j < 0 or s.may_get(j, s.goal.top)) and s.times(after_S)[h] < time_R[s.goal.top]:
            yield s.worth({a: j, b: i})


def all_repoints(s: Scene) -> Iterator[float]:
    """A free slot elsewhere gets an expert of the busiest rank."""
    for a, b in itertools.product(s.top_slots(), s.free_slots()):
        r = int(s.floor.rank_S[b])
        if r != s.goal.top and s.may_get(int(s.now_S[a]), r):
            yield s.worth({b: int(s.now_S[a])})


def all_lightenings(s: Scene) -> Iterator[float]:
    """A free slot of the busiest rank gets a lighter expert."""
    count_E = np.array([(s.now_S == e).sum() for e in range(EXPERTS)])
    for b, i in itertools.product(s.top_slots(), range(EXPERTS)):
        j = int(s.now_S[b])
        is_lighter = s.load_E[i] / (count_E[i] + 1) < s.load_E[j] / count_E[j]
        if is_lighter and b in s.free_slots() and s.may_get(i, s.goal.top):
            yield s.worth({b: i})


def all_relays(s: Scene) -> Iterator[float]:
    """A slot of a rank below the target gets an expert of the busiest rank, a free slot what it held."""
    time_R = s.times(s.now_S)
    for a, b, t in itertools.product(s.top_slots(), range(len(s.now_S)), s.free_slots()):
        i, j, h, r = int(s.now_S[a]), int(s.now_S[b]), int(s.floor.rank_S[b]), int(s.floor.rank_S[t])
        if time_R[h] >= s.goal.target or j < 0 or s.held(s.now_S)[h].count(j) > 1 or r == h:
            continue
        if s.now_S[t] not in (i, j) and s.may_get(i, h) and s.may_get(j, r):
            yield s.worth({b: i, t: j})


ALL = {"swap": all_swaps, "repoint": all_repoints, "lightening": all_lightenings, "relay": all_relays}


def best_step(kind: str, s: Scene) -> Step:
    """What the kernel finds."""
    tables, loss_S = s.seating(), np.empty(len(s.now_S))
    if kind == "swap":
        return Step(*best_swap(s.goal, s.floor, tables, s.limits, NO_STEP))
    set_losses(s.goal, s.floor, tables, s.limits, loss_S)
    free, ranks = Free(np.flatnonzero(loss_S < np.inf), loss_S), len(s.floor.node_R)
    assert free.slot_F.tolist() == s.free_slots()
    trial = Trial(np.zeros(ranks), np.zeros(4 * ranks, np.int64), np.zeros(1, np.int64))
    kernel = {"repoint": best_repoint, "lightening": best_lightening, "relay": best_relay}[kind]
    found = Step(*kernel(s.goal, s.floor, tables, s.limits, free, trial, NO_STEP))
    assert not trial.change_R.any()
    return found


def changes_of(step: Step, s: Scene) -> dict[int, int]:
    """Slots and what they get."""
    if step.a >= 0:
        return {step.a: int(s.now_S[step.b]), step.b: int(s.now_S[step.a])}
    return {step.b: step.i} | ({step.s: int(s.now_S[step.b])} if step.s >= 0 else {})


@pytest.mark.parametrize("seed", [0, TODAY])
@pytest.mark.parametrize(("kind", "least"), [("swap", 0.98), ("repoint", 0.94), ("lightening", 0.98), ("relay", 0.87)])
def test_steps_are_worth_what_they_say_and_few_are_better(kind: str, least: float, seed: int) -> None:
    """Never more than the best of all steps of the kind, exactly what is claimed, and nearly always the best.

    What dismisses steps early does not see everything where two experts share ranks or ranks differ in speed.
    """
    print("seed", seed)
    worth = []
    for number in range(SCENES):
        s = scene(seed, number)
        step, best = best_step(kind, s), max(ALL[kind](s), default=0.0)
        if step.score > 0:
            assert step.score == pytest.approx(s.worth(changes_of(step, s))), number
        assert step.score <= best + 1e-9, number
        if best > 1e-9:
            worth.append(step.score / best)
    assert len(worth) >= SCENES // 4
    assert np.mean(np.array(worth) > 1 - 1e-9) >= (least if seed == 0 else least - 0.2)


def holders(tables: Seating) -> list[list[int]]:
    """Ranks that hold each expert."""
    return [sorted(row[:count].tolist()) for row, count in zip(tables.holder_EH, tables.holders_E, strict=True)]


@pytest.mark.parametrize("seed", [0, TODAY])
def test_tables_follow_the_slots(seed: int) -> None:
    """After any swaps and re-pointed slots, of experts in two slots of a rank too, they are those of the slots."""
    print("seed", seed)
    for number in range(SCENES):
        s, rng = scene(seed, number), np.random.default_rng((seed, number, 3))
        tables = s.seating()
        for _ in range(6):
            now_S, (a, b), i = tables.slots_S, rng.permutation(len(s.now_S))[:2], int(rng.integers(EXPERTS))
            if now_S[a] >= 0 and s.floor.rank_S[a] != s.floor.rank_S[b]:
                swap(a, b, s.floor, tables)
            elif now_S[a] < 0 or (now_S == now_S[a]).sum() > 1:
                repoint(a, i, s.floor, tables)
            set_times(s.floor, tables)
            fresh = s._replace(now_S=now_S.copy()).seating()
            assert holders(tables) == holders(fresh), number
            for table in ("on_ER", "count_E", "moves", "fetched_R"):
                assert getattr(tables, table).tolist() == getattr(fresh, table).tolist(), (number, table)
            assert tables.time_R == pytest.approx(fresh.time_R), number


def share_of(row_S: np.ndarray, e: int, load_E: np.ndarray) -> float:
    """Load of one slot of an expert, 0 for an empty slot."""
    return 0.0 if e < 0 else float(load_E[e] / (row_S == e).sum())


@pytest.mark.parametrize("seed", [0, TODAY])
def test_experts_without_a_slot_are_seated_where_they_disturb_least(seed: int) -> None:
    """Heaviest first, in an empty slot or one whose expert has others: where rank and displaced load are done first."""
    print("seed", seed)
    for number in range(SCENES):
        s = scene(seed, number)
        rng = np.random.default_rng((seed, number, 1))
        row_S, load_E = s.start_S.copy(), s.load_E + rng.random(EXPERTS)
        row_S[np.isin(row_S, rng.choice(EXPERTS, 3, replace=False))] = rng.integers(-1, EXPERTS)
        found_S, wanted_S, left = row_S.copy(), row_S.copy(), 0
        homeless = seat_missing(found_S, load_E, s.home_E, s.floor, empty_seating(EXPERTS, s.floor))
        for e in np.argsort(-load_E).tolist():
            if e in wanted_S:
                continue
            time_R, choices = s._replace(load_E=load_E).times(wanted_S), []
            for b, j in enumerate(wanted_S.tolist()):
                r, lost = int(s.floor.rank_S[b]), share_of(wanted_S, j, load_E)
                at_home = s.home_E[e] < 0 or s.home_E[e] == s.floor.node_R[r]
                if at_home and (j < 0 or (wanted_S == j).sum() > 1):
                    choices.append((time_R[r] + (load_E[e] - lost) * s.floor.slow_R[r] + lost, b))
            if choices:
                wanted_S[min(choices)[1]] = e
            left += not choices
        assert found_S.tolist() == wanted_S.tolist(), number
        assert homeless == left


@pytest.mark.parametrize("seed", [0, TODAY])
def test_empty_slots_get_what_relieves_most(seed: int) -> None:
    """The largest share that leaves the busiest rank the busiest, else the lightest part; limits on moves are kept."""
    print("seed", seed)
    for number in range(SCENES):
        s = scene(seed, number)
        s = s._replace(load_E=s.load_E + np.random.default_rng((seed, number, 2)).random(EXPERTS))
        found_S, wanted_S, tables = s.now_S.copy(), s.now_S.copy(), empty_seating(EXPERTS, s.floor)
        imbalance, _ = fill_empty(s.start_S, found_S, s.load_E, s.home_E, s.floor, tables, s.limits)
        for b in np.flatnonzero(s.now_S < 0).tolist():
            now, r = s._replace(now_S=wanted_S.copy()), int(s.floor.rank_S[b])
            fetched_R, across = now.fetched(wanted_S)
            time_R, choices = now.times(wanted_S), []
            for e in range(EXPERTS):
                wanted_S[b] = e
                new_R, new_across = now.fetched(wanted_S)
                wanted_S[b] = -1
                is_move = new_R.sum() > fetched_R.sum()
                too_far = new_across > across and across >= s.limits.across
                if not now.may_get(e, r) or (is_move and fetched_R.sum() >= s.limits.moves) or too_far:
                    continue
                part = s.load_E[e] / ((wanted_S == e).sum() + 1)
                fits = time_R[r] + part * s.floor.slow_R[r] <= time_R.max()
                choices.append((share_of(wanted_S, e, s.load_E) if fits else -1.0 - part, e))
            if choices:
                wanted_S[b] = max(choices)[1]
        assert found_S.tolist() == wanted_S.tolist(), number
        assert imbalance == pytest.approx(s.times(wanted_S).max() / s.goal.mean, rel=0.1)


@pytest.mark.parametrize("seed", [0, 1, TODAY])
def test_ranks_of_unequal_room_are_packed(seed: int) -> None:
    """Every slot of every rank has an expert, none twice on a rank, no slower than longest first by hand."""
    print("seed", seed)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        capacity_R = rng.permutation([1, 2, 3, 4, int(rng.integers(1, 6))])
        speed_R, load_E = rng.choice([0.5, 1.0, 2.0], 5), np.rint(rng.lognormal(3, 1, int(capacity_R.sum()))) + 1
        row_S = pack_with_replicas(load_E, capacity_R, speed_R)
        assert sorted(row_S.tolist()) == list(range(len(load_E)))
        time_R, held_R = np.zeros(5), np.zeros(5, int)
        for load in sorted(load_E.tolist(), reverse=True):
            rank = min(np.flatnonzero(held_R < capacity_R), key=lambda r: time_R[r] + load / speed_R[r])
            time_R[rank] += load / speed_R[rank]
            held_R[rank] += 1
        packed_R = np.array([load_E[held].sum() for held in np.split(row_S, np.cumsum(capacity_R)[:-1])]) / speed_R
        assert packed_R.max() <= time_R.max() * (1 + 1e-9)
        crowded_S = pack_with_replicas(load_E[:6], capacity_R, speed_R)
        for held in np.split(crowded_S, np.cumsum(capacity_R)[:-1]):
            assert len(set(held.tolist()) - {-1}) == (held >= 0).sum() == min(len(held), 6)
