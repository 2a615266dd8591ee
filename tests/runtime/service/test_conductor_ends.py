"""The conductor at the beginning and at the end of a service, and what it says of what happens between."""

from itertools import pairwise

import pytest

from moeplace.placement.placement import Placement
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.event import Event
from moeplace.runtime.service.api import RequestRecord
from moeplace.runtime.service.coordinator import actions
from tests.runtime.service.conductor_world import NEW_TOKENS, World, token
from tests.runtime.service.serving_world import ask, notes, serving


def events(world: World, kind: str) -> list[Event]:
    """Of that kind, so far."""
    return [event for event in world.events if event.kind == kind]


@pytest.mark.parametrize("delivered", [0, 1, NEW_TOKENS - 1])
def test_requests_of_a_service_before_go_on(delivered: int) -> None:
    """From their last token on, each once; new ones get tickets that nobody had."""
    request = Request("a", (4,), NEW_TOKENS, stop_ids=())
    record = RequestRecord("3:a", request, tuple(token(4, index) for index in range(delivered)))
    world = World(keep_width=True, ranks=2, restored=[record], taken=7)
    restored = events(world, "restored")
    assert [event.sentence for event in restored] == ["1 requests in flight are taken up again"]
    assert restored[0].time == world.now
    world.settle()
    new = ask(world, "a", prompt=9)
    assert new == "8:a"
    world.settle()
    assert world.ended == {"3:a": "length", new: "length"}


def test_a_service_without_a_past_says_nothing_of_one() -> None:
    """Nothing was taken up."""
    assert "restored" not in notes(World(keep_width=True, ranks=2))


def test_at_the_end_ranks_stop_in_order_and_others_at_once() -> None:
    """Ranks wait for the word that all have stopped; a member that still starts is ended; requests hear why."""
    world = serving(2)
    world.conductor.scale(3, None)
    world.do(world.conductor.take_actions())
    ticket = ask(world)
    world.conductor.end("the machine is wanted back")
    made = world.conductor.take_actions()
    assert [action.member for action in made if isinstance(action, actions.Kill)] == [2]
    assert [action.command["kind"] for action in made if isinstance(action, actions.Append)][-1] == "stop"
    assert not [action for action in made if isinstance(action, actions.Put) and action.key == "stopped"]
    world.do(made)
    assert world.errors == ["the machine is wanted back"]
    assert world.ended == {ticket: "failed"}
    assert not world.conductor.is_stopped
    for member in (0, 1):
        assert "stopped" not in world.store
        world.handle({"kind": "stopped", "member": member})
    assert world.conductor.is_stopped
    assert world.store["stopped"] is True


def test_a_rank_that_dies_instead_of_stopping_is_not_waited_for() -> None:
    """The others get the word all the same."""
    world = serving(2)
    world.conductor.end("enough")
    world.do(world.conductor.take_actions())
    world.handle({"kind": "stopped", "member": 1})
    world.die(0)
    while world.queue:
        world.deliver(0)
    assert world.conductor.is_stopped
    assert world.store["stopped"] is True


def test_a_service_that_ends_while_it_starts_ends_all_members() -> None:
    """Nobody reads the log yet."""
    world = World(keep_width=True, ranks=3)
    world.turn(1)
    world.conductor.end("enough")
    made = world.conductor.take_actions()
    assert sorted(action.member for action in made if isinstance(action, actions.Kill)) == [0, 1, 2]
    assert not [action for action in made if isinstance(action, actions.Append)]
    assert world.conductor.is_stopped


def test_a_start_that_fails_is_told_and_made_again_after_a_pause() -> None:
    """The longer, the more often it has failed."""
    world, pauses = World(keep_width=True, ranks=1), []
    for turn in range(4):
        world.die(max(world.ranks))
        while world.queue:
            world.deliver(0)
        assert len(events(world, "start-failed")) == turn + 1
        died_at = world.now
        while not world.ranks:
            world.pass_time(0.05)
        pauses.append(world.now - died_at)
    assert events(world, "start-failed")[-1].figures == {"member": 3}
    assert all(later > 1.5 * earlier for earlier, later in pairwise(pauses))


@pytest.mark.parametrize("set_by", [-100_000.0, -20.0, 20.0, 100_000.0])
def test_a_clock_that_is_set_makes_no_pause_longer(set_by: float) -> None:
    """A start fails, the clock of the machine is set, and others start all the same, when they would have."""
    world = World(keep_width=True, ranks=1)
    for _ in range(4):
        world.die(max(world.ranks))
        while world.queue:
            world.deliver(0)
        world.clock_error += set_by
        died_at = world.now
        while not world.ranks and world.now < died_at + 100:
            world.pass_time(0.05)
        assert world.now - died_at < 5
        assert world.ranks


def test_the_time_from_a_loss_to_a_token_is_told() -> None:
    """Once per loss, from when it was noticed; no step without a token counts."""
    world = serving(2)
    ask(world)
    world.die(1)
    while world.queue:
        world.deliver(0)
    noticed = world.now
    world.pass_time(0.75)
    step = {"kind": "step", "generation": 1, "applied": 0, "waiting": 0, "running": 1, "migration": None}
    world.handle({**step, "tokens": []})
    assert not events(world, "resumed")
    world.settle()
    resumed = events(world, "resumed")
    assert len(resumed) == 1
    assert resumed[0].figures["seconds"] == pytest.approx(resumed[0].time - noticed)
    assert 0.75 <= resumed[0].figures["seconds"] < 60
    ask(world, "b")
    world.settle()
    assert len(events(world, "resumed")) == 1


@pytest.mark.parametrize("report", [{"kind": "nonsense"}, {"kind": "step"}, {"kind": "died", "member": "x"}])
def test_a_report_that_cannot_be_used_is_told(report: dict[str, object]) -> None:
    """And nothing else comes of it."""
    made = serving(1).conductor.handle(report, 5.0)
    assert [type(action) for action in made] == [actions.Note]
    assert (made[0].event.kind, made[0].event.time) == ("bad-report", 5.0)  # type: ignore[union-attr]


def turned(world: World) -> Placement:
    """The placement in force with its slots in the opposite order."""
    placement = world.conductor.placement
    return placement.replace(
        slot_to_expert=placement.slot_to_expert[:, ::-1], slots_of_rank=placement.slots_of_rank[::-1]
    )


def test_placements_that_are_wanted_come_to_pass_in_their_order() -> None:
    """One after the other; one for ranks that are no more is told to have failed, and the next one is done."""
    world = serving(2)
    for _ in range(2):
        world.conductor.replace(turned(world))
    world.do(world.conductor.take_actions())
    world.settle()
    assert notes(world).count("replaced") == 2
    assert "replace-failed" not in notes(world)
    assert world.conductor.status().placement_version == 2
    for _ in range(2):
        world.conductor.replace(turned(world))
    world.conductor.scale(3, None)
    world.do(world.conductor.take_actions())
    world.die(1)
    world.settle()
    told = [event.sentence for event in events(world, "replace-failed")]
    assert told == ["the placement is for 2 ranks, but 3 are active"]  # the other one was under way and was dropped
    assert notes(world).count("replaced") == 3  # the last one gave the newcomers experts
    assert not world.conductor.status().changing


def test_who_joins_is_told() -> None:
    """Not of those with whom the service begins."""
    world = serving(2)
    assert not events(world, "joined")
    world.conductor.scale(4, None)
    world.do(world.conductor.take_actions())
    world.settle()
    assert [event.figures["members"] for event in events(world, "joined")] == [[2, 3]]


def test_newcomers_that_cannot_be_connected_are_given_up_and_nobody_else() -> None:
    """After some proposals; the ranks that serve go on."""
    world = serving(2, keep_width=False)
    world.conductor.scale(3, None)
    world.do(world.conductor.take_actions())
    ticket = ask(world)
    for _ in range(400):
        world.fail_next_connection = True
        while world.queue:
            world.deliver(0)
        for member in sorted(world.ranks):
            if member in world.ranks:
                world.turn(member)
        if 2 not in world.ranks:
            break
        world.pass_time(1.0)
    assert len(events(world, "regroup-failed")) == 6
    world.settle()
    assert set(world.ranks) == {0, 1}
    assert world.ended == {ticket: "length"}


def test_a_service_that_fails_says_so_in_its_log() -> None:
    """Once, with the reason that its status has."""
    world = World(keep_width=True, ranks=1)
    world.handle({"kind": "failed", "member": 0, "error": "there is no such checkpoint", "final": True})
    world.die(0)
    world.settle()
    assert [event.sentence for event in events(world, "failed")] == [world.conductor.status().reason]


def test_routing_is_asked_of_the_ranks_that_serve_and_of_nobody_else() -> None:
    """Before there are any, nothing is asked; while it is asked for, not again."""
    world = World(keep_width=True, ranks=2)
    assert world.conductor.routing() is None
    assert not [a for a in world.conductor.take_actions() if isinstance(a, actions.Append)]
    world.settle()
    for _ in range(2):
        assert world.conductor.routing() is None
    asked = [a.command for a in world.conductor.take_actions() if isinstance(a, actions.Append)]
    assert [command["kind"] for command in asked] == ["routing"]
