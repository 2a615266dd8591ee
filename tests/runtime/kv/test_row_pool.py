"""Rows that are free, and what they hold: which one is taken, and which beginning of a prompt is found."""

import hypothesis.strategies as st
from hypothesis import given

from moeplace.runtime.engine.requests import Request, RunningSequence
from moeplace.runtime.engine.scheduler import Scheduler
from moeplace.runtime.kv.row_pool import LEAST_PREFIX, PAGE, Holding, Prefix, RowPool, Trim

LONG = tuple(range(40))


def test_what_is_missed_least_is_taken_first() -> None:
    """The lowest empty row; then the one that has been free for longest; a short sequence leaves nothing."""
    pool = RowPool(4)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 3]
    for row in (3, 1, 0, 2):
        pool.give_back(row, LONG if row != 1 else LONG[: LEAST_PREFIX - 1])
    assert len(pool) == 4
    assert [pool.take() for _ in range(4)] == [1, 3, 0, 2]


def test_a_row_that_is_asked_for_is_taken() -> None:
    """And forgotten, until it comes back."""
    pool = RowPool(2)
    pool.give_back(pool.take(1), LONG)
    assert pool.find(LONG, ()) == Prefix(1, len(LONG) - 1)
    assert pool.take(1) == 1
    assert not pool.is_free(1)
    assert pool.find(LONG, ()) is None


def test_the_last_token_of_a_prompt_is_always_run() -> None:
    """Its hidden state is wanted; everything before it can be taken over, of a longer sequence too."""
    running = [Holding(5, list(LONG), 40)]
    pool = RowPool(1)
    assert pool.find(LONG, running) == Prefix(5, 39)
    assert pool.find(LONG[:30], running) == Prefix(5, 29)
    assert pool.find(LONG[: LEAST_PREFIX + 1], running) == Prefix(5, LEAST_PREFIX)
    assert pool.find(LONG[:LEAST_PREFIX], running) is None
    assert pool.find(LONG, [Holding(5, list(LONG), LEAST_PREFIX - 1)]) is None


def test_the_longest_is_found_and_a_free_row_preferred() -> None:
    """Then nothing is copied; among equal ones the lowest row."""
    pool = RowPool(9)
    assert [pool.take(row) for row in (1, 3)] == [1, 3]
    for row, tokens in ((7, LONG[:25]), (8, LONG[:25]), (6, LONG[:20])):
        pool.give_back(pool.take(row), tokens)
    assert pool.find(LONG, [Holding(1, list(LONG), 25)]) == Prefix(7, 25)
    assert pool.find(LONG, [Holding(1, list(LONG), 26)]) == Prefix(1, 26)
    assert pool.find(LONG, [Holding(3, list(LONG), 26), Holding(1, list(LONG), 26)]) == Prefix(1, 26)


def test_only_memory_that_is_given_back_is_cleared() -> None:
    """By the page: what shares one with what stays is left alone, and nothing is cleared twice."""
    pool = RowPool(2, pages=4)
    assert pool.take_trims() == [Trim(0, 0), Trim(1, 0)]
    row = pool.take()
    for left, trims in ((2 * PAGE - 3, []), (PAGE + 1, []), (PAGE, [Trim(row, PAGE)]), (0, [Trim(row, 0)])):
        assert pool.claim(row, 2 * PAGE if left > PAGE else PAGE)
        pool.give_back(row, LONG[:left])
        assert pool.take_trims() == trims
        assert pool.take_trims() == []
        assert pool.take(row, keep=left) == row
        assert pool.take_trims() == []


@given(
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=60),
    held=st.lists(st.lists(st.integers(0, 1), max_size=60), max_size=4),
    shared=st.lists(st.integers(0, 60), min_size=4, max_size=4),
)
def test_what_is_found_is_the_longest(prompt: list[int], held: list[list[int]], shared: list[int]) -> None:
    """By comparing token by token."""
    rows = [prompt[:count] + tokens for count, tokens in zip(shared, held, strict=False)]
    most = 0
    for tokens in rows:
        common = 0
        while common < min(len(prompt) - 1, len(tokens)) and prompt[common] == tokens[common]:
            common += 1
        most = max(most, common)
    found = RowPool(1).find(prompt, [Holding(row, tokens, len(tokens)) for row, tokens in enumerate(rows)])
    assert (0 if found is None else found.positions) == (most if most >= LEAST_PREFIX else 0)


def make_scheduler(**changes: int) -> Scheduler:
    options = {"num_ranks": 2, "rows": 3, "positions": 64, "replicated": False, "max_prefill_tokens": 100, **changes}
    return Scheduler(reuses_prefixes=True, **options)  # type: ignore[arg-type]


def serve_one(scheduler: Scheduler, name: str, tokens: tuple[int, ...]) -> RunningSequence:
    """Its prompt has run."""
    scheduler.add(Request(name, tokens, max_new_tokens=2))
    (sequence,) = [s for s in scheduler.next_batch().sequences if s.request.request_id == name]
    sequence.cached, sequence.prefix = len(tokens), None
    sequence.token_ids.append(0)
    return sequence


def test_a_prompt_goes_where_its_beginning_is() -> None:
    """To the home that holds it, unless that has two sequences more than another; there to the row, if it is free."""
    scheduler = make_scheduler()
    first = serve_one(scheduler, "a", LONG)
    assert (first.home, first.row) == (0, 0)
    scheduler.add(Request("b", (*LONG, 50), max_new_tokens=2))
    (second,) = [s for s in scheduler.next_batch().sequences if s.prefix]
    assert (second.home, second.row, second.prefix, second.num_missing) == (0, 1, Prefix(0, 40), 1)
    second.cached, second.prefix = 41, None
    second.token_ids.append(0)
    third = serve_one(scheduler, "c", (*LONG, 60))
    assert third.home == 1
    scheduler.release(first)
    scheduler.add(Request("d", (*LONG, 70), max_new_tokens=2))
    (fourth,) = [s for s in scheduler.next_batch().sequences if s.prefix]
    assert (fourth.home, fourth.row, fourth.prefix) == (0, 0, Prefix(0, 40))


def test_where_k_v_are_everywhere_only_those_are_taken_over() -> None:
    """Positions that are at one home are of no use to another."""
    scheduler = make_scheduler(replicated=True)
    first = serve_one(scheduler, "a", LONG)
    first.replicated, first.cached = 20, 41
    first.token_ids.append(0)
    scheduler.add(Request("b", LONG, max_new_tokens=2))
    (second,) = [s for s in scheduler.next_batch().sequences if s.prefix]
    assert second.prefix == Prefix(0, 20)
    assert second.home == 1


def run_pass(scheduler: Scheduler, *, shares: bool = True) -> dict[str, int]:
    """What runs, by request; K/V are everywhere a pass later."""
    batch = scheduler.next_batch()
    for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
        sequence.cached, sequence.prefix = sequence.start, None
        sequence.replicated = sequence.cached if shares else 0
        sequence.cached += length
        if not sequence.num_missing:
            sequence.token_ids.append(0)
    return {s.request.request_id: length for s, length in zip(batch.sequences, batch.lengths, strict=True)}


def test_prompts_that_come_together_run_once_what_they_share() -> None:
    """The others wait while the first one runs it, in chunks, and then run the rest; the budget is for others."""
    scheduler = make_scheduler(num_ranks=1, rows=4, max_prefill_tokens=22)
    for name in "abc":
        scheduler.add(Request(name, (*LONG, ord(name)), max_new_tokens=9))
    scheduler.add(Request("d", (7,) * 12, max_new_tokens=9))
    assert run_pass(scheduler) == {"a": 22}
    assert run_pass(scheduler) == {"a": 19, "d": 3}
    assert run_pass(scheduler) == {"a": 1, "b": 1, "c": 1, "d": 9}


def test_nobody_waits_for_one_that_is_gone() -> None:
    """The next one runs it, and is waited for."""
    scheduler = make_scheduler(num_ranks=1, rows=4, max_prefill_tokens=50)
    for name in "abc":
        scheduler.add(Request(name, (*LONG, ord(name)), max_new_tokens=9))
    assert run_pass(scheduler) == {"a": 41}
    assert len(scheduler.running) == 3
    scheduler.cancel("a")
    assert run_pass(scheduler) == {"b": 41}
    assert run_pass(scheduler) == {"b": 1, "c": 1}


def test_where_k_v_are_shared_later_others_wait_for_that() -> None:
    """A pass longer; and no longer, where nothing is shared because passes are of another mode."""
    for shares in (True, False):
        scheduler = make_scheduler(replicated=True, rows=4, max_prefill_tokens=100)
        for name in "ab":
            scheduler.add(Request(name, (*LONG, ord(name)), max_new_tokens=9))
        assert run_pass(scheduler, shares=shares) == {"a": 41}
        assert run_pass(scheduler, shares=shares) == {"a": 1}
        assert run_pass(scheduler, shares=shares) == {"a": 1, "b": 1 if shares else 41}


def test_rows_of_a_check_hold_nothing() -> None:
    """What is scored may be under doubt, and a check runs all it is asked for."""
    scheduler = make_scheduler(num_ranks=1)
    first = serve_one(scheduler, "a", LONG)
    scheduler.release(first, keep=False)
    check = scheduler.place(Request("b", LONG))
    assert check is not None
    assert check.prefix is None
    check.cached = 40
    scheduler.release(check)
    check = scheduler.place(Request("c", LONG))
    assert check is not None
    assert check.prefix is None
