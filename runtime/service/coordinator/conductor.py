"""Conductor: what the coordinator does about what happens. One call of `handle` per report, no thread, no waiting.

Reports come from members (ready, prepared, loaded, serving, step, counters, replaced, refused, lost, stopped, failed),
from those who watch over them (died, late, linger, deadline, planned) and from callers (wish, cancel).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np

from moeplace.placement.migration.file import plan_to_json
from moeplace.placement.placement import Placement
from moeplace.placement.replacement.width import rebalance
from moeplace.placement.replacement.width_plan import WidthPlan, plan_width
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.service.api import ServiceEvent, ServiceOptions, TokenEvent
from moeplace.runtime.service.command_log import CommandLog
from moeplace.runtime.service.coordinator.figures import ServiceFigures
from moeplace.runtime.service.coordinator.membership import Membership
from moeplace.runtime.service.coordinator.requests import Deliver, RequestLedger
from moeplace.runtime.service.coordinator.succession import Succession
from moeplace.runtime.service.member.serving import slots_of
from moeplace.runtime.service.routing_request import RoutingRequest
from moeplace.runtime.service.store import Document, ServiceStore

logger = logging.getLogger(__name__)

_LATE = 5.0
"""Most seconds that a member may notice the loss of a rank later than the first one, before it counts as hung."""


_LINGERING = 10.0
"""Seconds that a member may take to end after a generation without it has begun."""
MAX_EVENTS = 10_000
"""Of the event log; older ones are forgotten."""


class Helper(Protocol):
    """What takes time, and comes back as a report."""

    def start_member(self) -> None:
        """Start another member; "ready" or "died" follows."""

    def remind(self, seconds: float, report: Document) -> None:
        """Report something after some time."""

    def plan(self, number: int, make: Callable[[], WidthPlan]) -> None:
        """Plan in the background; "planned" follows, with the plan or an error."""


class Conductor:
    """See the module.

    Attributes:
        members, succession, log, ledger, figures: what the coordinator knows.
        is_serving: whether requests are being answered.
        reason: see `ServiceStatus`.
        is_over: the service has ended; nothing more is done.
        events: the event log.
        deliveries: what is to be told to those who asked; the caller takes it.
        replacements: placements that callers want.
        steps, waiting, running, version, migration: see `ServiceStatus`.
        limits: what a request has to keep to, as a member told; empty before.
        on_step: called with every report of a step.
    """

    def __init__(
        self,
        store: ServiceStore,
        checkpoint: Checkpoint,
        placement: Placement,
        options: ServiceOptions,
        helper: Helper,
        *,
        ranks: int,
    ) -> None:
        self._store, self._checkpoint, self._options, self._helper = store, checkpoint, options, helper
        self.log = CommandLog(store)
        self.routing = RoutingRequest(self.log)
        self.succession = Succession(store, self.log, placement.mode)
        self.members = Membership(desired=ranks, placement=placement)
        self.ledger, self.figures = RequestLedger(), ServiceFigures()
        self.is_serving = self.is_over = False
        self.reason = "the members are starting"
        self.events: deque[ServiceEvent] = deque(maxlen=MAX_EVENTS)
        self.deliveries: list[tuple[Deliver, TokenEvent]] = []
        self.replacements: deque[Placement] = deque()
        self.steps = self.waiting = self.running = self.version = 0
        self.migration: Mapping[str, Any] | None = None
        self.limits: Mapping[str, int] = {}
        self.stopped: set[int] = set()
        self.on_step: Callable[[Document], None] | None = None
        self._assigned: dict[int, int] = {}
        self._noticed: set[int] = set()  # members that have noticed that a rank is lost
        self._loaded: set[int] = set()
        self._errors: dict[int, str] = {}
        self._plans = 0
        self._replacing: Document | None = None  # a re-placement that is planned or under way
        self._lost_at: float | None = None

    def handle(self, report: Document) -> None:
        """Do what follows from a report."""
        kind = report["kind"]
        if self.is_over and kind not in ("died", "stopped", "step"):
            return
        getattr(self, f"_on_{kind}")(report)
        if not self.is_over:
            self._pursue()

    @property
    def is_changing(self) -> bool:
        """Whether a change of ranks or of the placement is wanted or under way."""
        members = self.members
        going = self.succession.is_changing or self._replacing is not None or bool(self.replacements)
        return (
            going
            or bool(members.joining)
            or len(members.wanted) != members.desired
            or (members.next_step().kind != "none")
        )

    def note(self, kind: str, sentence: str, **figures: Any) -> None:
        """Write into the event log."""
        logger.info("%s: %s", kind, sentence)
        self.events.append(ServiceEvent(time.time(), kind, sentence, figures))

    def end(self, reason: str) -> None:
        """Answer no more; requests in flight fail."""
        self.is_over, self.is_serving, self.reason = True, False, reason
        for request_id in list(self.ledger.entries):
            self._end_request(request_id, "failed", reason)

    def _fail(self, reason: str) -> None:
        self.note("failed", reason)
        self.end(reason)
        for state in self.members.members.values():
            state.process.kill()

    # Requests

    def _on_step(self, report: Document) -> None:
        for request_id, index, token, reason in report["tokens"]:
            self._hear(request_id, index, [token], reason)
        self.steps += 1
        self.waiting, self.running, self.migration = report["waiting"], report["running"], report["migration"]
        self.log.forget(report["applied"])
        if self._lost_at is not None and report["tokens"] and not self.succession.is_changing:
            seconds = time.time() - self._lost_at
            self._lost_at = None
            self.note("resumed", f"the first token came {seconds:.2f} s after the loss was noticed", seconds=seconds)
        if self.on_step is not None:
            self.on_step(report)

    def _on_refused(self, report: Document) -> None:
        self._end_request(report["request_id"], "failed", report["error"])

    def _on_cancel(self, report: Document) -> None:
        if report["request_id"] in self.ledger.entries:
            self.log.append({"kind": "cancel", "request_id": report["request_id"]})
            self._end_request(report["request_id"], "cancelled")

    def _hear(self, request_id: str, index: int, tokens: list[int], reason: Literal["stop", "length"] | None) -> None:
        delivery = self.ledger.deliver(request_id, index, tokens, reason)
        if delivery is not None:
            self.deliveries.append(delivery)

    def _end_request(self, request_id: str, reason: Literal["cancelled", "failed"], error: str | None = None) -> None:
        delivery = self.ledger.end(request_id, reason, error)
        if delivery is not None:
            self.deliveries.append(delivery)

    def _on_counters(self, report: Document) -> None:
        self.figures.report(report["member"], report["counters"], report["tokens_per_layer"], report["load"])

    def _on_routing(self, report: Document) -> None:
        self.routing.take(report)

    # Generations

    def _on_ready(self, report: Document) -> None:
        state = self.members.members.get(report["member"])
        if state is not None:
            state.ready = True
            self.limits = report["limits"]

    def _on_prepared(self, report: Document) -> None:
        if not report["error"] and self.succession.note_prepared(report["member"], report["generation"]):
            self.succession.open()

    def _on_loaded(self, report: Document) -> None:
        self._loaded.add(report["member"])
        opened = self.succession.opened
        if opened is not None and self._loaded >= set(opened.members):
            self._store.put("loaded", True)

    def _on_serving(self, report: Document) -> None:
        """A generation has begun on all its members."""
        before = self.members.active
        if not self.succession.settle(report["generation"]):
            return
        current = self.members.current = self.succession.settled
        assert current is not None
        self._noticed = set()
        self.figures.begin_generation()
        self.routing.give_up()
        self._take_placement(report)
        self.waiting, self.running = report["waiting"], report["running"]
        for request_id, added in report["known"].items():
            self._hear(request_id, 0, added, None)
        self._ask_again(report)
        if not self.is_serving:
            self.is_serving, self.reason = True, ""
        self.note(
            "serving",
            f"generation {current.number} serves with the members {list(current.members)}",
            generation=current.number,
            members=list(current.members),
            adopted=report["adopted"],
        )
        for member, state in self.members.members.items():
            if state.leaving and member not in current.members:
                self._helper.remind(_LINGERING, {"kind": "linger", "member": member})
        joined = [member for member in current.members if before and member not in before]
        if joined:
            self.note("joined", f"the members {joined} are ranks now", members=joined)

    def _ask_again(self, report: Document) -> None:
        """Requests that the ranks were told of and do not know: their last tokens were lost with a rank."""
        for request_id, entry in self.ledger.entries.items():
            if entry.command < report["applied"] and request_id not in report["known"]:
                command = {"kind": "add", "request": entry.request.to_json(), "added": list(entry.tokens)}
                entry.command = self.log.append(command)

    def _on_lost(self, report: Document) -> None:
        """A member has noticed that a rank is lost; normally the end of that one is reported as well."""
        newest = self.succession.newest
        if newest is None or newest.number != report["generation"]:
            return
        if not self._noticed:
            self._helper.remind(min(_LATE, self._options.timeout), {"kind": "late", "generation": newest.number})
        self._noticed.add(report["member"])
        if self._noticed >= set(newest.members):  # they live, their connections do not
            self.note("loss", f"all members lost their connections: {report['error']}")
            self._succeed()

    def _on_late(self, report: Document) -> None:
        newest = self.succession.newest
        if newest is None or newest.number != report["generation"]:
            return
        for member in set(newest.members) - self._noticed:
            if member in self.members.members:
                self._errors.setdefault(member, "it hung")
                self.members.members[member].process.kill()

    def _on_failed(self, report: Document) -> None:
        self._errors[report["member"]] = report["error"]

    def _on_stopped(self, report: Document) -> None:
        self.stopped.add(report["member"])

    def _on_deadline(self, report: Document) -> None:
        member = report["member"]
        if member in self.members.members and member not in self.members.active:
            self._errors[member] = f"it was no rank after {self._options.start_timeout:g} s"
            self.members.members[member].process.kill()

    def _on_linger(self, report: Document) -> None:
        """A member that was to leave has not ended by itself."""
        state = self.members.members.get(report["member"])
        if state is not None and report["member"] not in self.members.active:
            state.process.kill()

    def _on_died(self, report: Document) -> None:
        member = report["member"]
        state = self.members.members.pop(member, None)
        newest = self.succession.newest
        if state is None or self.is_over:
            return
        why = self._errors.get(member) or f"its process ended with code {report['code']}"
        if newest is not None and member in newest.members:
            self._lose(member, why)
        elif state.leaving:
            self.note("left", f"member {member} has left", member=member, code=report["code"])
        elif self.succession.settled is None:
            self._fail(f"member {member} could not start: {why}")
        else:
            self._give_up_joining(member, why)

    def _lose(self, member: int, why: str) -> None:
        if self.succession.settled is None:
            self._fail(f"member {member} was lost before the service began: {why}")
            return
        self._lost_at = time.time()
        if not self.members.wanted:  # those that were about to leave are all there is
            for state in self.members.members.values():
                state.leaving = False
        if not self._options.keep_width:
            self.members.desired = len(self.members.wanted)
        self.note("loss", f"member {member} was lost: {why}", member=member)
        self._succeed()

    def _succeed(self) -> None:
        newest = self.succession.newest
        assert newest is not None
        self.succession.withdraw()
        self._noticed, self._replacing, self.migration = set(), None, None
        alive = [m for m in newest.members if m in self.members.members and self.members.members[m].process.is_alive()]
        if not any(member in self.members.active for member in alive):
            self._fail("all ranks were lost")
            return
        self.succession.succeed(self.members.nodes(alive), self.ledger.delivered())

    def _give_up_joining(self, member: int, why: str) -> None:
        self.succession.withdraw()
        self.members.desired = len(self.members.wanted)
        self.reason = f"member {member} could not join: {why}"
        self.note("join-failed", self.reason, member=member)

    # Width and placement

    def _pursue(self) -> None:
        """Take the next step towards what is wanted, if nothing is under way."""
        members = self.members
        while len(members.members) - sum(s.leaving for s in members.members.values()) < members.desired:
            self._helper.start_member()
        if self.succession.is_changing or self._replacing is not None:
            return
        if self.succession.settled is None:
            if all(state.ready for state in members.members.values()):
                self._start()
            return
        step = members.next_step()
        if step.kind == "regroup":
            self._propose(step.members)
        elif step.kind == "rebalance":
            self._rebalance(step.members)
        elif self.replacements:
            self._replace(self.replacements.popleft())

    def _start(self) -> None:
        placement = self.members.placement
        assert placement is not None
        members = sorted(self.members.members)
        self._propose(tuple(members), slots=[slots_of(placement, rank) for rank in range(placement.num_ranks)])

    def _propose(self, members: tuple[int, ...], **fields: Any) -> None:
        new = [member for member in members if member not in self.members.active]
        assignments = {member: self._assigned.get(member, 0) for member in new}
        self._assigned.update({member: count + 1 for member, count in assignments.items()})
        self.succession.propose(self.members.nodes(members), assignments, **fields)

    def _rebalance(self, holders: tuple[int, ...]) -> None:
        """Let `holders` hold all experts, with as little moved as possible."""
        placement, load = self.members.placement, self.figures.load()
        assert placement is not None
        ranks = [self.members.active.index(member) for member in holders]
        self._plan("width", lambda: self._plan_to(placement, rebalance(placement, holders=ranks, load=load)))

    def _replace(self, goal: Placement) -> None:
        placement = self.members.placement
        assert placement is not None
        if goal.num_ranks != placement.num_ranks:
            wanted = f"the placement is for {goal.num_ranks} ranks, but {placement.num_ranks} are active"
            self.note("replace-failed", wanted)
            return
        goal = placement.replace(slot_to_expert=goal.slot_to_expert, slots_of_rank=goal.slots_of_rank)
        self._plan("placement", lambda: self._plan_to(placement, goal))

    def _plan_to(self, placement: Placement, goal: Placement) -> WidthPlan:
        size = self.limits["expert_bytes"]
        return plan_width(placement, goal, expert_bytes=size, staging_bytes=size)

    def _plan(self, what: Literal["width", "placement"], make: Callable[[], WidthPlan]) -> None:
        self._plans += 1
        self._replacing = {"number": self._plans, "what": what}
        self._helper.plan(self._plans, make)

    def _on_planned(self, report: Document) -> None:
        replacing = self._replacing
        if replacing is None or replacing["number"] != report["number"]:
            return  # for ranks that are no more
        made: WidthPlan | str = report["plan"]
        if isinstance(made, str):
            self._finish_replacing({"error": made})
            return
        replacing["bytes_lower_bound"] = made.least_bytes
        slots = made.goal.slots_of_rank.tolist()
        self.log.append({"kind": "replace", "plan": plan_to_json(made.plan), "slots_of_rank": slots})

    def _on_replaced(self, report: Document) -> None:
        if self._replacing is not None:
            self._take_placement(report)
            self._finish_replacing(report)

    def _finish_replacing(self, report: Document) -> None:
        replacing, self._replacing, self.migration = self._replacing, None, None
        assert replacing is not None
        figures = {name: report.get(name, 0) for name in ("bytes_moved", "commits", "seconds")}
        figures |= {"what": replacing["what"], "bytes_lower_bound": replacing.get("bytes_lower_bound", 0)}
        if not report["error"]:
            sentence = f"placement version {self.version} serves; {figures['bytes_moved']} bytes moved"
            self.note("replaced", sentence, version=self.version, **figures)
            return
        self.reason = f"the re-placement was taken back: {report['error']}"
        self.note("replace-failed", self.reason, **figures)
        if replacing["what"] == "width":
            self._stay_as_it_is()

    def _stay_as_it_is(self) -> None:
        """After a change of width that failed: those that hold experts stay, the others go."""
        routable = self.members.routable
        for member, state in self.members.members.items():
            state.leaving = member not in routable
        self.members.desired = len(self.members.wanted)

    def _take_placement(self, report: Document) -> None:
        current, checkpoint = self.members.current, self._checkpoint
        assert current is not None
        parts = [np.array(own, np.int32).reshape(checkpoint.num_layers, -1) for own in report["slots"]]
        self.version = report["version"]
        self.members.placement = Placement(
            np.hstack(parts),
            np.array([part.shape[1] for part in parts]),
            current.node_of_rank,
            checkpoint.experts_per_layer,
            checkpoint.layer_ids,
            checkpoint.num_hidden_layers,
            current.mode,
        )

    def _on_wish(self, _: Document) -> None:
        """A caller wants something; `_pursue` sees what."""
