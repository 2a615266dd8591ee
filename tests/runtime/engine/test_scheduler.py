"""Requests and their scheduler: no model and no process."""

import pytest

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.engine.scheduler import Scheduler


def make_scheduler(**changes: int) -> Scheduler:
    options = {"num_ranks": 2, "rows": 2, "positions": 10, "replicated": False, "max_prefill_tokens": 6, **changes}
    return Scheduler(**options)  # type: ignore[arg-type]


def request(name: str, length: int = 2) -> Request:
    return Request(name, tuple(range(length)), max_new_tokens=3)


def test_homes_are_balanced_and_rows_reused() -> None:
    """Sequences go to the rank with the fewest; a released row is the next one taken."""
    scheduler = make_scheduler()
    for name in "abcde":
        scheduler.add(request(name, 1))
    places = [(s.home, s.row) for s in scheduler.admit()]
    assert places == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert len(scheduler.waiting) == 1
    assert scheduler.admit() == []
    scheduler.release(scheduler.running[1])
    assert [(s.home, s.row) for s in scheduler.admit()] == [(1, 0)]


def test_rows_of_replicated_caches_are_global() -> None:
    """Where every rank keeps every sequence, no two sequences share a row."""
    scheduler = make_scheduler(replicated=True, rows=3)
    for name in "abcd":
        scheduler.add(request(name, 1))
    assert [(s.home, s.row) for s in scheduler.admit()] == [(0, 0), (1, 1), (0, 2)]


def test_a_prefill_pass_is_bounded_but_never_empty() -> None:
    """Prompts are admitted in order up to the limit; one that exceeds it alone has a pass of its own."""
    scheduler = make_scheduler(rows=9)
    for name, length in (("a", 7), ("b", 3), ("c", 3), ("d", 1)):
        scheduler.add(request(name, length))
    assert [[s.request.request_id for s in scheduler.admit()] for _ in range(3)] == [["a"], ["b", "c"], ["d"]]


def test_requests_are_checked_and_survive_json() -> None:
    """Empty prompts and no tokens to add are refused; JSON round trip."""
    with pytest.raises(InputError, match="empty prompt"):
        Request("a", ())
    with pytest.raises(InputError, match=r"max_new_tokens \(0\)"):
        Request("a", (1,), max_new_tokens=0)
    whole = Request("a", (1, 2), 5, SamplingParameters(0.5, 3, 0.9, 7), (4,))
    assert Request.from_json(whole.to_json()) == whole


def test_a_row_can_be_kept_free() -> None:
    """Waiting requests leave the row that a check needs, and take it afterwards."""
    scheduler = Scheduler(num_ranks=2, rows=1, positions=8, replicated=False, max_prefill_tokens=64)
    scheduler.kept_free = 1
    for name in "ab":
        scheduler.add(Request(name, (1, 2), max_new_tokens=2))
    assert [sequence.request.request_id for sequence in scheduler.admit()] == ["a"]
    check = scheduler.place(Request("check", (1,), max_new_tokens=1))
    assert check is not None
    scheduler.release(check)
    scheduler.kept_free = 0
    assert [sequence.request.request_id for sequence in scheduler.admit()] == ["b"]
