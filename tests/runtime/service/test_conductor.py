"""The conductor under any order of reports: hypothesis decides what happens next in a world of pretended members."""

from contextlib import suppress
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.service.coordinator import actions
from moeplace.runtime.service.coordinator.actions import CommandLog, Outbox
from moeplace.runtime.service.coordinator.reports import FIELDS
from moeplace.runtime.service.coordinator.requests import RequestDesk
from tests.runtime.service.conductor_world import EXPERTS, NEW_TOKENS, World
from tests.runtime.service.serving_world import ask, notes, serving


class ConductorMachine(RuleBasedStateMachine):
    """Anything in any order. Whatever was done, everything comes to rest and every request has ended once."""

    world: World

    @initialize(keep_width=st.booleans(), ranks=st.sampled_from([1, 2, 3]))
    def begin(self, keep_width: bool, ranks: int) -> None:
        self.world = World(keep_width=keep_width, ranks=ranks)
        self.kills = 0

    @rule()
    def let_it_settle(self) -> None:
        self.world.settle()

    @rule(which=st.integers(0, 7), times=st.integers(1, 6))
    def members_act(self, which: int, times: int) -> None:
        for _ in range(times):
            alive = sorted(self.world.ranks)
            if alive:
                self.world.turn(alive[which % len(alive)])

    @precondition(lambda self: self.world.queue)
    @rule(which=st.integers(0, 7), twice=st.booleans())
    def a_report_comes(self, which: int, twice: bool) -> None:
        self.world.deliver(which, twice=twice)

    @rule(prompt=st.integers(0, 40), name=st.sampled_from("ab"))
    def somebody_asks(self, prompt: int, name: str) -> None:
        conductor = self.world.conductor
        try:
            conductor.submit(Request(name, (prompt,), NEW_TOKENS, stop_ids=()))
        except MoeplaceError:
            assert not conductor.limits or conductor.is_over
        self.world.do(conductor.take_actions())

    @rule(name=st.sampled_from("ab"))
    def somebody_cancels(self, name: str) -> None:
        self.world.conductor.cancel(name, None)
        self.world.do(self.world.conductor.take_actions())

    @precondition(lambda self: self.world.ranks and self.kills < 12)
    @rule(which=st.integers(0, 7), everybody=st.booleans())
    def members_die(self, which: int, everybody: bool) -> None:
        alive = sorted(self.world.ranks)
        for member in alive if everybody else [alive[which % len(alive)]]:
            self.world.die(member)
            self.kills += 1

    @rule(ranks=st.integers(1, EXPERTS))
    def somebody_scales(self, ranks: int) -> None:
        with suppress(MoeplaceError):
            self.world.conductor.scale(ranks, None)
        self.world.do(self.world.conductor.take_actions())

    @rule()
    def somebody_replaces(self) -> None:
        placement = self.world.conductor.placement
        turned = placement.replace(
            slot_to_expert=placement.slot_to_expert[:, ::-1], slots_of_rank=placement.slots_of_rank[::-1]
        )
        with suppress(MoeplaceError):
            self.world.conductor.replace(turned)
        self.world.do(self.world.conductor.take_actions())

    @precondition(lambda self: any(not rank.begun and rank.is_ready for rank in self.world.ranks.values()))
    @rule()
    def a_connection_fails(self) -> None:
        world = self.world
        proposed = [n for n in range(40) if f"generation/{n}" in world.store and f"open/{n}" not in world.store]
        rank = next(rank for rank in world.ranks.values() if rank.is_ready)
        if proposed and proposed[-1] not in rank.connected:
            rank.connected.add(proposed[-1])
            world.report(rank, kind="prepared", generation=proposed[-1], error="no route to host")

    @rule(seconds=st.sampled_from([0.1, 1.1, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "world"):
            failed = [ticket for ticket, reason in self.world.ended.items() if reason == "failed"]
            assert not failed or self.world.conductor.is_over, self.world.errors
            in_flight = self.world.conductor.num_in_flight
            assert in_flight == len(self.world.asked) - len(self.world.ended)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            world = self.world
            world.settle()
            if not world.conductor.is_over:
                self.somebody_asks(7, "last")
                world.settle()
            assert set(world.ended) == set(world.asked)
            assert not world.conductor.num_in_flight
            if not world.conductor.is_over:
                status = world.conductor.status()
                assert status.active == status.routable == status.allocated == tuple(sorted(world.ranks))
                assert len(status.active) == status.desired
                assert len(world.log) <= 2, "commands that all have read stay"


ConductorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestConductor = ConductorMachine.TestCase


def die_of(world: World, poison: str) -> None:
    """Let the ranks that begin with a request die, all of them, as often as they do."""
    for _ in range(200):
        while world.queue:
            world.deliver(0)
        for member in sorted(world.ranks):
            rank = world.ranks.get(member)
            if rank is not None and poison in rank.requests and rank.begun:
                world.report(rank, kind="pass", generation=rank.generation, tickets=list(rank.requests))
                for other in list(world.ranks):
                    world.die(other)
            elif rank is not None:
                world.turn(member)
        world.pass_time(1.0)
        if not world.queue and not world.conductor.num_in_flight:
            return
    raise AssertionError("it is tried for ever")


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("keep_width", [False, True])
def test_a_request_that_kills_its_ranks_is_the_one_that_fails(ranks: int, keep_width: bool) -> None:
    """All that are in its passes with it are served in the end."""
    world = serving(ranks, keep_width=keep_width)
    tickets = [ask(world, name, prompt) for prompt, name in enumerate("abcd")]
    die_of(world, tickets[2])
    assert world.ended == {tickets[0]: "length", tickets[1]: "length", tickets[2]: "failed", tickets[3]: "length"}
    assert "the ranks that served it were lost 4 times" in world.errors[0]
    world.settle()
    assert world.conductor.status().serving


def test_ranks_that_die_often_cost_no_request() -> None:
    """All at once, 20 times, each time a token after the last one: nobody is to blame."""
    world = serving(3)
    for turn in range(20):
        ticket = ask(world, f"r{turn}", turn)
        world.turn(min(world.ranks))
        world.turn(min(world.ranks))
        for member in list(world.ranks):
            world.die(member)
        world.settle()
        assert world.ended[ticket] == "length"
    assert notes(world).count("restart") == 20


def test_cancel_and_the_same_name_again() -> None:
    """What still comes of the first request is not taken for the second."""
    world = serving(2)
    first = ask(world, "a", prompt=1)
    for _ in range(3):
        world.turn(0)
    world.conductor.cancel("a", None)
    world.do(world.conductor.take_actions())
    second = ask(world, "a", prompt=2)
    other = ask(world, "a", prompt=3)
    world.conductor.cancel("a", other)
    world.do(world.conductor.take_actions())
    world.settle()
    assert world.ended == {first: "cancelled", second: "length", other: "cancelled"}


def test_a_token_out_of_turn_fails_its_request_alone() -> None:
    """A gap, a place before the beginning, more than was asked for: the ranks are told to drop it, the rest goes on."""
    for index, count in ((1, 1), (0, NEW_TOKENS + 1), (-1, 1)):
        world = serving(2)
        bad, good = ask(world, "bad"), ask(world, "good")
        told = [[bad, index + n, 5, None] for n in range(count)]
        if count > 1:
            world.told[bad] = []
        step = {"kind": "step", "generation": 1, "applied": 0, "tokens": told, "waiting": 0, "running": 2}
        made = world.conductor.handle({**step, "migration": None}, world.now)
        ends = [a for a in made if isinstance(a, actions.Tell) and a.event.finish_reason == "failed"]
        assert [a.ticket for a in ends] == [bad]
        assert {"kind": "cancel", "request_id": bad} in [a.command for a in made if isinstance(a, actions.Append)]
        assert world.conductor.find("good") is not None
        assert good in world.asked


anything = st.none() | st.booleans() | st.integers(-5, 50) | st.text(max_size=3) | st.lists(st.integers(), max_size=2)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(FIELDS)), data=st.data())
def test_a_report_that_makes_no_sense_ends_nothing(kind: str, data: st.DataObject) -> None:
    """Any fields of any type; requests that it does not name are served to their end."""
    world = serving(2)
    ticket = ask(world)
    report: dict[str, Any] = {"kind": kind, **{name: data.draw(anything) for name in FIELDS[kind]}}
    harmful = kind in ("died", "failed", "stopped", "lost", "linger", "deadline", "serving", "refused", "routing")
    if harmful:
        report = {name: value for name, value in report.items() if name == "kind" or not isinstance(value, int)}
    made = world.conductor.handle(report, world.now)
    world.do([a for a in made if not isinstance(a, actions.Note)])
    world.settle()
    assert world.ended == {ticket: "length"}


def test_more_ranks_than_experts_are_refused() -> None:
    """At once, whatever the number, and nothing is started."""
    world = serving(2)
    for ranks in (EXPERTS + 1, 10**6):
        with pytest.raises(InputError, match=rf"ranks \({ranks}\) must be at most {EXPERTS}"):
            world.conductor.scale(ranks, None)
    assert not [a for a in world.conductor.take_actions() if isinstance(a, actions.StartMember)]


def test_a_member_that_starts_too_slowly_is_given_up() -> None:
    """From when its process runs; until then it waits for room. One that is ready and waits for others is not."""
    world = serving(1, keep_width=False)
    world.conductor.scale(3, None)
    world.do(world.conductor.take_actions())
    world.turn(1)  # ready; member 2 is not
    while world.queue:
        world.deliver(0)
    world.handle({"kind": "deadline", "member": 2, "started": False})
    world.handle({"kind": "deadline", "member": 1, "started": True})
    assert set(world.ranks) == {0, 1, 2}
    world.handle({"kind": "deadline", "member": 2, "started": True})
    assert set(world.ranks) == {0, 1}
    world.settle()
    assert world.conductor.status().active == (0, 1)


def test_a_member_that_does_not_leave_is_ended() -> None:
    """When a generation without it has begun for some time."""
    world = serving(2)
    world.conductor.scale(1, [1])
    world.do(world.conductor.take_actions())
    world.ranks[1].is_deaf = True
    world.settle()
    assert world.conductor.status().active == (0,)
    world.pass_time(11.0)
    assert set(world.ranks) == {0}


def test_a_failed_proposal_of_a_leave_is_made_again() -> None:
    """A connection fails once; the rank leaves all the same, and later changes happen."""
    world = serving(3)
    world.conductor.scale(2, [2])
    world.do(world.conductor.take_actions())
    world.fail_next_connection = True
    world.settle()
    assert "regroup-failed" in notes(world)
    assert world.conductor.status().active == (0, 1)
    world.conductor.scale(3, None)
    world.do(world.conductor.take_actions())
    world.settle()
    assert len(world.conductor.status().active) == 3


def test_a_start_that_fails_for_good_says_why() -> None:
    """An error that another member would find as well ends the service; one that may pass does not."""
    world = World(keep_width=True, ranks=2)
    world.handle({"kind": "failed", "member": 1, "error": "the checkpoint has no config.json", "final": True})
    world.die(1)
    world.settle()
    status = world.conductor.status()
    assert (status.ended, status.reason) == (True, "member 1 could not start: the checkpoint has no config.json")
    world = World(keep_width=True, ranks=2)
    for _ in range(3):
        world.die(max(world.ranks))
        while world.queue:
            world.deliver(0)
        world.pass_time(5.0)
    world.settle()
    assert world.conductor.status().serving


def test_commands_that_all_have_read_are_deleted() -> None:
    """However many there were."""
    world = serving(2)
    for turn in range(30):
        ask(world, f"r{turn}")
        world.settle()
    assert len(world.log) <= 1


def test_keys_of_generations_that_are_over_are_deleted() -> None:
    """However many there were."""
    world = serving(2)
    for _ in range(10):
        world.die(max(world.ranks))
        world.settle()
    kinds = ("generation", "successor", "open", "settled", "loaded")
    numbers = {int(key.partition("/")[2]) for key in world.store if key.startswith(kinds)}
    assert len(numbers) <= 6
    assert max(numbers) - min(numbers) <= 5
    assert world.dropped_groups >= set(range(1, min(numbers)))


def test_a_token_clears_a_request() -> None:
    """However often its ranks are lost: as long as it gets a token each time, it is not the reason."""
    out = Outbox()
    desk = RequestDesk(CommandLog(out), out)
    ticket = desk.take(Request("a", (1,), 9))
    for turn in range(8):
        desk.begin_pass([ticket])
        desk.blame()
        assert not desk.entries[ticket].is_aside
        desk.hear(ticket, turn, [5], None)
    for _ in range(2):
        desk.begin_pass([ticket])
        desk.blame()
    assert desk.entries[ticket].is_aside


def test_late_words_of_a_loss_are_no_other_loss() -> None:
    """The rank's end is told first; that the connections of the others broke comes afterwards, however late. The
    generation that answers the loss stays the one that does."""
    world = serving(3)
    world.die(2)
    while world.queue:
        world.deliver(0)
    opened = world.store["successor/1"]
    for member in (0, 1):
        world.handle({"kind": "lost", "member": member, "generation": 1, "error": "connection closed by peer"})
        world.pass_time(1.5)
    assert f"successor/{opened}" not in world.store
    world.settle()
    assert world.conductor.status().generation >= opened
    assert notes(world).count("loss") == 1


def test_broken_connections_of_the_generation_on_its_way_are_a_loss() -> None:
    """Told of that one, by all or by one who is not followed by others in time."""
    for tell in ((0, 1), (0,)):
        world = serving(3)
        world.die(2)
        while world.queue:
            world.deliver(0)
        opened = world.store["successor/1"]
        for member in tell:
            world.handle({"kind": "lost", "member": member, "generation": opened, "error": "reset by peer"})
        assert (f"successor/{opened}" in world.store) is (len(tell) == 2)
        world.pass_time(1.5)
        assert f"successor/{opened}" in world.store
        world.settle()
        assert world.conductor.status().serving


def test_those_who_wait_for_readers_hear_of_a_loss() -> None:
    """A rank is lost, and another one before it has read what fell to it: who has read does not wait on for it. When
    all have read, all go on."""
    world, opened = serving(3), [1]
    for victim in (2, 1):
        world.die(victim)
        while world.queue:
            world.deliver(0)
        opened.append(world.store[f"successor/{opened[-1]}"])
        readers = [m for m in world.store[f"generation/{opened[-1]}"]["members"] if m != 1]
        assert f"loaded/{opened[-1]}" not in world.store
        for member in readers:
            world.handle({"kind": "loaded", "member": member, "generation": opened[-1]})
    assert [world.store[f"loaded/{number}"] for number in opened[1:]] == [False, True]
    world.settle()
    assert world.conductor.status().serving


def test_ranks_that_cannot_be_connected_are_given_up() -> None:
    """Connections break though all live: the same ranks meet again, some times; then others start. Nothing is lost."""
    world = serving(2)
    first, ticket = set(world.ranks), ask(world)
    for turn in range(8):
        for rank in [rank for rank in world.ranks.values() if rank.begun]:
            world._lose(rank, rank.generation)
        for _ in range(6):
            while world.queue:
                world.deliver(0)
            for member in [m for m, rank in sorted(world.ranks.items()) if not rank.begun]:
                if member in world.ranks:
                    world.turn(member)
        assert (set(world.ranks) == first) == (turn < 5)
    world.settle()
    assert world.ended == {ticket: "length"}
    assert notes(world).count("restart") == 1
