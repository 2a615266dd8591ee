"""Requests and their scheduler: no model and no process."""

import pytest

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.batch import Batch
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request, RunningSequence
from moeplace.runtime.engine.sampling import SamplingParameters
from moeplace.runtime.engine.scheduler import Scheduler
from moeplace.runtime.kv.row_pool import PAGE, Trim


def make_scheduler(**changes: int) -> Scheduler:
    options = {"num_ranks": 2, "rows": 2, "positions": 20, "replicated": False, "max_prefill_tokens": 6, **changes}
    return Scheduler(**options)  # type: ignore[arg-type]


def request(name: str, length: int = 2) -> Request:
    return Request(name, tuple(range(length)), max_new_tokens=3)


def served(batch: Batch) -> dict[str, int]:
    return {s.request.request_id: length for s, length in zip(batch.sequences, batch.lengths, strict=True)}


def run_passes(scheduler: Scheduler, count: int) -> list[dict[str, int]]:
    """What runs in some passes; everybody who has run all tokens gets another."""
    passes = []
    for _ in range(count):
        batch = scheduler.next_batch()
        passes.append(served(batch))
        for sequence, length in zip(batch.sequences, batch.lengths, strict=True):
            sequence.cached += length
            if not sequence.num_missing:
                sequence.token_ids.append(0)
    return passes


def admit(scheduler: Scheduler) -> list[RunningSequence]:
    """Sequences that have come with the next pass, in the order in which they came."""
    before = len(scheduler.running)
    run_passes(scheduler, 1)
    return scheduler.running[before:]


def test_homes_are_balanced_and_rows_reused() -> None:
    """Sequences go to the rank with the fewest; a released row is the next one taken."""
    scheduler = make_scheduler()
    for name in "abcde":
        scheduler.add(request(name, 1))
    places = [(s.home, s.row) for s in admit(scheduler)]
    assert places == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert len(scheduler.waiting) == 1
    assert admit(scheduler) == []
    scheduler.release(scheduler.running[1])
    assert [(s.home, s.row) for s in admit(scheduler)] == [(1, 0)]


def test_rows_of_replicated_caches_are_global() -> None:
    """Where every rank keeps every sequence, no two sequences share a row."""
    scheduler = make_scheduler(replicated=True, rows=3)
    for name in "abcd":
        scheduler.add(request(name, 1))
    assert [(s.home, s.row) for s in admit(scheduler)] == [(0, 0), (1, 1), (0, 2)]


def test_a_pass_has_a_budget() -> None:
    """Of 6 tokens: one for each sequence that goes on, then prompts in their order, the last one as far as it goes."""
    scheduler = make_scheduler(rows=9)
    for name, length in (("a", 8), ("b", 3), ("c", 7)):
        scheduler.add(request(name, length))
    expected = [{"a": 6}, {"a": 2, "b": 3, "c": 1}, {"a": 1, "b": 1, "c": 4}, {"a": 1, "b": 1, "c": 2}]
    assert run_passes(scheduler, 4) == expected


def test_prompts_that_cannot_be_cut_exceed_the_budget_alone() -> None:
    """Whole, in order, several if they fit; beside them every sequence that goes on."""
    scheduler = make_scheduler(rows=9, cuts_prompts=False)
    for name, length in (("a", 8), ("b", 2), ("c", 3), ("d", 1)):
        scheduler.add(request(name, length))
    assert run_passes(scheduler, 3) == [{"a": 8}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 1, "c": 1, "d": 1}]


def test_prompts_proceed_beside_more_sequences_than_the_budget() -> None:
    """By a token."""
    scheduler = make_scheduler(rows=9, max_prefill_tokens=2)
    for name in "abcd":
        scheduler.add(request(name, 1))
    assert run_passes(scheduler, 4)[-1] == {"a": 1, "b": 1, "c": 1, "d": 1}
    scheduler.add(request("e", 2))
    assert run_passes(scheduler, 3) == [dict.fromkeys("abcde", 1)] * 3


def test_what_is_to_be_made_again_is_a_prompt() -> None:
    """A sequence that lacks K/V of several tokens runs them in chunks; one with a state that cannot, one by one."""
    for cuts, expected in ((True, [3, 2, 1]), (False, [1, 1, 1])):
        scheduler = make_scheduler(max_prefill_tokens=3, cuts_prompts=cuts)
        scheduler.seat(RunningSequence(request("a"), home=0, row=0, token_ids=list(range(7)), cached=2))
        assert [one["a"] for one in run_passes(scheduler, 3)] == expected


def test_what_was_added_before_counts_for_the_budget() -> None:
    """A request that waits again has to run it too; one that cannot be cut waits for a budget that has room for both,
    however much was added."""
    for cuts, expected in ((True, [{"first": 2, "again": 3}, {"again": 1}]), (False, [{"first": 2}, {"again": 4}])):
        scheduler = make_scheduler(num_ranks=1, max_prefill_tokens=5, cuts_prompts=cuts)
        scheduler.add(request("first"))
        scheduler.resume(Request("again", (1, 2), max_new_tokens=9), (3, 4))
        passes = run_passes(scheduler, 2)
        assert [{n: length for n, length in one.items() if n != "first" or length > 1} for one in passes] == expected


def test_prompts_of_like_lengths_are_attended_together() -> None:
    """Those of a part differ by less than a factor of four; single tokens, new prompts and later ones are apart."""
    lengths = [7, 1, 2, 8, 31, 3, 32, 4]
    sequences = [
        RunningSequence(request(str(length), 40), home=0, row=row, token_ids=[1] * 40, cached=4 * (length == 4))
        for row, length in enumerate(lengths)
    ]
    parts = list(Batch.of(sequences, lengths, has_prompts=True).parts_on(0))
    assert [(part.kind, part.lengths) for part in parts] == [
        ("token", [1]),
        ("prompt", [7, 2, 3]),
        ("prompt", [8, 31]),
        ("prompt", [32]),
        ("continued", [4]),
    ]
    assert not list(Batch.of(sequences, lengths, has_prompts=True).parts_on(1))


def paged(pages: int, **changes: int) -> Scheduler:
    return make_scheduler(num_ranks=1, rows=9, positions=4 * PAGE, max_prefill_tokens=100, pages=pages, **changes)


def test_short_sequences_share_the_memory_of_a_long_one() -> None:
    """Each takes the pages that it has tokens for."""
    scheduler = paged(4)
    assert scheduler.kv_room == 4 * PAGE
    for name in "abcdef":
        scheduler.add(request(name, 3))
    assert run_passes(scheduler, 1) == [dict.fromkeys("abcd", 3)]
    scheduler.cancel("b")
    assert run_passes(scheduler, 1) == [{"a": 1, "c": 1, "d": 1, "e": 3}]


def test_the_youngest_gives_way() -> None:
    """A sequence that needs a page takes it from the last one that came, which waits before all others, with its
    tokens; the row's memory is given back before anything is written."""
    scheduler = paged(4)
    for name, length in (("a", PAGE - 1), ("b", 2 * PAGE), ("c", 1), ("d", 3)):
        scheduler.add(Request(name, (1,) * length, max_new_tokens=2 * PAGE - 5, stop_ids=()))
    assert run_passes(scheduler, 1) == [{"a": PAGE - 1, "b": 2 * PAGE, "c": 1}]
    trims = []
    for expected in ({"a": 1, "b": 1}, {"a": 1}):  # b needs a third page, then a a second one
        batch = scheduler.next_batch()
        assert served(batch) == expected
        trims.append(batch.trims)
        for sequence in batch.sequences:
            sequence.cached += 1
            sequence.token_ids.append(0)
    assert [request.request_id for request in scheduler.waiting] == ["b", "c", "d"]
    assert [scheduler.added(request) for request in scheduler.waiting] == [(0, 0), (0,), ()]
    assert trims == [((0, Trim(2, 0)),), ((0, Trim(1, 0)),)]


def test_a_prompt_that_is_older_gets_the_memory_of_a_younger_sequence() -> None:
    """After a change of ranks, say: it goes on by as many tokens as there is memory for; a younger one only waits."""
    for older in (True, False):
        scheduler = paged(4)
        prompt = RunningSequence(request("prompt", 3 * PAGE), 0, 0, [1] * 3 * PAGE, cached=PAGE)
        other = RunningSequence(Request("other", (1,) * 3 * PAGE), 0, 1, [1] * (3 * PAGE - 3), cached=3 * PAGE - 4)
        for sequence in (prompt, other) if older else (other, prompt):
            scheduler.seat(sequence)
        if older:
            assert served(scheduler.next_batch()) == {"prompt": 2 * PAGE}
            assert [request.request_id for request in scheduler.waiting] == ["other"]
        else:
            assert served(scheduler.next_batch()) == {"other": 1}
            assert len(scheduler.running) == 2


def test_a_check_gets_memory() -> None:
    """From what runs, youngest first."""
    scheduler = paged(4)
    for name in "abcd":
        scheduler.add(request(name, 3))
    run_passes(scheduler, 1)
    assert scheduler.place(request("check", 2 * PAGE)) is None
    scheduler.make_room(2 * PAGE)
    assert [s.request.request_id for s in scheduler.running] == ["a"]
    assert [r.request_id for r in scheduler.waiting] == ["b", "c", "d"]
    assert scheduler.place(request("check", 2 * PAGE)) is not None


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
    assert [sequence.request.request_id for sequence in admit(scheduler)] == ["a"]
    check = scheduler.place(Request("check", (1,), max_new_tokens=1))
    assert check is not None
    scheduler.release(check)
    scheduler.kept_free = 0
    assert [sequence.request.request_id for sequence in admit(scheduler)] == ["b"]


def test_a_check_is_nobody_elses(dated_seed: int) -> None:
    """A sequence for a check of the ranks has its own tokens, also where a request of that name waits with more."""
    scheduler, added = paged(8), tuple(range(1 + dated_seed % 9))
    scheduler.resume(Request("check", (1, 2), max_new_tokens=20), added, {0: TokenLogprob(-1.0)})
    check = scheduler.place(Request("check", (1, 2)))
    assert check is not None
    assert (check.token_ids, check.logprobs) == ([1, 2], {})
    scheduler.release(check, keep=False)
    (resumed,) = admit(scheduler)
    assert (resumed.token_ids, list(resumed.logprobs)) == ([1, 2, *added, 0], [0])  # and one that it drew
