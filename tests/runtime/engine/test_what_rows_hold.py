"""What prompts take over is there: rows, their memory and what is copied, acted out beside a scheduler."""

import numpy as np
import pytest

from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.requests import Request, RunningSequence
from moeplace.runtime.engine.scheduler import Scheduler
from moeplace.runtime.kv.row_pool import PAGE, Prefix
from tests.seeds import FIXED_AND_TODAY


class ActedOut:
    """The tokens whose K/V rows have, as an executor would leave them.

    Attributes:
        tokens_reused: that did not run.
        keeps_at_home: share of passes after which K/V of a sequence are not on all ranks.
    """

    def __init__(self, scheduler: Scheduler, pages: int | None) -> None:
        self.scheduler, self._pages = scheduler, pages
        self.rows: dict[tuple[int, int], list[int]] = {}
        self.tokens_reused, self.keeps_at_home = 0, 0.0

    def _place(self, home: int, row: int) -> tuple[int, int]:
        return (0 if self.scheduler.replicated else home), row

    def run(self, batch: Batch, rng: np.random.Generator) -> None:
        """A pass: memory is given back, beginnings are copied, tokens run, new ones are drawn."""
        for home, trim in batch.trims:
            self.rows[self._place(home, trim.row)] = self.rows.get(self._place(home, trim.row), [])[: trim.end]
        for sequence in batch.sequences:
            self._take_over(sequence)
        for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
            assert length > 0
            end = sequence.cached + length
            held = self.rows.get(self._place(sequence.home, sequence.row), [])
            assert held[: sequence.cached] == sequence.token_ids[: sequence.cached]
            self.rows[self._place(sequence.home, sequence.row)] = sequence.token_ids[:end] + held[end:]
            sequence.cached = end
            if not rng.random() < self.keeps_at_home:
                sequence.replicated = end
            if not sequence.num_missing:
                sequence.token_ids.append(int(rng.integers(4)))
        self._check_memory(batch)
        for sequence in list(batch.sequences):
            if sequence.finish_reason(()):
                self.scheduler.release(sequence)

    def _take_over(self, sequence: RunningSequence) -> None:
        if sequence.prefix is None:
            return
        row, positions = sequence.prefix
        held = self.rows.get(self._place(sequence.home, row), [])
        assert held[:positions] == sequence.token_ids[:positions]
        own = self._place(sequence.home, sequence.row)
        self.rows[own] = held[:positions] + self.rows.get(own, [])[positions:]
        sequence.cached, sequence.replicated, sequence.prefix = positions, positions, None
        self.tokens_reused += positions

    def _check_memory(self, batch: Batch) -> None:
        """Pages that are known to be in use; what lies beyond a tenant's own in its row shares its last page."""
        if self._pages is None:
            return
        taken: dict[int, int] = {}
        tenants = {self._place(s.home, s.row): s.cached for s in self.scheduler.running}
        for place, held in self.rows.items():
            taken[place[0]] = taken.get(place[0], 0) + -(-tenants.get(place, len(held)) // PAGE)
        assert max(taken.values(), default=0) <= self._pages


@pytest.mark.parametrize("seed", FIXED_AND_TODAY)
@pytest.mark.parametrize("pages", [None, 8, 20])
@pytest.mark.parametrize("spare_rows", [0, 3])
def test_what_is_taken_over_is_there(seed: int, pages: int | None, spare_rows: int) -> None:
    """Prompts of a few stems come, grow, end, are cancelled and come back longer; memory may be short. All end, no
    more run than there are places, and nobody's memory exceeds what there is."""
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    replicated, places, positions = bool(rng.integers(2)), int(rng.integers(1, 7)), 8 * PAGE
    scheduler = Scheduler(
        num_ranks=int(rng.integers(1, 3)),
        rows=places + spare_rows,
        positions=positions,
        replicated=replicated,
        max_prefill_tokens=int(rng.integers(4, 80)),
        reuses_prefixes=True,
        pages=pages,
        spare_rows=spare_rows,
    )
    world = ActedOut(scheduler, pages)
    world.keeps_at_home = 0.5 * rng.integers(2)
    stems = [rng.integers(4, size=rng.integers(1, 60)).tolist() for _ in range(3)]
    for number in range(120):
        stem = stems[rng.integers(len(stems))]
        prompt = (*stem[: rng.integers(1, len(stem) + 1)], *rng.integers(4, size=rng.integers(30)).tolist())
        stems.append(list(prompt)) if rng.random() < 0.4 else None
        prompt = prompt[: positions - 16]
        scheduler.add(Request(str(number), prompt, int(rng.integers(1, 16)), stop_ids=()))
        for _ in range(int(rng.choice([0, 0, 0, 1, 2, 9]))):
            world.run(scheduler.next_batch(), rng)
            assert len(scheduler.running) <= places * (1 if replicated else scheduler.num_ranks)
        if rng.random() < 0.2 and scheduler.running:
            scheduler.cancel(scheduler.running[rng.integers(len(scheduler.running))].request.request_id)
    for _ in range(4000):
        if scheduler.is_idle:
            break
        world.run(scheduler.next_batch(), rng)
    assert scheduler.is_idle
    assert world.tokens_reused


def serve(scheduler: Scheduler, world: ActedOut, name: str, prompt: list[int]) -> tuple[list[int], Prefix | None]:
    """Its tokens, and what it took over."""
    scheduler.add(Request(name, tuple(prompt), max_new_tokens=2, stop_ids=()))
    sequence, prefix, rng = None, None, np.random.default_rng(0)
    while not scheduler.is_idle:
        batch = scheduler.next_batch()
        if sequence is None:
            (sequence,) = batch.sequences
            prefix = sequence.prefix
        world.run(batch, rng)
    assert sequence is not None
    return sequence.token_ids, prefix


def make_world(**changes: int) -> ActedOut:
    options = {"num_ranks": 1, "rows": 3, "positions": 128, "replicated": False, "max_prefill_tokens": 200, **changes}
    scheduler = Scheduler(reuses_prefixes=True, **options)  # type: ignore[arg-type]
    return ActedOut(scheduler, changes.get("pages"))


def test_conversations_with_one_beginning_keep_their_own() -> None:
    """A second one copies what both share, so that the first one goes on where it stopped; and a third."""
    world, system = make_world(), list(range(40))
    turns = {}
    for number, name in enumerate("abc"):
        turns[name], prefix = serve(world.scheduler, world, name, [*system, *[100 + number] * 30])
        assert (prefix is not None) == (number > 0)
    for number, name in enumerate("abc"):
        _, prefix = serve(world.scheduler, world, name, [*turns[name], 7, 7, 7])
        assert prefix == Prefix(number, len(turns[name]) - 1)


def test_what_was_of_use_stays_longest() -> None:
    """A row that is copied from counts as used; the one that nobody asked for goes first."""
    world, system = make_world(), list(range(40))
    serve(world.scheduler, world, "used", [*system, *[100] * 30])
    serve(world.scheduler, world, "unused", [50] * 40)
    serve(world.scheduler, world, "asks", [*system, *[101] * 30])
    serve(world.scheduler, world, "other", [60] * 40)
    assert serve(world.scheduler, world, "again", [*system, *[100] * 30, 1])[1] == Prefix(0, 70)
    assert serve(world.scheduler, world, "gone", [50] * 40)[1] is None


def test_without_memory_for_a_copy_the_row_itself_is_taken() -> None:
    """Pages for one such sequence: what follows the common beginning is lost, and nothing else happens."""
    world, system = make_world(pages=8), list(range(40))
    serve(world.scheduler, world, "a", [*system, *[100] * 40])
    assert serve(world.scheduler, world, "b", [*system, *[101] * 40])[1] == Prefix(0, 40)
    assert serve(world.scheduler, world, "c", [*system, *[100] * 40])[1] == Prefix(0, 40)


def test_spare_rows_keep_what_full_places_would_drop() -> None:
    """One place, three conversations in turn: with spare rows each finds its own, as far as memory goes."""
    for spare_rows, pages, found in ((0, 40, 0), (2, 40, 3), (2, 9, 0)):
        world = make_world(rows=1 + spare_rows, spare_rows=spare_rows, pages=pages)
        turns = {name: serve(world.scheduler, world, name, [ord(name)] * 60)[0] for name in "abc"}
        hits = [serve(world.scheduler, world, name, [*turns[name], 7])[1] for name in "abc"]
        assert sum(hit is not None for hit in hits) == found, (spare_rows, pages)


def test_a_row_stays_lent_to_one_that_waits() -> None:
    """Passes later it is copied from: until then another prompt does without its place."""
    world, system, rng = make_world(num_ranks=2, rows=4, replicated=True), list(range(40)), np.random.default_rng(0)
    serve(world.scheduler, world, "lender", [*system, *[100] * 40])
    world.keeps_at_home = 1.0
    prompts = {"leader": [*system, *[5] * 20], "waits": [*system, *[5] * 20, 6], "other": [8] * 5, "late": [9] * 5}
    for name, prompt in prompts.items():
        world.scheduler.add(Request(name, tuple(prompt), max_new_tokens=9, stop_ids=()))
    for _ in range(2):
        batch = world.scheduler.next_batch()
        assert {sequence.request.request_id for sequence in batch.sequences} == {"leader", "other"}
        world.run(batch, rng)
    batch = world.scheduler.next_batch()
    assert {s.request.request_id: s.prefix for s in batch.sequences if s.prefix} == {"waits": Prefix(0, 40)}
    world.run(batch, rng)
    assert [request.request_id for request in world.scheduler.waiting] == ["late"]
    batch = world.scheduler.next_batch()
    assert [s.row for s in batch.sequences if s.request.request_id == "late"] == [0]
