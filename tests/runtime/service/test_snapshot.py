"""Snapshots: whatever the moment at which ranks changed, all go on with the same, and no token is taken back."""

import json
from dataclasses import replace

import numpy as np

from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.scheduler import Scheduler
from moeplace.runtime.service.snapshot import HeldSequence, Snapshot, continue_from, take_snapshot_of


def sequence(name: str, added: int, **place: int) -> HeldSequence:
    """A request of 3 tokens with some added ones: 100, 101, ..."""
    return HeldSequence(Request(name, (1, 2, 3), 50), tuple(range(100, 100 + added)), **place)


def test_the_member_that_got_farthest_counts() -> None:
    """A step that one survivor finished is finished; the K/V of the other lack a position, which is decoded again."""
    ahead = Snapshot(1, progress=9, sequences=(sequence("a", 5, home=1, row=0, cached=7),))
    behind = Snapshot(2, progress=8, sequences=(sequence("a", 4, home=1, row=0, cached=7),))
    start = continue_from([behind, ahead], replicated=False, delivered=None)
    assert start.progress == 9
    (held,) = start.running
    assert (held.home, held.row, held.cached, len(held.added)) == (1, 0, 7, 5)

    at_home_behind = [
        Snapshot(1, progress=8, sequences=(sequence("a", 4, home=1, row=0, cached=6),)),
        Snapshot(2, progress=9, sequences=(sequence("a", 5, home=1, row=0, cached=7),)),
    ]
    (held,) = continue_from(at_home_behind, replicated=False, delivered=None).running
    assert (held.home, held.cached, len(held.added)) == (0, 6, 5)


def test_a_sequence_without_its_home_waits_or_moves() -> None:
    """Without copies it is prefilled again, with the tokens it has, before the others; with copies it moves."""
    seen = (sequence("a", 5, home=0, row=2, cached=7, replicated=7), sequence("b", 1, home=2, row=0, cached=3))
    snapshots = [Snapshot(member, progress=3, sequences=(*seen, sequence("c", 0))) for member in (1, 2)]
    start = continue_from(snapshots, replicated=False, delivered=None)
    assert [s.request_id for s in start.running] == ["b"]
    assert [(s.request_id, len(s.added)) for s in start.waiting] == [("a", 5), ("c", 0)]

    start = continue_from(snapshots, replicated=True, delivered=None)
    moved = {s.request_id: (s.home, s.row, s.cached, s.replicated) for s in start.running}
    assert moved == {"a": (0, 2, 7, 7), "b": (1, 0, 3, 0)}  # b: nothing but its home has its prompt


def test_sequences_of_a_lost_home_are_spread() -> None:
    """They go to the ranks with the fewest, those that had sequences of their own counted."""
    own = [sequence(f"own{n}", 2, home=1, row=n, cached=4, replicated=4) for n in range(4)]
    lost = [sequence(f"lost{n}", 2, home=0, row=4 + n, cached=4, replicated=4) for n in range(8)]
    snapshots = [Snapshot(member, progress=3, sequences=(*own, *lost)) for member in (1, 2, 3)]
    start = continue_from(snapshots, replicated=True, delivered=None)
    homes = [held.home for held in start.running]
    assert [homes.count(rank) for rank in range(3)] == [4, 4, 4]


def test_members_that_are_all_new_begin_after_the_log() -> None:
    """What was done before them is done; the next snapshot shows that they have served."""
    start = continue_from([Snapshot(5), Snapshot(6)], replicated=False, delivered=None, applied=17)
    assert (start.applied, start.running, start.waiting) == (17, (), ())
    assert start.progress > 0
    assert continue_from([Snapshot(9), Snapshot(5, start.progress, 17)], replicated=False, delivered={}).applied == 17


def test_a_newcomer_holds_nothing() -> None:
    """Where K/V are on all ranks, a newcomer is the only one that still has to get them."""
    held = (sequence("a", 5, home=0, row=2, cached=7, replicated=7),)
    start = continue_from([Snapshot(0, progress=3, sequences=held), Snapshot(5)], replicated=True, delivered=None)
    assert [(s.home, s.cached, s.replicated) for s in start.running] == [(0, 7, 7)]
    assert start.newcomers == (1,)
    for rank, replicated in ((0, 7), (1, 0)):
        scheduler = Scheduler(num_ranks=2, rows=3, positions=60, replicated=True, max_prefill_tokens=100)
        start.fill(scheduler, rank=rank)
        assert [s.replicated for s in scheduler.running] == [replicated]


def test_what_was_delivered_stays() -> None:
    """Tokens that were made known and that no survivor has are taken over; requests that have ended are dropped."""
    held = (sequence("a", 4, home=1, row=0, cached=6), sequence("b", 4, home=1, row=1, cached=6), sequence("c", 0))
    start = continue_from(
        [Snapshot(1, progress=8, sequences=held)],
        replicated=False,
        delivered={"a": [100, 101, 102, 103, 104], "c": []},
    )
    assert [(s.request_id, s.added, s.cached) for s in start.running] == [("a", (100, 101, 102, 103, 104), 6)]
    assert [s.request_id for s in start.waiting] == ["c"]


def test_the_last_token_is_never_cached() -> None:
    """A pass that ended before its tokens were known has written one position too many."""
    held = (sequence("a", 4, home=1, row=0, cached=7),)
    (placed,) = continue_from([Snapshot(1, progress=8, sequences=held)], replicated=False, delivered=None).running
    assert placed.cached == 3 + 4 - 1


def test_a_state_that_cannot_forget_is_made_again() -> None:
    """One that has seen the last token is of no use; one that has not, or whose token came out after all, goes on."""
    seen = (sequence("a", 4, home=1, row=0, cached=7), sequence("b", 4, home=1, row=1, cached=6))
    start = continue_from([Snapshot(1, progress=8, sequences=seen, rewinds=False)], replicated=False, delivered=None)
    assert [(s.request_id, s.cached) for s in start.running] == [("b", 6)]
    assert [(s.request_id, len(s.added)) for s in start.waiting] == [("a", 4)]
    tokens = {"a": [100, 101, 102, 103, 104], "b": [100, 101, 102, 103]}
    start = continue_from([Snapshot(1, progress=8, sequences=seen, rewinds=False)], replicated=False, delivered=tokens)
    assert [(s.request_id, s.cached) for s in start.running] == [("a", 7), ("b", 6)]


def test_a_scheduler_survives_the_journey() -> None:
    """Sequences, rows, homes and waiting requests are the same after a snapshot has travelled as text."""

    def make_scheduler() -> Scheduler:
        return Scheduler(num_ranks=2, rows=2, positions=60, replicated=False, max_prefill_tokens=100)

    before, after = make_scheduler(), make_scheduler()
    for index in range(6):
        before.add(Request(str(index), (1, 2, 3), max_new_tokens=5 + index))
    for running in before.next_batch().sequences:
        running.cached = 3
        running.token_ids.append(7)
    before.cancel("1")
    sequences = take_snapshot_of(before, (4, 9))
    snapshot = Snapshot(4, progress=5, applied=2, slots=((0, 1), (1, -1)), sequences=sequences)
    travelled = Snapshot.from_json(json.loads(json.dumps(snapshot.to_json())))
    assert travelled == snapshot
    other = replace(travelled, member=9)
    continue_from([travelled, other], replicated=False, delivered=None).fill(after, rank=0)
    key = ["request", "home", "row", "token_ids", "cached"]
    assert [[getattr(s, k) for k in key] for s in after.running] == [
        [getattr(s, k) for k in key] for s in before.running
    ]
    assert after.waiting == before.waiting
    assert after.foresee().prompt_ids == before.foresee().prompt_ids == ["4"]


def test_how_often_a_request_was_overtaken_outlives_its_ranks() -> None:
    """Those that wait keep their number, through JSON; nobody overtakes one that had a place."""

    def make_scheduler() -> Scheduler:
        return Scheduler(num_ranks=2, rows=1, positions=32, replicated=False, max_prefill_tokens=64, most_overtaken=2)

    scheduler = make_scheduler()
    requests = [Request(name, (1, 2, 3), 9) for name in "abcdef"]
    for request in requests:
        scheduler.add(request)
    scheduler.next_batch()  # a and b run
    scheduler.order.learn("abcdef", np.array([[9, 0], [9, 0], [0, 9], [0, 9], [9, 0], [9, 0]], np.int16))
    scheduler.release(scheduler.running[0])
    scheduler.next_batch()  # e has overtaken c and d
    assert [s.request.request_id for s in scheduler.running] == ["b", "e"]
    for sequence in scheduler.running:
        sequence.cached = 3
    seen = Snapshot(7, progress=4, sequences=take_snapshot_of(scheduler, members=(7, 8)))
    start = continue_from(
        [Snapshot.from_json(json.loads(json.dumps(seen.to_json())))], replicated=False, delivered=None
    )
    after = make_scheduler()
    start.fill(after, rank=0)
    waiting = {request.request_id: after.order.overtaken(request.request_id) for request in after.waiting}
    lost = "b" if scheduler.running[0].home else "e"
    assert waiting == {lost: 2, "c": 1, "d": 1, "f": 0}
    assert next(iter(waiting)) == lost
