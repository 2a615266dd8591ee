"""Generations that form: who goes on without one lets the others go."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moeplace.runtime.counters import Counters
from moeplace.runtime.errors import PeerLostError
from moeplace.runtime.service.generation import Forming, Generation
from moeplace.runtime.service.member.loop import MemberLoop
from tests.rank_pool import RankContext, RankPool


class OneStore:
    """What a member needs of a service's store to form a group."""

    def __init__(self, store: Any) -> None:
        self.store, self.reports = store, []

    def for_group(self, number: int) -> Any:
        return dist.PrefixStore(f"group/{number}", self.store)

    def report(self, document: dict[str, Any]) -> None:
        self.reports.append(document)


def form_and_wait(context: RankContext, is_early: bool) -> str:
    """What ranks 0 and 1 hear that wait in a group for rank 2, which abandons it before it is connected or after."""
    store = OneStore(context.store)
    forming = Forming(Generation.of(1, dict.fromkeys(range(context.size), 0)))
    last = context.rank == context.size - 1
    if last and is_early:
        forming.abandon()
    forming.start(store, context.rank, timeout=context.timeout, counters=Counters(), device=torch.device("cpu"))  # type: ignore[arg-type]
    while not forming.wait(0.5):
        pass
    if last:
        if not is_early:  # all are in the group
            for rank in range(context.size - 1):
                context.store.get(f"connected/{rank}")
        forming.abandon()
        assert forming.group is None
        for rank in range(context.size - 1):  # it lives on, as a member does that is on its way to the next generation
            context.store.get(f"heard/{rank}")
        return store.reports[0]["error"]
    context.store.set(f"connected/{context.rank}", "")
    try:
        if forming.group is None:
            assert is_early  # it went while this one connected
            return forming.error
        forming.group.all_gather_bytes(b"x" * context.rank, kind="snapshots")
        return "no error"
    except PeerLostError as error:
        return str(error)
    finally:
        forming.abandon()
        context.store.set(f"heard/{context.rank}", "")


@pytest.mark.parametrize("is_early", [False, True])
def test_nobody_waits_for_who_has_abandoned_a_group(pool: RankPool, is_early: bool) -> None:
    """Its connections are closed, although its process lives on: no timeout has to pass."""
    *waiting, abandoned = pool.run(form_and_wait, is_early, size=3)
    assert all("lost a peer during" in told for told in waiting)
    assert is_early or all("during snapshots" in told for told in waiting)
    assert not any("timed out" in told.lower() for told in waiting)
    assert abandoned == ("it was given up" if is_early else "")


class Recorded:
    """A stand-in that writes down which of its methods were called."""

    def __init__(self, calls: list[str], **answers: Any) -> None:
        self._calls, self._answers = calls, answers

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **_: Any) -> Any:
            self._calls.append(" ".join([name, *(str(one) for one in arguments if isinstance(one, str | int))]))
            return self._answers.get(name)

        return call


@pytest.mark.parametrize("is_connected", [False, True])
def test_a_member_lets_go_before_it_waits_for_the_next_generation(is_connected: bool) -> None:
    """Whether its group has connected or not when it hears of a loss: others in it are not to wait for it."""
    calls: list[str] = []
    loop = MemberLoop.__new__(MemberLoop)
    loop._entrance = Recorded(calls)  # type: ignore[assignment]
    loop._heartbeat = Recorded([])  # type: ignore[assignment]
    loop._group = loop._prepared = None
    following = {"number": 2, "members": [1], "nodes": [0]}
    loop._store = Recorded(calls, find=2, read=following)  # type: ignore[assignment]
    loop.job = type("Job", (), {"member_id": 0})()

    class Lost:
        observer = None

        def close(self) -> None:
            calls.append("close")

    def lose(group: Any) -> Any:
        raise PeerLostError("it is gone")

    loop._entrance.exchange_snapshots = lose  # type: ignore[method-assign]
    loop._faults = Recorded([])  # type: ignore[assignment]
    forming = Forming(Generation.of(1, {0: 0, 1: 0}))
    forming.group = Lost() if is_connected else None  # type: ignore[assignment]
    forming.wait = lambda seconds: is_connected  # type: ignore[method-assign]
    assert loop._take_part(forming) is None  # the generation after it is without this member
    assert forming.group is None
    assert forming._is_abandoned
    if is_connected:
        assert calls.index("close") < calls.index("read successor/1")
