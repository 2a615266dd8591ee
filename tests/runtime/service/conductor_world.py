"""A world of pretended members around a conductor.

The world knows the protocol of members by what `docs/elastic.md` says and nothing of how the conductor works. It holds
the store as a dictionary; reports wait in a bag from which they are taken in any order per sender, late, or twice, and
those of members that died may never come.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moeplace.placement.placement import index_order
from moeplace.profiling.errors import MoeplaceError
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.event import Event
from moeplace.runtime.service.api import RequestRecord
from moeplace.runtime.service.coordinator import actions
from moeplace.runtime.service.coordinator.conductor import Conductor
from moeplace.runtime.service.coordinator.helpers import make_plan
from moeplace.runtime.service.options import ServiceOptions

EXPERTS = 6
LIMITS = {"vocabulary": 60, "positions": 64, "expert_bytes": 8}
NEW_TOKENS = 3


def token(prompt: int, index: int) -> int:
    """The only right token: whoever serves the request, and however often."""
    return (prompt * 7 + index * 3) % 50


@dataclass
class Rank:
    """A pretended member.

    Attributes:
        generation: in which it serves, 0 = none.
        target: which it is to enter next, 0 = none.
        begun: whether its generation serves.
        applied: commands that it has done.
        requests: ticket -> (prompt, tokens).
        assigned: assignments that it has read.
        plan: number of the re-placement under way and the slots after it, None = none.
        slots: experts of its slots.
        is_deaf: whether it does not leave when it should.
    """

    member: int
    generation: int = 0
    target: int = 0
    begun: bool = False
    applied: int = 0
    requests: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    assigned: int = 0
    has_served: bool = False
    is_ready: bool = False
    is_stopped: bool = False
    is_deaf: bool = False
    connected: set[int] = field(default_factory=set)
    slots: list[int] | None = None


class World:
    """Members, the store, and what clients have heard. Carries out actions, and checks that each makes sense."""

    def __init__(self, *, keep_width: bool, ranks: int, restored: Sequence[RequestRecord] = (), taken: int = 0) -> None:
        """`restored`: requests in flight of a service before this one, which had handed out `taken` tickets."""
        self.options = ServiceOptions(timeout=8.0, start_timeout=1000.0, keep_width=keep_width)
        placement = index_order(np.full(1, EXPERTS), np.full(ranks, EXPERTS // ranks), np.zeros(ranks, np.int64))
        self.conductor = Conductor(placement, self.options, ranks=ranks)
        self.now = 1000.0
        self.clock_error = 0.0  # of the clock that the conductor sees: somebody may set it
        self.store: dict[str, Any] = {}
        self.log: dict[int, dict[str, Any]] = {}
        self.length = 0
        self.ranks: dict[int, Rank] = {}  # alive
        self.dead: set[int] = set()
        self.known_dead: set[int] = set()
        self.queue: deque[dict[str, Any]] = deque()
        self.timers: list[tuple[float, dict[str, Any]]] = []
        self.asked: dict[str, tuple[Request, int]] = {}
        self.told: dict[str, list[int]] = defaultdict(list)
        self.ended: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.errors: list[str] = []
        self.events: list[Event] = []
        self.dropped_groups: set[int] = set()
        self.fail_next_connection = False
        for record in restored:
            self.asked[record.ticket] = (record.request, record.request.token_ids[0])
            self.told[record.ticket] = list(record.token_ids)
        self.do(self.conductor.begin(self.now, restored=restored, taken=taken))

    # What the coordinator does

    def do(self, wanted: list[actions.Action]) -> None:
        for action in wanted:
            getattr(self, f"_do_{type(action).__name__}")(action)

    def _do_Put(self, action: actions.Put) -> None:
        self.store[action.key] = action.value

    def _do_Delete(self, action: actions.Delete) -> None:
        for key in action.keys:
            kind, _, index = key.partition("/")
            if kind == "log":
                behind = [rank.member for rank in self.ranks.values() if rank.begun and rank.applied < int(index)]
                assert not behind, f"members {behind} have not read command {index}"
                self.log.pop(int(index), None)
            self.store.pop(key, None)

    def _do_DropGroup(self, action: actions.DropGroup) -> None:
        self.dropped_groups.add(action.generation)
        assert all(rank.generation != action.generation for rank in self.ranks.values() if rank.begun)

    def _do_Append(self, action: actions.Append) -> None:
        assert action.index == self.length
        self.log[self.length] = action.command
        self.length += 1

    def _do_StartMember(self, action: actions.StartMember) -> None:
        assert action.member not in self.ranks
        assert action.member not in self.dead
        assert len(self.ranks) < 40, "members are started without end"
        self.ranks[action.member] = Rank(action.member)

    def _do_Kill(self, action: actions.Kill) -> None:
        assert action.member not in self.known_dead, "an action on the dead"
        self.die(action.member)

    def _do_Remind(self, action: actions.Remind) -> None:
        assert action.seconds > 0
        self.timers.append((self.now + action.seconds, action.report))

    def _do_MakePlan(self, action: actions.MakePlan) -> None:
        try:
            plan: Any = make_plan(action)
        except MoeplaceError as error:
            plan = str(error)
        self.queue.append({"kind": "planned", "number": action.number, "plan": plan})

    def _do_Accept(self, action: actions.Accept) -> None:
        assert action.ticket not in self.asked
        self.asked[action.ticket] = (action.request, action.request.token_ids[0])

    def _do_Tell(self, action: actions.Tell) -> None:
        ticket, event = action.ticket, action.event
        assert ticket in self.asked
        assert ticket not in self.ended, "told after its end"
        assert action.first == len(self.told[ticket]), "out of order"
        self.told[ticket] += event.token_ids
        prompt = self.asked[ticket][1]
        assert self.told[ticket] == [token(prompt, index) for index in range(len(self.told[ticket]))]
        if event.finish_reason is not None:
            self.ended[ticket] = event.finish_reason
            if event.finish_reason == "length":
                assert len(self.told[ticket]) == NEW_TOKENS
            if event.finish_reason == "failed":
                self.errors.append(str(event.error))

    def _do_Note(self, action: actions.Note) -> None:
        assert action.event.kind != "bad-report", action.event.sentence
        self.events.append(action.event)

    # What members do

    def die(self, member: int) -> None:
        if self.ranks.pop(member, None) is not None:
            self.dead.add(member)
            self.queue.append({"kind": "died", "member": member, "code": -9})

    def turn(self, member: int) -> None:
        """The next thing that a member does by itself."""
        rank = self.ranks[member]
        if rank.is_stopped:
            return
        if not rank.is_ready:
            rank.is_ready = True
            self.report(rank, kind="ready", limits=LIMITS)
        elif rank.begun:
            self._serve(rank)
        elif rank.target:
            self._enter(rank)
        elif rank.generation:  # it was lost in its generation
            self._follow(rank)
        else:
            self._await_assignment(rank)

    def report(self, rank: Rank, **document: Any) -> None:
        self.queue.append({"member": rank.member, **document})

    def _await_assignment(self, rank: Rank) -> None:
        number = self.store.get(f"assign/{rank.member}/{rank.assigned}")
        if number is None:
            return
        if number not in rank.connected:
            self._connect(rank, number)
        elif (answer := self.store.get(f"open/{number}")) is not None:
            rank.assigned += 1
            rank.target = number if answer else 0

    def _connect(self, rank: Rank, number: int) -> None:
        rank.connected.add(number)
        error, self.fail_next_connection = "no route to host" * self.fail_next_connection, False
        self.report(rank, kind="prepared", generation=number, error=error)

    def _follow(self, rank: Rank) -> None:
        successor = self.store.get(f"successor/{rank.generation}")
        if successor is None:
            return
        if rank.member in self.store[f"generation/{successor}"]["members"]:
            rank.generation, rank.target = 0, successor
        else:
            self.die(rank.member)

    def _enter(self, rank: Rank) -> None:
        """Once all members of the generation have come, they begin together."""
        number = rank.target
        if self.store.get(f"successor/{number}") is not None:
            self._lose(rank, number)
            return
        rank.connected.add(number)
        generation = self.store[f"generation/{number}"]
        present = [self.ranks.get(m) for m in generation["members"]]
        if any(r is None or r.target != number or number not in r.connected for r in present):
            return
        self._begin([r for r in present if r is not None], generation)

    def _begin(self, ranks: list[Rank], generation: dict[str, Any]) -> None:
        served = [rank for rank in ranks if rank.has_served]
        requests: dict[str, tuple[int, list[int]]] = {}
        applied = generation["applied"]
        if served:
            first = max(served, key=lambda rank: (rank.applied, sum(len(t) for _, t in rank.requests.values())))
            applied = first.applied
            requests = {ticket: (prompt, list(tokens)) for ticket, (prompt, tokens) in first.requests.items()}
        delivered = generation["delivered"]
        if delivered is not None:
            requests = {
                t: (p, max(tokens, delivered[t], key=len)) for t, (p, tokens) in requests.items() if t in delivered
            }
        slots = self._experts(ranks, generation)
        for rank, own in zip(ranks, slots, strict=True):
            rank.generation, rank.target, rank.begun, rank.has_served = generation["number"], 0, True, True
            rank.applied, rank.slots = applied, own
            rank.requests = {ticket: (prompt, list(tokens)) for ticket, (prompt, tokens) in requests.items()}
        self.report(
            ranks[0],
            kind="serving",
            generation=generation["number"],
            applied=applied,
            known={ticket: list(tokens) for ticket, (_, tokens) in requests.items()},
            seated=list(requests),
            running=len(requests),
            waiting=0,
            adopted=0,
            slots=[[own] for own in slots],
            version=1,
        )

    def _experts(self, ranks: list[Rank], generation: dict[str, Any]) -> list[list[int]]:
        given = generation["slots"]
        slots = [list(own[0]) for own in given] if given else [list(rank.slots or []) for rank in ranks]
        missing = set(range(EXPERTS)) - {expert for own in slots for expert in own}
        for expert in sorted(missing):
            min(slots, key=len).append(expert)
        return slots

    def _serve(self, rank: Rank) -> None:
        """A turn of a whole generation, in step; it ends where a member of it is gone."""
        generation = self.store[f"generation/{rank.generation}"]
        group = [self.ranks.get(member) for member in generation["members"]]
        if any(mate is None or not mate.begun or mate.generation != rank.generation for mate in group):
            self._lose(rank, rank.generation)
            return
        mates = [mate for mate in group if mate is not None]
        if rank.requests:
            self._step(mates)
        elif rank.applied < self.length:
            self._apply(mates)

    def _lose(self, rank: Rank, number: int) -> None:
        rank.begun, rank.generation, rank.target = False, number, 0
        self.report(rank, kind="lost", generation=number, error="connection closed by peer")

    def _step(self, mates: list[Rank]) -> None:
        told, applied = [], mates[0].applied
        for ticket, (prompt, tokens) in list(mates[0].requests.items()):
            index = len(tokens)
            ended = "length" if index + 1 == NEW_TOKENS else None
            if index < NEW_TOKENS:
                told.append([ticket, index, token(prompt, index), ended])
            for mate in mates:
                mate.requests[ticket][1].append(token(prompt, index))
                if ended or index >= NEW_TOKENS:
                    del mate.requests[ticket]
        number = mates[0].generation
        figures = {"waiting": 0, "running": len(mates[0].requests), "migration": None}
        self.report(mates[0], kind="step", generation=number, applied=applied, tokens=told, **figures)
        if mates[0].begun and mates[0].applied < self.length:
            self._apply(mates)

    def _apply(self, mates: list[Rank]) -> None:
        command = self.log[mates[0].applied]
        for mate in mates:
            mate.applied += 1
        kind = command["kind"]
        if kind == "add":
            request = command["request"]
            for mate in mates:
                mate.requests[request["request_id"]] = (request["token_ids"][0], list(command["added"]))
            return
        getattr(self, f"_apply_{kind}")(mates, command)

    def _apply_cancel(self, mates: list[Rank], command: dict[str, Any]) -> None:
        for mate in mates:
            mate.requests.pop(command["request_id"], None)

    def _apply_prepare(self, mates: list[Rank], command: dict[str, Any]) -> None:
        for mate in mates:
            if mate.member in command["generation"]["members"]:
                self._connect(mate, command["generation"]["number"])

    def _apply_switch(self, mates: list[Rank], command: dict[str, Any]) -> None:
        for mate in mates:
            mate.begun = False
            if command["generation"] in mate.connected:
                mate.generation, mate.target = 0, command["generation"]
            elif not mate.is_deaf:
                self.die(mate.member)

    def _apply_lost(self, mates: list[Rank], command: dict[str, Any]) -> None:
        if command["generation"] > mates[0].generation:
            for mate in mates:
                self._lose(mate, mate.generation)

    def _apply_replace(self, mates: list[Rank], command: dict[str, Any]) -> None:
        if command["generation"] != mates[0].generation:
            return
        slots = self._moved(command["slots_of_rank"])
        for mate, own in zip(mates, slots, strict=True):
            mate.slots = own
        self.report(
            mates[0], kind="replaced", number=command["number"], error="", slots=[[own] for own in slots], version=2
        )

    def _moved(self, slots_of_rank: list[int]) -> list[list[int]]:
        """Any placement with these slots will do: who holds what is not the conductor's business."""
        experts = deque(range(EXPERTS))
        slots = [[experts.popleft() if experts else -1 for _ in range(count)] for count in slots_of_rank]
        assert not experts
        return slots

    def _apply_stop(self, mates: list[Rank], command: dict[str, Any]) -> None:
        for mate in mates:
            mate.is_stopped = True
            self.report(mate, kind="stopped")

    # Time and reports

    def deliver(self, index: int, *, twice: bool = False) -> None:
        """A report arrives: the oldest one of some sender."""
        senders = list(dict.fromkeys(self._sender(report) for report in self.queue))
        sender = senders[index % len(senders)]
        place = next(i for i, report in enumerate(self.queue) if self._sender(report) == sender)
        report = self.queue[place]
        del self.queue[place]
        self.handle(report)
        if twice:
            self.handle(dict(report))

    def _sender(self, report: dict[str, Any]) -> Any:
        return report.get("member", "coordinator")

    def handle(self, report: dict[str, Any]) -> None:
        if report["kind"] == "died":
            self.known_dead.add(report["member"])
        self.do(self.conductor.handle(report, self.now + self.clock_error))

    def pass_time(self, seconds: float) -> None:
        """Members give signs of life meanwhile."""
        until = self.now + seconds
        while self.timers and min(self.timers, key=lambda timer: timer[0])[0] <= until:
            due = min(self.timers, key=lambda timer: timer[0])
            self.timers.remove(due)
            self.now = max(self.now, due[0])
            if due[1]["kind"] == "look":
                for member in list(self.ranks):
                    self.handle({"kind": "alive", "member": member, "turn": int(self.now), "state": "idle"})
            report = dict(due[1])
            if report["kind"] == "deadline":
                report["started"] = True
            self.handle(report)
        self.now = until

    def settle(self) -> None:
        """Let everything happen that is to happen, in order and without faults."""
        for _ in range(600):
            while self.queue:
                self.deliver(0)
            for member in sorted(self.ranks):
                if member in self.ranks:
                    self.turn(member)
            if not self.queue:
                self.pass_time(1.0)
            if not self.queue and self._is_at_rest():
                return
        raise AssertionError(f"no rest: {self.conductor.status()}")

    def _is_at_rest(self) -> bool:
        status = self.conductor.status()
        idle = all(rank.applied == self.length for rank in self.ranks.values() if rank.begun)
        return status.ended or (status.serving and not status.changing and not self.conductor.num_in_flight and idle)
