"""The scheduler under any arrivals: nobody starves, the budget holds, and all ranks plan alike."""

import hypothesis.strategies as st
from hypothesis import given
from hypothesis.strategies import DrawFn

from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.scheduler import Scheduler

ARRIVALS = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=12)
"""(passes since the one before, prompt tokens, tokens to add) of requests."""


@st.composite
def schedulers(draw: DrawFn) -> tuple[Scheduler, Scheduler]:
    """Two of one kind, as two ranks have them."""
    options = {
        "num_ranks": draw(st.integers(1, 3)),
        "rows": draw(st.integers(1, 4)),
        "positions": 64,
        "replicated": draw(st.booleans()),
        "max_prefill_tokens": draw(st.sampled_from([1, 2, 3, 7, 16, 100])),
        "cuts_prompts": draw(st.integers(0, 3)) > 0,
    }
    return Scheduler(**options), Scheduler(**options)


def carry_out(scheduler: Scheduler, batch: Batch) -> None:
    """What a pass leaves."""
    for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
        sequence.cached += length
        if not sequence.num_missing:
            sequence.token_ids.append(7)
        if sequence.finish_reason(()) is not None:
            scheduler.release(sequence)


def look(scheduler: Scheduler) -> list[tuple[str, int, int, int]]:
    return [(s.request.request_id, s.home, s.row, s.cached) for s in scheduler.running]


@given(pair=schedulers(), arrivals=ARRIVALS)
def test_nobody_starves(pair: tuple[Scheduler, Scheduler], arrivals: list[tuple[int, int, int]]) -> None:
    """In every pass each sequence that has its prompt gets a token, and the oldest prompt proceeds; what is seated
    gets its first token in as many passes as the tokens before it need."""
    scheduler, twin = pair
    cuts, budget = scheduler._cuts_prompts, scheduler.max_prefill_tokens
    due = [sum(gap for gap, _, _ in arrivals[: n + 1]) for n in range(len(arrivals))]
    first_pass: dict[str, int] = {}
    number, total = 0, sum(prompt + new for _, prompt, new in arrivals)
    while number <= due[-1] or not scheduler.is_idle:
        for n, (_, prompt, new) in enumerate(arrivals):
            if due[n] == number:
                for one in pair:
                    one.add(Request(str(n), (1,) * prompt, new, stop_ids=()))
        running = {s.request.request_id: s.num_missing for s in scheduler.running}
        ready = {name for name, missing in running.items() if missing == 1}
        waiting = [request.request_id for request in scheduler.waiting]
        foreseen = scheduler.prompts_of_next_pass()
        batch, copy = scheduler.next_batch(), twin.next_batch()
        assert look(scheduler) == look(twin)
        assert batch.lengths == copy.lengths
        names = [s.request.request_id for s in batch.sequences]
        served = dict(zip(names, batch.lengths, strict=True))
        assert len(names) == len(set(names))
        assert all(served[name] == 1 for name in ready)
        assert sorted(foreseen) == sorted(set(names) - ready)
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
        for one, plan in zip(pair, (batch, copy), strict=True):
            carry_out(one, plan)
        number += 1
        assert number <= due[-1] + 2 + total  # each pass adds a token, or takes one of a prompt
    assert [int(name) for name in first_pass] == sorted(range(len(arrivals)))
