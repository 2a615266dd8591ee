"""The scheduler under any arrivals: nobody starves, the budget holds, and all ranks plan alike."""

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.strategies import DrawFn

from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.scheduler import Scheduler
from moeplace.runtime.kv.row_pool import PAGE

ARRIVALS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=12
)
"""(passes since the one before, prompt tokens, tokens to add, beginning of the prompt) of requests."""
EVERYWHERE, NOTHING = 0, -1


@st.composite
def schedulers(draw: DrawFn, **options: Any) -> tuple[Scheduler, Scheduler]:
    """Two of one kind, as two ranks have them."""
    drawn = {
        "num_ranks": draw(st.integers(1, 3)),
        "rows": draw(st.integers(1, 4)),
        "positions": 64,
        "replicated": draw(st.booleans()),
        "max_prefill_tokens": draw(st.sampled_from([1, 2, 3, 7, 16, 100])),
        "cuts_prompts": draw(st.integers(0, 3)) > 0,
        **options,
    }
    return Scheduler(**drawn), Scheduler(**drawn)


def prompt_of(number: int, length: int, beginning: int) -> tuple[int, ...]:
    """Alike in all tokens but the last few where the beginning is; of beginning 0 like no other."""
    shared = max(length - number % 4, 0) if beginning else 0
    return (beginning,) * shared + tuple(100 + number for _ in range(length - shared))


class Rows:
    """What is in the rows of a cache: the tokens whose K/V they are. A pass does to it what executors do."""

    def __init__(self, scheduler: Scheduler, pages: int | None = None) -> None:
        """`pages`: what a pass may leave in memory in each of the caches."""
        self._scheduler, self._pages = scheduler, pages
        self._rows: dict[tuple[int, int], list[int]] = {}
        self.reused = self.passes = 0

    def _row(self, home: int, row: int) -> list[int]:
        place = (EVERYWHERE if self._scheduler.replicated else home, row)
        return self._rows.setdefault(place, [NOTHING] * self._scheduler.positions)

    def carry_out(self, batch: Batch) -> None:
        """What a pass leaves; every sequence must have its own tokens in its row."""
        self.passes += 1
        for home, trim in batch.trims:
            row = self._row(home, trim.row)
            row[trim.end :] = [NOTHING] * (len(row) - trim.end)
        for sequence in batch.sequences:
            if sequence.prefix is not None:
                end = sequence.prefix.positions
                self._row(sequence.home, sequence.row)[:end] = self._row(sequence.home, sequence.prefix.row)[:end]
                sequence.cached, sequence.prefix = end, None
                self.reused += end
        for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
            row, end = self._row(sequence.home, sequence.row), sequence.cached + length
            row[sequence.cached : end] = sequence.token_ids[sequence.cached : end]
            sequence.cached = sequence.replicated = end
        if self._pages is not None:
            for home in range(self._scheduler.num_ranks):
                rows = [row for (there, _), row in self._rows.items() if there == home]
                ends = [max((n + 1 for n, token in enumerate(row) if token != NOTHING), default=0) for row in rows]
                assert sum(-(-end // PAGE) for end in ends) <= self._pages
        for sequence in batch.sequences:
            assert self._row(sequence.home, sequence.row)[: sequence.cached] == sequence.token_ids[: sequence.cached]
            if not sequence.num_missing:
                sequence.token_ids.append(7)
            if sequence.finish_reason(()) is not None:
                self._scheduler.release(sequence)


def look(scheduler: Scheduler) -> list[tuple[str, int, int, int]]:
    return [(s.request.request_id, s.home, s.row, s.cached) for s in scheduler.running]


@given(pair=schedulers(), arrivals=ARRIVALS)
def test_nobody_starves(pair: tuple[Scheduler, Scheduler], arrivals: list[tuple[int, int, int, int]]) -> None:
    """In every pass each sequence that has its prompt gets a token, and the oldest prompts proceed, in their order and
    as far as the budget goes; two ranks plan alike; all end, after no more passes than there are tokens."""
    scheduler, twin = pair
    cuts, budget = scheduler._cuts_prompts, scheduler.max_prefill_tokens
    due = [sum(gap for gap, *_ in arrivals[: n + 1]) for n in range(len(arrivals))]
    rows = [Rows(one) for one in pair]
    first_pass: dict[str, int] = {}
    number, total = 0, sum(prompt + new for _, prompt, new, _ in arrivals)
    while number <= due[-1] or not scheduler.is_idle:
        for n, (_, prompt, new, beginning) in enumerate(arrivals):
            if due[n] == number:
                for one in pair:
                    one.add(Request(str(n), prompt_of(n, prompt, beginning), new, stop_ids=()))
        running = {s.request.request_id: s.num_missing for s in scheduler.running}
        ready = {name for name, missing in running.items() if missing == 1}
        waiting = [request.request_id for request in scheduler.waiting]
        foreseen = sorted(scheduler.foresee().prompt_ids, key=int)
        batch, copy = scheduler.next_batch(), twin.next_batch()
        assert look(scheduler) == look(twin)
        assert batch.lengths == copy.lengths
        names = [s.request.request_id for s in batch.sequences]
        served = dict(zip(names, batch.lengths, strict=True))
        assert len(names) == len(set(names))
        assert all(served[name] == 1 for name in ready)
        assert foreseen == sorted(set(names) - ready, key=int)
        assert batch.has_prompts == bool(foreseen)
        free = scheduler.rows * (1 if scheduler.replicated else scheduler.num_ranks) - len(running)
        could = [name for name in running if name not in ready] + waiting[:free]
        assert foreseen == could[: len(foreseen)]  # first come, first served
        assert bool(foreseen) == bool(could)  # they proceed
        prompts, room = sum(served[name] for name in foreseen), max(budget - len(ready), 1)
        missing = [running.get(name, arrivals[int(name)][1]) for name in could]
        if cuts:
            assert prompts == min(sum(missing), room)
        else:
            assert [served[name] for name in foreseen] == missing[: len(foreseen)]
            assert prompts <= room or len(foreseen) == 1
            assert len(foreseen) == len(could) or prompts + missing[len(foreseen)] > room
        for name in foreseen:
            first_pass.setdefault(name, number)
        for one, plan in zip(rows, (batch, copy), strict=True):
            one.carry_out(plan)
        number += 1
        assert number <= due[-1] + 2 + total  # each pass adds a token, or takes one of a prompt
    assert [int(name) for name in first_pass] == sorted(range(len(arrivals)))


@pytest.mark.parametrize("pages", [None, 4, 6])
@given(
    data=st.data(),
    arrivals=ARRIVALS,
    cancelled=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 11), st.booleans()), max_size=6),
)
def test_what_is_taken_over_is_what_would_have_been_run(
    pages: int | None,
    data: st.DataObject,
    arrivals: list[tuple[int, int, int, int]],
    cancelled: list[tuple[int, int, bool]],
) -> None:
    """Prompts that begin alike, rows that change hands, cancellations also between the plan and the pass, and memory
    for one sequence of full length or little more: a row has the tokens of its sequence, the last one of a prompt
    runs, no more memory is used, all ranks do the same, and everybody ends with all tokens."""
    pair = data.draw(schedulers(cuts_prompts=True, reuses_prefixes=data.draw(st.booleans()), pages=pages))
    due = [sum(gap for gap, *_ in arrivals[: n + 1]) for n in range(len(arrivals))]
    rows, number = [Rows(one, pages) for one in pair], 0
    while number <= due[-1] or not pair[0].is_idle:
        for one, held in zip(pair, rows, strict=True):
            for n, (_, prompt, new, beginning) in enumerate(arrivals):
                if due[n] == number:
                    one.add(Request(str(n), prompt_of(n, prompt, beginning), new, stop_ids=()))
            for when, who, is_late in cancelled:
                if when == number:
                    if is_late:
                        one.foresee()
                    one.cancel(str(who))
            batch = one.next_batch()
            assert all(length >= 1 for length in batch.lengths)
            assert batch.num_tokens <= max(one.max_prefill_tokens, len(one.running) + 1)
            held.carry_out(batch)
        assert look(pair[0]) == look(pair[1])
        number += 1
        assert number < 1000
    assert rows[0].reused == rows[1].reused
