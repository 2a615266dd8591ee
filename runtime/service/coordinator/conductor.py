"""Conductor: what follows from what happens to a service. Reports in, actions out (see `reports` and `actions`).

    actions = conductor.handle({"kind": "died", "member": 3}, now=time.time())

It has no thread, no store, no process and no clock: the coordinator reports to it, one report at a time, and carries
its actions out in their order. Reports may come late or twice, and those of members that are gone still come; what they
name and is no more is ignored. So all that can happen can be tried without a process.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np

from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.windows.rows import RoutedRows
from moeplace.runtime.service.api import RequestRecord, ServiceStatus
from moeplace.runtime.service.coordinator.actions import Action, CommandLog, Document, Outbox, Put, Remind
from moeplace.runtime.service.coordinator.figures import ServiceFigures
from moeplace.runtime.service.coordinator.generations import Generations
from moeplace.runtime.service.coordinator.reports import find_fault, is_token, read_logprobs
from moeplace.runtime.service.coordinator.requests import RequestDesk
from moeplace.runtime.service.coordinator.routing_request import RoutingRequest
from moeplace.runtime.service.options import ServiceOptions

logger = logging.getLogger(__name__)

_LINGERING = 10.0
"""Seconds that a member may take to end after a generation without it has begun."""


class Conductor:
    """See the module.

    Attributes:
        is_over: the service has ended; nothing more is done.
        limits: what a request has to keep to, as a member told; empty before.
    """

    def __init__(self, placement: Placement, options: ServiceOptions, *, ranks: int) -> None:
        self._out = Outbox()
        self._log = CommandLog(self._out)
        self._desk = RequestDesk(self._log, self._out)
        self._routing = RoutingRequest(self._log)
        self._figures = ServiceFigures()
        self._generations = Generations(placement, options, self._log, self._out, ranks=ranks)
        self._members = self._generations.members
        self._options = options
        self.is_over = False
        self.limits: dict[str, int] = {}
        self._waiting = self._running = 0
        self._stopping: set[int] | None = None  # members that are to end in order and have not yet
        self._lost_at: float | None = None
        self._handlers: dict[str, Callable[[Document], None]] = {
            name.removeprefix("_on_"): getattr(self, name) for name in dir(self) if name.startswith("_on_")
        }

    # Calls

    def begin(self, now: float, *, restored: Sequence[RequestRecord] = (), taken: int = 0) -> list[Action]:
        """Start the members; with the requests in flight of a service before, and its number of tickets."""
        self._desk.restore(restored, taken=taken)
        if restored:
            self._out.now = now
            self._out.note("restored", f"{len(restored)} requests in flight are taken up again", requests=len(restored))
        self._out.add(Remind(self._generations.liveness.interval, {"kind": "look"}))
        return self.handle({"kind": "wish"}, now)

    def handle(self, report: Document, now: float) -> list[Action]:
        """Take a report; what is to be done. One that cannot be used is noted, and ends nothing."""
        self._out.now = now
        if fault := find_fault(report):
            self._out.note("bad-report", f"a report was ignored: {fault}")
        elif not self.is_over or report["kind"] in ("died", "stopped", "step"):
            try:
                self._handlers[report["kind"]](report)
                self._pursue()
            except Exception as error:
                logger.exception("a report of the kind %r failed", report["kind"])
                self._out.note("bad-report", f"a report ({report['kind']}) failed: {type(error).__name__}: {error}")
        return self._out.take()

    def submit(self, request: Request) -> str:
        """Take a request; its ticket. Call `take_actions` afterwards, as after the calls below.

        Raises:
            InputError: it can never fit, or a token id is out of range.
            MoeplaceError: the service has ended, or does not know yet what fits.
        """
        if self.is_over or not self.limits:
            raise MoeplaceError(f"request {request.request_id!r} is not served: {self._generations.reason}")
        request.require_fit(positions=self.limits["positions"], vocabulary=self.limits["vocabulary"])
        return self._desk.take(request)

    def cancel(self, request_id: str, ticket: str | None) -> None:
        """See `Service`."""
        self._desk.cancel(request_id, ticket)

    def scale(self, num_ranks: int, leaving: Sequence[int] | None) -> None:
        """See `Service`."""
        members = self._members
        if not self._generations.is_serving:
            raise MoeplaceError(f"the ranks cannot change: {self._generations.reason}")
        going = members.choose_leaving(num_ranks, leaving)
        for member in going:
            members.members[member].leaving = True
            if member not in members.active:
                self._generations.kill(member, "it was told to leave before it was a rank")
        self._generations.want(num_ranks)
        self._out.note("scale", f"{num_ranks} ranks are wanted", ranks=num_ranks, leaving=going)
        self._pursue()

    def replace(self, placement: Placement) -> None:
        """See `Service`."""
        active = self._members.active
        if placement.num_ranks != len(active):
            raise InputError(f"the placement is for {placement.num_ranks} ranks, but {len(active)} are active")
        self._generations.replacing.wanted.append(placement)
        self._pursue()

    def routing(self) -> list[RoutedRows] | None:
        """Recent routing of all ranks; None = they have been asked for it."""
        parts = self._routing.collect()
        if parts is None and self._generations.is_serving:
            self._routing.ask(self._members.active)
        return parts

    def end(self, reason: str) -> None:
        """Answer no more; requests in flight fail. Members that are ranks end in order, the others at once."""
        self.is_over = True
        self._generations.end(reason)
        self._desk.end_all(reason)
        active = self._generations.obedient
        for member in set(self._members.members) - active:
            self._generations.kill(member, reason)
        self._stopping = active
        if active:
            self._log.append({"kind": "stop"})
        self._let_go()

    def take_actions(self) -> list[Action]:
        """What is to be done after a call."""
        return self._out.take()

    # What can be seen

    @property
    def is_stopped(self) -> bool:
        """Whether the members that were to end in order have."""
        return self._stopping is not None and not self._stopping

    @property
    def num_in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._desk.entries)

    @property
    def placement(self) -> Placement:
        """In force; before anything is, that of the start."""
        return self._members.placement

    def load(self) -> np.ndarray | None:
        """(L, E) int64 routed assignments per expert since the start; None = none were reported."""
        return self._figures.load()

    def find(self, request_id: str) -> RequestRecord | None:
        """The newest request in flight under a name."""
        return self._desk.find(request_id)

    def status(self) -> ServiceStatus:
        """See `Service`."""
        members, generations = self._members, self._generations
        return ServiceStatus(
            generation=generations.number,
            placement_version=generations.replacing.version,
            placement_digest=members.placement.digest,
            desired=members.desired,
            allocated=tuple(sorted(members.members)),
            active=members.active,
            routable=members.routable,
            waiting=self._waiting + self._desk.num_aside,
            running=self._running,
            steps=self._out.steps,
            tokens=self._desk.num_tokens,
            migration=generations.replacing.migration,
            counters=self._figures.counters(),
            imbalance_per_layer=self._figures.imbalance_per_layer(members.active),
            changing=generations.is_changing,
            serving=generations.is_serving,
            reason=generations.reason,
            ended=self.is_over,
            losses=self._out.losses,
            **self._figures.passes(),
        )

    # Reports of the ranks at work

    def _on_pass(self, report: Document) -> None:
        if report["generation"] == self._generations.number:
            self._desk.begin_pass(report["tickets"])

    def _on_step(self, report: Document) -> None:
        logprobs = report.get("logprobs", {})
        for told in report["tokens"]:
            if is_token(told):
                ticket, index, token, reason = told
                found = read_logprobs([[index, logprobs[ticket]]]) if ticket in logprobs else {}
                self._desk.hear(ticket, index, [token], reason, logprobs=found)
            else:
                self._out.note("bad-report", f"a token was ignored: {told!r:.80}")
        self._out.steps += 1
        self._figures.note_pass(report.get("phase"), report.get("seconds"), report.get("kv"))
        self._log.forget(report["applied"])
        if report["generation"] == self._generations.number:
            self._generations.note_step(report.get("migration"))
            self._waiting, self._running = report["waiting"], report["running"]
            if self._lost_at is not None and report["tokens"]:
                seconds, self._lost_at = self._out.now - self._lost_at, None
                told = f"the first token came {seconds:.2f} s after the loss was noticed"
                self._out.note("resumed", told, seconds=seconds)

    def _on_queue(self, report: Document) -> None:
        """The ranks have come to rest, or to another request, by a command."""
        if report["generation"] == self._generations.number:
            self._waiting, self._running = report["waiting"], report["running"]

    def _on_refused(self, report: Document) -> None:
        self._desk.drop(report["request_id"], "failed", report["error"])

    def _on_counters(self, report: Document) -> None:
        self._figures.report(report["member"], report["counters"], report["tokens_per_layer"], report["load"])

    def _on_routing(self, report: Document) -> None:
        self._routing.take(report)

    def _on_planned(self, report: Document) -> None:
        self._generations.take_plan(report["number"], report["plan"])

    def _on_replaced(self, report: Document) -> None:
        self._generations.take_replaced(report)

    # Reports on members

    def _on_ready(self, report: Document) -> None:
        state = self._members.members.get(report["member"])
        if state is not None:
            state.ready = True
            self.limits = report["limits"]

    def _on_alive(self, report: Document) -> None:
        if report["member"] in self._members.members:
            liveness = self._generations.liveness
            liveness.hear(report["member"], report["turn"], state=report["state"], now=self._out.now)

    def _on_look(self, _: Document) -> None:
        liveness = self._generations.liveness
        for member, why in liveness.look(self._out.now).items():
            self._generations.kill(member, why)
        self._out.add(Remind(liveness.interval, {"kind": "look"}))

    def _on_prepared(self, report: Document) -> None:
        self._generations.take_prepared(report["member"], report["generation"], report["error"])

    def _on_loaded(self, report: Document) -> None:
        self._generations.take_loaded(report["member"], report["generation"])

    def _on_serving(self, report: Document) -> None:
        """A generation has begun on all its members."""
        lingering = self._generations.take_serving(report)
        if lingering is None:
            return
        self._figures.begin_generation()
        self._routing.give_up()
        self._log.forget(report["applied"])
        self._waiting, self._running = report["waiting"], report["running"]
        logprobs = {ticket: read_logprobs(found) for ticket, found in report.get("logprobs", {}).items()}
        self._desk.ask_again(report["known"], applied=report["applied"], logprobs=logprobs)
        self._desk.begin_pass(report["seated"])
        for member in lingering:
            self._out.add(Remind(_LINGERING, {"kind": "linger", "member": member}))

    def _on_lost(self, report: Document) -> None:
        if self._generations.take_lost(report["member"], report["generation"], report["error"]):
            self._follow_loss(is_death=False)

    def _on_late(self, report: Document) -> None:
        if self._generations.is_disconnected(report["generation"]):
            self._follow_loss(is_death=False)

    def _on_failed(self, report: Document) -> None:
        self._generations.expect_end(report["member"], report["error"], is_final=report["final"])

    def _on_stopped(self, report: Document) -> None:
        if self._stopping is not None:
            self._stopping.discard(report["member"])
            self._let_go()

    def _on_deadline(self, report: Document) -> None:
        self._generations.check_start(report["member"], has_started=report["started"])

    def _on_linger(self, report: Document) -> None:
        """A member that was to leave has not ended by itself."""
        if report["member"] not in self._members.active:
            self._generations.kill(report["member"], "it did not leave by itself")

    def _on_died(self, report: Document) -> None:
        member = report["member"]
        self._generations.liveness.forget(member)
        self._figures.note_end(member)
        if self._stopping is not None:
            self._members.members.pop(member, None)
            self._stopping.discard(member)
            self._let_go()
        elif self._generations.take_death(member, report):
            self._follow_loss(is_death=True)

    def _on_rested(self, report: Document) -> None:
        self._generations.end_pause(report["pause"])

    def _on_wish(self, _: Document) -> None:
        """A caller wants something; `_pursue` sees what."""

    def _follow_loss(self, *, is_death: bool) -> None:
        """The ranks that are left go on, or new ones start."""
        if is_death:
            self._lost_at = self._out.now
            if self._generations.was_in_force:
                self._desk.blame()
        if not self._generations.succeed(self._desk.delivered()):
            self._routing.give_up()
            self._waiting, self._running = self.num_in_flight, 0

    def _pursue(self) -> None:
        """Take the next step towards what is wanted, if nothing is under way."""
        if self.is_over:
            return
        failure = self._generations.pursue(load=self._figures.load(), expert_bytes=self.limits.get("expert_bytes", 0))
        if failure:
            self._out.note("failed", failure)
            self.end(failure)
        elif self._generations.is_serving and not self._generations.is_forming:
            self._desk.try_one_aside()

    def _let_go(self) -> None:
        """Members that have stopped wait for the word that all have, so that no group breaks under another."""
        if self.is_stopped:
            self._out.add(Put("stopped", True))
