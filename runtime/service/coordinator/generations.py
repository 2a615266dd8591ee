"""Generations: which members are ranks, from the start of a service over every join, leave and loss to its end.

    start   as many members as are wanted, all ready -> proposed with the experts of each -> opened -> in force
    change  what `Membership.next_step` says: another generation, or experts that move
    loss    the ranks that are left -> opened -> in force; nobody is left that has served -> another start

Parts of it know one thing each: `Membership` who there is, `Succession` how one generation follows another,
`Replacing` which experts move, `Liveness` who gives signs of life.
"""

from collections.abc import Mapping

import numpy as np

from moeplace.placement.placement import Placement
from moeplace.placement.replacement.width_plan import WidthPlan
from moeplace.runtime.service.coordinator.actions import CommandLog, Document, Kill, Outbox, Put, Remind, StartMember
from moeplace.runtime.service.coordinator.liveness import Liveness
from moeplace.runtime.service.coordinator.membership import Membership, start_placement
from moeplace.runtime.service.coordinator.replacing import Replacing
from moeplace.runtime.service.coordinator.succession import Succession
from moeplace.runtime.service.generation import Generation, slots_of
from moeplace.runtime.service.options import ServiceOptions

_GRACE = 1.0
"""Seconds from the first word of a broken connection in which the end of the rank behind it may be reported."""
_MOST_FAILURES = 5
"""Starts, or generations that never began, in a row."""
_LONGEST_PAUSE = 30.0


class Generations:
    """See the module.

    Attributes:
        members, replacing, liveness: its parts.
        is_serving: whether requests are being answered.
        reason: see `ServiceStatus`.
        was_in_force: whether the generation that lost a rank last was in force, and not on its way.
    """

    def __init__(
        self, placement: Placement, options: ServiceOptions, log: CommandLog, out: Outbox, *, ranks: int
    ) -> None:
        self._options, self._out = options, out
        self.members = Membership(placement, ranks)
        self.replacing = Replacing(self.members, log, out)
        self.liveness = Liveness(options)
        self._succession = Succession(log, placement.mode, out)
        self.is_serving = self.was_in_force = False
        self.reason = "the members are starting"
        self._width = ranks  # wanted when ranks served last
        self._noticed: set[int] = set()  # members whose connections broke
        self._loaded: set[int] = set()
        self._errors: dict[int, tuple[str, bool]] = {}  # why members end, and whether another one would too
        self._failures = 0  # of starts, joins and proposals, in a row
        self._disconnections = 0  # since the last step
        self._pauses, self._is_pausing = 0, False
        self._failure = ""

    @property
    def number(self) -> int:
        """Of the generation in force, 0 = none."""
        return 0 if self.members.current is None else self.members.current.number

    @property
    def is_forming(self) -> bool:
        """Whether a generation is on its way."""
        return self._succession.is_changing

    @property
    def is_changing(self) -> bool:
        """Whether a change of ranks or of the placement is wanted or under way."""
        members = self.members
        going = self._succession.is_changing or self.replacing.is_busy or bool(self.replacing.wanted)
        return (
            going
            or bool(members.joining)
            or len(members.staying) != members.desired
            or (members.next_step().kind != "none")
        )

    def want(self, ranks: int) -> None:
        """Another number of ranks is wanted."""
        self.members.desired = self._width = ranks
        self._failures, self._is_pausing = 0, False

    def end(self, reason: str) -> None:
        """Nothing is answered any more."""
        self.is_serving, self.reason = False, reason

    @property
    def obedient(self) -> set[int]:
        """Members that read the log, or will in the generation to which they are on their way."""
        newest, states = self._succession.newest, self.members.members
        if newest is None or self._succession.settled is None:
            return set()
        return {member for member in newest.members if member in states and not states[member].doomed}

    def kill(self, member: int, why: str) -> None:
        """End a member that has not ended, once."""
        state = self.members.members.get(member)
        if state is not None and not state.doomed:
            state.doomed = why
            self._errors.setdefault(member, (why, False))
            self._out.add(Kill(member))

    # What members report

    def take_prepared(self, member: int, number: int, error: str) -> None:
        """A member has connected to the proposed generation, or could not."""
        proposed = self._succession.proposed
        if not error:
            self._succession.note_prepared(member, number)
        elif proposed is not None and proposed.number == number:
            self._give_up_proposal(proposed, f"member {member} could not connect: {error}")

    def take_loaded(self, member: int, number: int) -> None:
        """A member has read its experts; when all have, they go on together."""
        opened = self._succession.opened
        if opened is not None and opened.number == number:
            self._loaded.add(member)
            if self._loaded >= set(opened.members):
                self._out.add(Put(f"loaded/{number}", True))

    def take_serving(self, report: Document) -> list[int] | None:
        """A generation has begun on all its members: those that must end now. None = it is not the newest."""
        before = self.members.active
        if not self._succession.settle(report["generation"]):
            return None
        current = self.members.current = self._succession.settled
        assert current is not None
        self._noticed, self._loaded = set(), set()
        self._is_pausing, self._width = False, self.members.desired
        if current.delivered is None:  # as planned, and not because of a loss
            self._failures = 0
        self._take_placement(report)
        self.replacing.drop()
        if not self.is_serving:
            self.is_serving, self.reason = True, ""
        self._out.note(
            "serving",
            f"generation {current.number} serves with the members {list(current.members)}",
            generation=current.number,
            members=list(current.members),
            adopted=report["adopted"],
        )
        joined = [member for member in current.members if before and member not in before]
        if joined:
            self._out.note("joined", f"the members {joined} are ranks now", members=joined)
        states = self.members.members
        return [m for m, state in states.items() if state.leaving and m not in current.members]

    def note_step(self, migration: Mapping[str, object] | None) -> None:
        """The ranks in force have made a step."""
        self.replacing.migration = migration
        self._disconnections = 0

    def take_plan(self, number: int, plan: WidthPlan | str) -> None:
        """A re-placement is planned, or could not be."""
        self.reason = self.replacing.take_plan(number, plan) or self.reason

    def take_replaced(self, report: Document) -> None:
        """The ranks have carried a re-placement out, or taken it back."""
        if self.replacing.is_current(report["number"]) and not self._succession.opened:
            self._take_placement(report)
            self.reason = self.replacing.finish(report) or self.reason

    def expect_end(self, member: int, error: str, *, is_final: bool) -> None:
        """A member ends because of an error of its own."""
        if member in self.members.members:
            self._errors[member] = (error, is_final)

    # Losses

    def take_lost(self, member: int, number: int, error: str) -> bool:
        """A member's connections broke; whether those of all ranks have. Normally a rank has died, which is reported
        as well: there is some time for that."""
        newest, settled = self._succession.newest, self._succession.settled
        if newest is None:
            return False
        # Of the generation in force others still tell when the one that answers its loss is on its way: no news. It is
        # news where the one on its way was planned.
        in_force = settled if settled is not None and newest.delivered is None else newest
        if number not in (newest.number, in_force.number):
            return False
        if not self._noticed:
            self._out.add(Remind(_GRACE, {"kind": "late", "generation": newest.number}))
        self._noticed.add(member)
        return self._noticed >= set(newest.members) and self._note_disconnection(error)

    def is_disconnected(self, number: int) -> bool:
        """Whether the newest generation has lost connections, and it is still that one."""
        newest = self._succession.newest
        return newest is not None and newest.number == number and bool(self._noticed) and self._note_disconnection("")

    def take_death(self, member: int, report: Document) -> bool:
        """A member has ended; whether ranks must go on without it."""
        state = self.members.members.pop(member, None)
        if state is None:
            return False
        told = f"its process ended with code {report.get('code')}"
        why, is_final = self._errors.pop(member, (report.get("error") or told, False))
        newest, proposed = self._succession.newest, self._succession.proposed
        if newest is not None and member in newest.members:
            if self._succession.settled is None:
                self._note_failed_start(member, why, is_final=is_final)
                return False
            self._note_loss(member, why)
            self.was_in_force = self._succession.opened is None
            return True
        if proposed is not None and member in proposed.members:
            self._succession.withdraw()
        if member in self.members.active:  # the ranks go on without it already
            self._note_loss(member, why)
        elif state.leaving:
            self._out.note("left", f"member {member} has left", member=member, code=report.get("code"))
        elif self._succession.settled is None:
            self._note_failed_start(member, why, is_final=is_final)
        else:
            self._note_failed_join(member, why, is_final=is_final)
        return False

    def succeed(self, delivered: Mapping[str, list[int]]) -> bool:
        """The ranks that are left go on; whether there are any."""
        newest = self._succession.newest
        assert newest is not None
        self._succession.withdraw()
        self._noticed, self._loaded = set(), set()
        self.replacing.drop()
        left = [m for m in newest.members if m in self.members.members and not self.members.members[m].doomed]
        if any(member in self.members.active for member in left):
            self._succession.succeed(self.members.nodes(left), delivered)
            return True
        self._start_again(newest)
        return False

    def end_pause(self, number: int) -> None:
        """A pause is over, unless something else has failed since."""
        if number == self._pauses:
            self._is_pausing = False

    def check_start(self, member: int, *, has_started: bool) -> None:
        """The time in which a member must have become a rank is over; one that waits for room has not begun."""
        state = self.members.members.get(member)
        if state is None or member in self.members.active:
            return
        proposed, opened = self._succession.proposed, self._succession.opened
        is_awaited = any(g is not None and member in g.members for g in (proposed, opened))
        if has_started and (is_awaited or not state.ready):
            self.kill(member, f"it was no rank after {self._options.start_timeout:g} s")
        else:
            self._remind_of_start(member)

    # What is wanted

    def pursue(self, *, load: np.ndarray | None, expert_bytes: int) -> str:
        """Take the next step towards what is wanted; why there is no hope, "" = there is."""
        members = self.members
        if self._failure or self._is_pausing:
            return self._failure
        while len(members.staying) < members.desired:
            member = members.add()
            self._out.add(StartMember(member, members.members[member].node))
            self._remind_of_start(member)
        if self._succession.is_changing or self.replacing.is_busy:
            return ""
        if self._succession.settled is None:
            self._start()
            return ""
        step = members.next_step()
        if step.kind == "regroup":
            self._propose(step.members)
        elif step.kind == "rebalance":
            if not self.replacing.begin_width(step.members, load=load, expert_bytes=expert_bytes):
                self.reason = f"the members {list(step.members)} cannot all hold experts"
                members.stay_as_it_is()
        elif self.replacing.wanted:
            self.replacing.begin_next(expert_bytes=expert_bytes)
        return ""

    def _start(self) -> None:
        """Propose the first generation, once everybody is ready."""
        members = self.members
        wanted = members.wanted
        if len(wanted) != members.desired or not all(members.members[m].ready for m in wanted):
            return
        nodes = members.nodes(wanted)
        placement = start_placement(members.placement, Generation.of(0, nodes).nodes)
        self._propose(tuple(wanted), slots=[slots_of(placement, rank) for rank in range(placement.num_ranks)])

    def _propose(self, members: tuple[int, ...], slots: list[list[list[int]]] | None = None) -> None:
        states = {m: self.members.members[m] for m in members if m not in self.members.active}
        assignments = {member: state.assigned for member, state in states.items()}
        for state in states.values():
            state.assigned += 1
        self._succession.propose(self.members.nodes(members), assignments, slots=slots)

    def _start_again(self, newest: Generation) -> None:
        """Nobody is left that has served: what the desk knows is enough to go on with new members."""
        self.reason = "all ranks were lost; others start"
        self._out.note("restart", self.reason)
        self.is_serving, self._disconnections = False, 0
        for member, state in self.members.members.items():
            if member in newest.members or member in self.members.active:
                self.kill(member, "it had not served when all others were lost")
            state.leaving = state.leaving or bool(state.doomed)
        self._succession.end()
        self.members.current = None
        self.members.desired = self._width

    def _give_up_proposal(self, proposed: Generation, why: str) -> None:
        """Try again after a pause; members that would be new are given up in the end."""
        self._succession.withdraw()
        self._out.note("regroup-failed", why, generation=proposed.number)
        self.reason = why
        self._pause()
        if self._failures > _MOST_FAILURES:
            for member in proposed.members:
                if member not in self.members.active:
                    self.kill(member, why)

    def _note_disconnection(self, error: str) -> bool:
        """Connections broke although nobody died; who cannot be connected time and again is given up."""
        newest = self._succession.newest
        assert newest is not None
        self._disconnections += 1
        self._out.note("loss", f"members lost their connections: {error or 'no rank has died'}")
        if self._disconnections > _MOST_FAILURES:
            for member in newest.members:
                self.kill(member, "it could not be connected to the others")
        return True

    def _note_loss(self, member: int, why: str) -> None:
        members = self.members
        if not members.wanted:  # those that were about to leave are all there is
            members.keep(max(members.desired, 1))
        if not self._options.keep_width:
            members.desired = len(members.staying)
        self._out.note("loss", f"member {member} was lost: {why}", member=member)

    def _note_failed_join(self, member: int, why: str, *, is_final: bool) -> None:
        """The service goes on as it is; a member that was to replace another one is replaced itself, some times."""
        self.reason = f"member {member} could not join: {why}"
        self._out.note("join-failed", self.reason, member=member)
        self._pause()
        if is_final or not self._options.keep_width or self._failures > _MOST_FAILURES:
            self.members.desired = len(self.members.staying)

    def _note_failed_start(self, member: int, why: str, *, is_final: bool) -> None:
        """Others start anew, unless it would be of no use."""
        self.reason = f"member {member} could not start: {why}"
        opened = self._succession.opened
        if opened is not None:
            for other in opened.members:
                if other in self.members.members:
                    self.kill(other, "the others of its start were lost")
                    self.members.members[other].leaving = True
        self._succession.end()
        self._loaded, self._noticed = set(), set()
        self._out.note("start-failed", self.reason, member=member)
        self._pause()
        if is_final or self._failures > _MOST_FAILURES:
            self._failure = self.reason

    def _pause(self) -> None:
        """Something failed: wait, the longer the more often it has."""
        self._failures += 1
        self._pauses, self._is_pausing = self._pauses + 1, True  # until a reminder: the clock may be set meanwhile
        seconds = min(0.1 * 2.0**self._failures, _LONGEST_PAUSE)
        self._out.add(Remind(seconds, {"kind": "rested", "pause": self._pauses}))

    def _remind_of_start(self, member: int) -> None:
        self._out.add(Remind(self._options.start_timeout, {"kind": "deadline", "member": member}))

    def _take_placement(self, report: Document) -> None:
        current, placement = self.members.current, self.members.placement
        assert current is not None
        parts = [np.array(own, np.int32).reshape(placement.num_layers, -1) for own in report["slots"]]
        self.replacing.version = report["version"]
        self.members.placement = Placement(
            np.hstack(parts),
            np.array([part.shape[1] for part in parts]),
            current.node_of_rank,
            placement.experts_per_layer,
            placement.layer_ids,
            placement.num_hidden_layers,
            current.mode,
        )
