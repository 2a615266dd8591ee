"""Collectives that do not end are given up from another thread; the reader is told, and uses nothing of them."""

import threading
import weakref

import pytest

from moeplace.runtime.comm.watch import CollectiveWatch
from moeplace.runtime.errors import PeerLostError


class FakeWork:
    """A collective that ends when it is told."""

    def __init__(self) -> None:
        self.is_done, self.error = False, ""
        self.raises: type[Exception] = RuntimeError

    def is_completed(self) -> bool:
        if self.error:
            raise self.raises(self.error)
        return self.is_done


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_watch(timeout: float = 10.0) -> tuple[CollectiveWatch, Clock, list[str]]:
    clock, aborted = Clock(), []
    return CollectiveWatch(lambda: aborted.append("now"), timeout=timeout, clock=clock, start=False), clock, aborted


def test_each_collective_has_its_own_time() -> None:
    """The time of one begins when the one before has ended, not when many were issued at once."""
    watch, clock, aborted = make_watch()
    works = [FakeWork() for _ in range(5)]
    for number, work in enumerate(works):
        watch.add(work, f"dispatch {number}")
    for work in works:
        clock.now += 9
        watch.look()
        work.is_done = True
        watch.look()
    watch.check()
    assert not aborted


def test_an_idle_time_is_nobodys_time() -> None:
    """What is issued after a pause has all its time."""
    watch, clock, aborted = make_watch()
    first = FakeWork()
    watch.add(first, "dispatch")
    first.is_done = True
    watch.look()
    clock.now += 1000
    watch.add(FakeWork(), "combine")
    clock.now += 9
    watch.look()
    watch.check()
    assert not aborted


def test_what_does_not_end_is_aborted_once() -> None:
    """At the limit it may still end, beyond it is given up; the sentence names it, and all later checks raise it."""
    watch, clock, aborted = make_watch()
    watch.add(FakeWork(), "combine")
    clock.now += 10
    watch.look()
    watch.check()
    clock.now += 0.001
    for _ in range(3):
        watch.look()
    assert aborted == ["now"]
    for _ in range(2):
        with pytest.raises(PeerLostError, match=r"combine has not ended within 10 s"):
            watch.check()


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, MemoryError])
def test_what_fails_is_aborted(kind: type[Exception]) -> None:
    """An error of the back end is told in its words, whatever it is: the thread that looks must not end by it."""
    watch, _, aborted = make_watch()
    work = FakeWork()
    work.error, work.raises = "NCCL error: remote process exited", kind
    watch.add(work, "dispatch")
    watch.look()
    assert aborted == ["now"]
    with pytest.raises(PeerLostError, match="dispatch failed: NCCL error: remote process exited"):
        watch.check()


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_abort_that_fails_is_told_all_the_same(kind: type[Exception]) -> None:
    """The communicator is broken already."""

    def abort() -> None:
        raise kind("no communicator")

    watch = CollectiveWatch(abort, timeout=1.0, clock=(clock := Clock()), start=False)
    watch.add(FakeWork(), "dispatch")
    clock.now += 2
    watch.look()
    with pytest.raises(PeerLostError):
        watch.check()


def test_a_reader_that_hangs_comes_back() -> None:
    """The host hangs in a read; the thread aborts; the read returns, and the check raises."""
    kernel_ends = threading.Event()
    watch = CollectiveWatch(kernel_ends.set, timeout=0.05)
    watch.add(FakeWork(), "dispatch")
    assert kernel_ends.wait(30)
    with pytest.raises(PeerLostError):
        watch.check()
    watch.close()


class FakeGroup:
    """What can be aborted."""

    def abort(self) -> None:
        """Nothing is under way."""


@pytest.mark.parametrize("start", [True, False])
def test_what_is_closed_keeps_nothing_open(start: bool) -> None:
    """Neither the group nor its collectives: a broken group must close at once, for others to notice."""
    group, work = FakeGroup(), FakeWork()
    watch = CollectiveWatch(group.abort, timeout=10.0, start=start)
    watch.add(work, "dispatch")
    seen = weakref.ref(group), weakref.ref(work)
    watch.close()
    assert watch._thread is None or not watch._thread.is_alive()
    del group, work
    assert [one() for one in seen] == [None, None]
    watch.check()


def test_who_is_told_may_close_at_once() -> None:
    """On the thread that looks: it does not wait for itself."""
    closed = threading.Event()

    def close() -> None:
        watch.close()
        closed.set()

    watch = CollectiveWatch(close, timeout=0.01)
    watch.add(FakeWork(), "dispatch")
    assert closed.wait(30)
    assert watch._thread is not None
    watch._thread.join(30)
    assert not watch._thread.is_alive()
