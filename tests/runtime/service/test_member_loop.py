"""The life of a member, with a store that answers from a list: which generation it follows, and what it lets go."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeplace.profiling.errors import FormatError, InputError
from moeplace.runtime.engine.limits import EngineLimits
from moeplace.runtime.errors import PeerLostError
from moeplace.runtime.service.generation import Generation
from moeplace.runtime.service.member import loop as loop_module
from moeplace.runtime.service.member.loop import MemberLoop, run_member
from moeplace.runtime.service.member.serving import Outcome
from moeplace.runtime.service.options import MemberJob, ServiceOptions
from moeplace.runtime.service.store import ServiceEndedError

MEMBER = 3


def make_job(**options: Any) -> MemberJob:
    return MemberJob(MEMBER, "127.0.0.1", 1, "test", "nowhere", ServiceOptions(device="cpu", **options), place=0)


class Answers:
    """A store with these values; what is asked and told is written down."""

    def __init__(self, **values: Any) -> None:
        self.values = {name.replace("__", "/"): value for name, value in values.items()}
        self.asked: list[str] = []
        self.reports: list[dict[str, Any]] = []

    def read(self, key: str) -> Any:
        self.asked.append(key)
        return self.values[key]  # KeyError: it would wait for ever

    def find(self, key: str) -> Any:
        return self.values.get(key)

    def report(self, document: dict[str, Any]) -> None:
        self.reports.append(document)


class FakeForming:
    """A generation that is on its way."""

    def __init__(self, generation: Generation, group: Any = None) -> None:
        self.generation, self.group, self.error = generation, group, "it broke"
        self.is_abandoned = False

    def wait(self, seconds: float) -> bool:
        return True

    def abandon(self) -> None:
        self.is_abandoned = True


class FakeGroup:
    observer = None

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def generation(number: int, *members: int) -> dict[str, Any]:
    return Generation.of(number, dict.fromkeys(members, 0)).to_json()


def make_loop(store: Answers, monkeypatch: pytest.MonkeyPatch) -> MemberLoop:
    """A member whose generations form by themselves."""
    loop = MemberLoop.__new__(MemberLoop)
    loop.job, loop._store = make_job(), store  # type: ignore[assignment]
    loop._assignments, loop._group, loop._prepared = 0, None, None
    loop._heartbeat = SimpleNamespace(rest=lambda: None, begin=lambda: None, stop=lambda: None)  # type: ignore[assignment]
    loop._entrance = SimpleNamespace(drop_replacement=lambda: store.asked.append("dropped"))  # type: ignore[assignment]
    loop._faults = SimpleNamespace(reach=lambda phase: None)  # type: ignore[assignment]
    monkeypatch.setattr(MemberLoop, "_start_forming", lambda self, found: FakeForming(found))
    return loop


def test_a_proposal_that_is_withdrawn_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next assignment counts; each is read once, under a number of its own."""
    values = {"assign/3/0": 1, "assign/3/1": 2, "open/1": False, "open/2": True}
    store = Answers(**{"generation/1": generation(1, 3), "generation/2": generation(2, 3), **values})
    formings: list[FakeForming] = []
    loop = make_loop(store, monkeypatch)

    def start(self: Any, found: Generation) -> FakeForming:
        formings.append(FakeForming(found))
        return formings[-1]

    monkeypatch.setattr(MemberLoop, "_start_forming", start)
    assert loop._await_assignment() is formings[1]  # type: ignore[comparison-overlap]
    assert [forming.is_abandoned for forming in formings] == [True, False]
    assert [key for key in store.asked if key.startswith("assign")] == ["assign/3/0", "assign/3/1"]


@pytest.mark.parametrize("prepared", [None, 4, 5])
def test_a_switch_leads_to_what_was_prepared(prepared: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has prepared that generation is in it; who has not leaves once the others have begun."""
    store = Answers(settled__5=True)
    loop = make_loop(store, monkeypatch)
    forming = FakeForming(Generation.of(prepared or 0, {3: 0}))
    loop._prepared = None if prepared is None else forming  # type: ignore[assignment]
    assert loop._follow(2, Outcome("switch", 5)) is (forming if prepared == 5 else None)
    assert store.asked == ([] if prepared == 5 else ["settled/5"])


@pytest.mark.parametrize("stays", [True, False])
def test_a_loss_leads_to_the_successor(stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the generation that was lost, once everything of it is let go and reported; or out of the service."""
    members = (3, 6) if stays else (6,)
    store = Answers(**{"successor/2": 7, "generation/7": generation(7, *members)})
    loop, group = make_loop(store, monkeypatch), FakeGroup()
    loop._group = group  # type: ignore[assignment]
    prepared = FakeForming(Generation.of(4, {3: 0}))
    loop._prepared = prepared  # type: ignore[assignment]
    following = loop._follow(2, Outcome("lost", 7))
    assert (following is not None) == stays
    if following is not None:
        assert following.generation.number == 7
    assert group.is_closed
    assert prepared.is_abandoned
    assert (loop._group, loop._prepared) == (None, None)
    assert store.asked[0] == "dropped"
    told = {"kind": "lost", "member": 3, "generation": 2, "error": "the coordinator said so"}
    assert store.reports == [told]


def test_who_is_to_stop_says_so_and_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its group stays open meanwhile: others may still need it."""
    store = Answers(stopped=True)
    loop, group = make_loop(store, monkeypatch), FakeGroup()
    loop._group = group  # type: ignore[assignment]
    assert loop._follow(2, Outcome("stop")) is None
    assert store.reports == [{"kind": "stopped", "member": 3}]
    assert store.asked == ["stopped"]
    assert not group.is_closed


def test_what_was_prepared_before_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it is the group in force; a generation without this member is none of its business."""
    loop = make_loop(Answers(), monkeypatch)
    loop._prepare_next(Generation.of(4, {6: 0}))
    assert loop._prepared is None
    loop._prepare_next(Generation.of(5, {3: 0}))
    first: Any = loop._prepared
    assert first.generation.number == 5
    loop._prepare_next(Generation.of(6, {3: 0}))
    assert first.is_abandoned
    second: Any = loop._prepared
    second.group = loop._group = FakeGroup()  # type: ignore[assignment]
    loop._prepare_next(Generation.of(7, {3: 0}))
    assert not second.is_abandoned
    assert loop._prepared is not second


def test_a_group_that_does_not_form_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its thread says, or as the coordinator does while it still forms."""
    loop = make_loop(Answers(), monkeypatch)
    forming = FakeForming(Generation.of(4, {3: 0}))
    with pytest.raises(PeerLostError, match="it broke"):
        loop._await_group(forming)  # type: ignore[arg-type]
    forming.group = FakeGroup()
    assert loop._await_group(forming) is forming.group  # type: ignore[arg-type]
    assert forming.group.observer is loop._faults.reach
    forming.wait = lambda seconds: False  # type: ignore[method-assign]
    loop._store = Answers(successor__4=5)  # type: ignore[assignment]
    with pytest.raises(PeerLostError, match="while the generation formed"):
        loop._await_group(forming)  # type: ignore[arg-type]


def test_who_waits_for_ranks_to_agree_hears_of_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one in its own generation, and of none in an older one."""
    loop = make_loop(Answers(), monkeypatch)
    forming = FakeForming(Generation.of(4, {3: 0}))
    forming.group = FakeGroup()
    group: Any = loop._await_group(forming)  # type: ignore[arg-type]
    loop._store = Answers(successor__3=5)  # type: ignore[assignment]
    group.while_waiting()
    loop._store = Answers(successor__4=5)  # type: ignore[assignment]
    with pytest.raises(PeerLostError, match="while ranks agreed"):
        group.while_waiting()


@pytest.mark.parametrize(
    ("error", "final", "words"),
    [
        (InputError("no such model"), True, "no such model"),
        (FormatError("half a file"), True, "half a file"),
        (RuntimeError("out of luck"), False, "RuntimeError: out of luck"),
        (ServiceEndedError("gone"), None, ""),
        (None, None, ""),
    ],
)
def test_why_a_member_ends_is_told(
    error: Exception | None, final: bool | None, words: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """By a connection of its own, whether another member would find the same, and by the exit code."""
    store = Answers()

    class Loop:
        def __init__(self, job: MemberJob) -> None:
            assert job.member_id == MEMBER

        def run(self) -> None:
            if error is not None:
                raise error

    monkeypatch.setattr(loop_module, "MemberLoop", Loop)
    monkeypatch.setattr(loop_module.ServiceStore, "connect", lambda *_, **__: store)
    assert run_member(make_job()) == int(error is not None)
    expected = {"kind": "failed", "member": MEMBER, "error": words, "final": final}
    assert store.reports == ([] if final is None else [expected])
    assert ("Traceback" in capfd.readouterr().err) == (final is not None)
    monkeypatch.setattr(loop_module.ServiceStore, "connect", _nobody_is_there)
    assert run_member(make_job()) == int(error is not None)


def _nobody_is_there(*_: Any, **__: Any) -> None:
    raise ServiceEndedError("the coordinator is gone")


@pytest.mark.parametrize(("timeout", "every"), [(5.0, 1.0), (1.0, 0.2), (60.0, 2.0)])
def test_a_member_says_what_it_can_take_and_lives_until_the_end(
    timeout: float, every: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs of life come several times within the time after which a member counts as hung; they end last."""
    store, done = Answers(), list[str]()
    model = SimpleNamespace(max_positions=99, vocabulary=60, dtype=torch.float64)
    checkpoint = SimpleNamespace(expert_bytes=lambda dtype: 8 * (dtype == torch.float64))

    class Beat:
        def __init__(self, connect: Any, member: int, *, every: float) -> None:
            done.append(f"every {every:g}")

        def sign(self) -> dict[str, Any]:
            return {"kind": "alive", "member": MEMBER}

        def stop(self) -> None:
            done.append("stop")

    monkeypatch.setattr(loop_module.ServiceStore, "connect", lambda *_, **__: store)
    monkeypatch.setattr(loop_module, "Heartbeat", Beat)
    monkeypatch.setattr(loop_module, "open_checkpoint", lambda path, precision: checkpoint)
    monkeypatch.setattr(loop_module, "open_model", lambda *_, **__: model)
    monkeypatch.setattr(MemberLoop, "_await_assignment", lambda self: "first")
    follow = {"first": "second", "second": None}
    monkeypatch.setattr(MemberLoop, "_take_part", lambda self, forming: done.append(forming) or follow[forming])
    limits = EngineLimits(staging_rows=1, max_length=40 if timeout > 1 else None)
    loop = MemberLoop(make_job(timeout=timeout, limits=limits, dtype="float64"))
    group = FakeGroup()
    loop._group = group  # type: ignore[assignment]
    loop.run()
    assert done == [f"every {every:g}", "first", "second", "stop"]
    assert group.is_closed
    sign, ready = store.reports
    assert sign["kind"] == "alive"  # before it can be a rank: who hangs as one is missed
    positions = 40 if timeout > 1 else 99
    assert ready == {
        "kind": "ready",
        "member": MEMBER,
        "limits": {"vocabulary": 60, "positions": positions, "expert_bytes": 8},
    }
