"""Coordinator: the process of a service that is no rank.

    with Coordinator("checkpoint", ranks=4, spawner=LocalSpawner()) as service:
        service.wait_until_serving(timeout=120)
        service.submit(Request("a", (1, 2, 3)), print)

It hosts the store, starts members, and carries out what its `Conductor` wants done about what they report. No rank is
special, and any may be lost, all of them too. With a state folder it may be lost itself: another one that is given the
folder takes up the requests that had not ended.
"""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace as with_changes
from functools import partial
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import numpy as np
import torch

from moeplace.placement.placement import Placement
from moeplace.placement.replacement.width_plan import WidthPlan
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.windows.rows import join_rows
from moeplace.runtime.event import Event
from moeplace.runtime.models.loading import stated_dtype
from moeplace.runtime.models.precisions.precision_checkpoint import open_checkpoint
from moeplace.runtime.service.api import RequestRecord, ServiceStatus, TokenEvent
from moeplace.runtime.service.coordinator.actions import (
    Accept,
    Action,
    Append,
    Delete,
    Document,
    DropGroup,
    Kill,
    MakePlan,
    Note,
    Put,
    Remind,
    StartMember,
    Tell,
)
from moeplace.runtime.service.coordinator.conductor import Conductor
from moeplace.runtime.service.coordinator.first import check_recorded, first_placement, member_options
from moeplace.runtime.service.coordinator.helpers import Deliveries, OnEvent, Reminders, Threads, make_plan
from moeplace.runtime.service.coordinator.journal import Journal
from moeplace.runtime.service.coordinator.processes import MemberProcesses
from moeplace.runtime.service.errors import sentence_of
from moeplace.runtime.service.options import Member, MemberJob, ServiceOptions, Spawner
from moeplace.runtime.service.store import ForgedError, ServiceEndedError, ServiceStore, serve_store

logger = logging.getLogger(__name__)

MAX_EVENTS = 10_000
"""Of the event log; older ones are forgotten."""
_SLICE = 1.0
"""Seconds between two looks whether members wait for room."""
_STOPPING = 10.0
"""Seconds that members may take to end in order."""


class Coordinator:
    """A `Service`. One thread handles reports, in the order of one queue; callers come with theirs."""

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        ranks: int,
        spawner: Spawner,
        options: ServiceOptions | None = None,
        placement: Placement | None = None,
        host: str = "127.0.0.1",
        state: str | Path | None = None,
        secret: str | None = None,
        faults: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
        on_step: Callable[[Document], None] | None = None,
    ) -> None:
        """Start `ranks` members; returns at once, `wait_until_serving` waits.

        Args:
            placement: None = experts in index order.
            host: address of this machine at which members reach this process; nothing listens on any other.
            state: folder that outlives this process, see `Journal`; None = requests end with it.
            secret: with which messages are signed; None = one of its own, which spawners hand on.
            faults: per member id, -1 = all: what it shall do to itself; see `moeplace.runtime.service.faults`.
            on_step: called, from the thread of the coordinator, with what rank 0 reports of every step.

        Raises:
            InputError: the model is dense, the placement is for another model or number of ranks, there would be a rank
                without an expert, or the address, the state folder or recorded routing cannot be used.
        """
        options = options or ServiceOptions()
        self._checkpoint, self._host = open_checkpoint(checkpoint, options.precision), host
        first = first_placement(self._checkpoint, placement, ranks)
        self._options = member_options(options, first, ranks)
        check_recorded(self._options, first)
        self._faults, self._on_step = dict(faults or {}), on_step
        self._secret = secrets.token_hex(32) if secret is None else secret
        self._server = serve_store(host)
        self._journal = Journal(state)
        self._prefix = f"moeplace/{uuid4().hex[:8]}"
        self._store = self._connect()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._plans: dict[int, WidthPlan | str] = {}
        self._processes = MemberProcesses(spawner, job_of=self._job_of, report=self._tell)
        self._planners = Threads()
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._failure = ""
        self._is_closed = self._is_deaf = False
        self._reminders, self._deliveries = Reminders(self._tell), Deliveries()
        self._conductor = Conductor(first, self._options, ranks=ranks)
        self._thread = threading.Thread(target=self._handle_reports, name="coordinator", daemon=True)
        with self._changed:
            restored, taken = self._journal.in_flight(), self._journal.taken
            self._carry_out(self._conductor.begin(time.time(), restored=restored, taken=taken))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    # Waiting

    def wait_until_serving(self, *, timeout: float) -> None:
        """Wait for the first generation.

        Args:
            timeout: seconds, without those in which members wait for room.

        Raises:
            MoeplaceError: it does not serve within `timeout` seconds, or a member failed; says why.
        """
        while timeout > 0:
            begun = time.monotonic()
            if self.wait_for(lambda status: status.serving or status.ended, timeout=min(timeout, _SLICE)):
                break
            if self._processes.have_started():
                timeout -= time.monotonic() - begun
        status = self.status()
        if not status.serving:
            raise MoeplaceError(f"the service does not answer: {status.reason}")

    def wait_for(self, condition: Callable[[ServiceStatus], bool], *, timeout: float) -> bool:
        """Whether the status comes to meet a condition within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self.status()), timeout)

    # Calls

    def submit(self, request: Request, on_event: OnEvent) -> str:
        """See `Service`."""
        with self._acting() as conductor:
            ticket = conductor.submit(request)
            self._deliveries.listen(ticket, on_event)
        return ticket

    def find(self, request_id: str) -> RequestRecord | None:
        """See `Service`; 10,000 that have ended are kept."""
        with self._lock:
            written, known = self._journal.find(request_id), self._conductor.find(request_id)
        if written is None or known is None:
            return written or known
        return known if len(known.token_ids) > len(written.token_ids) else written  # a full disk may have cut it short

    def follow(self, request_id: str, on_event: OnEvent, *, first: int = 0) -> bool:
        """See `Service`."""
        with self._lock:
            record = self.find(request_id)
            if record is None:
                return False
            event = TokenEvent(request_id, record.token_ids, record.finish_reason, record.error, record.logprobs)
            self._deliveries.repeat(Tell(record.ticket, 0, event), on_event, first=first)
            return True

    def cancel(self, request_id: str, *, ticket: str | None = None) -> None:
        """See `Service`."""
        with self._acting() as conductor:
            conductor.cancel(request_id, ticket)

    def scale(self, num_ranks: int, *, leaving: Sequence[int] | None = None) -> None:
        """See `Service`."""
        with self._acting() as conductor:
            conductor.scale(num_ranks, leaving)

    def replace(self, placement: Placement) -> None:
        """See `Service`."""
        self._checkpoint.check_placement(placement)
        with self._acting() as conductor:
            conductor.replace(placement)

    def status(self) -> ServiceStatus:
        """See `Service`. When a thread of it has ended, nothing is served."""
        with self._lock:
            status = self._conductor.status()
        if status.ended:
            return status
        dead = [t.name for t in (self._reminders.thread, self._deliveries.thread, self._thread) if not t.is_alive()]
        if self._failure or (dead and self._thread.ident is not None):
            reason = self._failure or f"internal error: the thread of the {dead[0]} has ended"
            return with_changes(status, serving=False, reason=reason)
        return status

    def events(self) -> list[Event]:
        """See `Service`."""
        with self._lock:
            return list(self._events)

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        with self._lock:
            return self._conductor.placement

    @property
    def vocabulary(self) -> int:
        """Token ids of the model, once it serves."""
        with self._lock:
            return self._conductor.limits["vocabulary"]

    def load(self) -> np.ndarray | None:
        """(L, E) int64 routed assignments per expert since the start, a second old at most; None = none yet."""
        with self._lock:
            return self._conductor.load()

    def recent_routing(self) -> RoutingTrace | None:
        """Recent tokens of all ranks; None = they have been asked for and are not there yet, ask again.

        Raises:
            InputError: the limits of the engines keep no ids.
        """
        if not self._options.limits.recent_ids:
            raise InputError("recent routing is not kept: recent_ids (0) must be at least 1")
        with self._acting() as conductor:
            parts = conductor.routing()
        if parts is None:
            return None
        checkpoint, stated = self._checkpoint, self._options.dtype
        number_type = getattr(torch, stated) if stated else stated_dtype(checkpoint.family)
        return join_rows(
            parts,
            checkpoint.experts_per_layer,
            layer_ids=checkpoint.layer_ids,
            num_hidden_layers=checkpoint.num_hidden_layers,
            expert_bytes=checkpoint.sizes(number_type),
            hidden_size=int(checkpoint.config.get("hidden_size", 0)),
        )

    def member(self, member_id: int) -> Member:
        """The process of a member that is alive."""
        return self._processes[member_id]

    def close(self, *, drain: bool = True, timeout: float = 60.0) -> None:
        """See `Service`. With a state folder, requests that have not ended are kept for another coordinator."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            if drain:
                self._changed.wait_for(lambda: not self._conductor.num_in_flight or self._conductor.is_over, timeout)
            self._conductor.end("the service was closed")
            self._carry_out(self._conductor.take_actions())
            self._changed.wait_for(lambda: self._conductor.is_stopped, _STOPPING)
        if self._conductor.is_stopped:
            self._processes.wait(_STOPPING)
        self._processes.close(_STOPPING)
        self._planners.join(_STOPPING)
        self._reminders.close()
        self._tell({"kind": "end"})
        self._is_deaf = True
        if threading.current_thread() is not self._thread:
            self._thread.join(_STOPPING)
        self._deliveries.close()
        if threading.current_thread() is not self._deliveries.thread:
            self._deliveries.thread.join(_STOPPING)
        with self._lock:
            self._journal.close()

    # Reports in, actions out

    @contextmanager
    def _acting(self) -> Iterator[Conductor]:
        """A call of the conductor, and what it wants done."""
        with self._changed:
            yield self._conductor
            self._carry_out(self._conductor.take_actions())
            self._changed.notify_all()

    def _handle_reports(self) -> None:
        try:
            store = self._connect()
            while (report := self._next_report(store)).get("kind") != "end":
                if report.get("kind") == "planned":
                    report["plan"] = self._plans.pop(report["number"], "it was lost")
                with self._changed:
                    self._carry_out(self._conductor.handle(report, time.time()))
                    self._changed.notify_all()
                if self._on_step is not None and report.get("kind") == "step":
                    self._on_step(report)
        except Exception as error:
            logger.exception("the coordinator failed")
            with self._changed:
                self._failure = f"the coordinator failed: {sentence_of(error)}"
                self._conductor.end(self._failure)
                with suppress(Exception):
                    self._carry_out(self._conductor.take_actions())
                self._changed.notify_all()

    def _next_report(self, store: ServiceStore) -> Document:
        while True:
            try:
                return store.next_report()
            except ForgedError as error:
                with self._lock:
                    self._events.append(Event(time.time(), "forged-report", str(error)))

    def _carry_out(self, actions: Sequence[Action]) -> None:
        """Do what the conductor wants. What is told is written first; the lock is held."""
        kept = [action for action in actions if isinstance(action, Accept | Tell)]
        if kept:
            self._keep(kept)
        for action in actions:
            if isinstance(action, Tell):
                self._deliveries.tell(action)
            elif isinstance(action, Note):
                logger.info("%s: %s", action.event.kind, action.event.sentence)
                self._events.append(action.event)
            elif isinstance(action, StartMember):
                self._processes.start(action.member)
            elif isinstance(action, Kill):
                self._processes.kill(action.member)
            elif isinstance(action, Remind):
                self._reminders.add(action.seconds, action.report)
            elif isinstance(action, MakePlan):
                self._planners.start(f"plan-{action.number}", partial(self._plan, action))
            elif not isinstance(action, Accept):
                self._write(action)

    def _keep(self, actions: Sequence[Accept | Tell]) -> None:
        try:
            with self._journal.writing():
                for action in actions:
                    if isinstance(action, Accept):
                        self._journal.accept(action)
                    else:
                        self._journal.tell(action)
        except MoeplaceError as error:  # a full disk must not end a service
            logger.error("%s", error)
            self._events.append(Event(time.time(), "state-lost", str(error)))

    def _write(self, action: Put | Delete | DropGroup | Append) -> None:
        if isinstance(action, Put):
            self._store.put(action.key, action.value)
        elif isinstance(action, Delete):
            self._store.delete(action.keys)
        elif isinstance(action, DropGroup):
            self._store.delete_group(action.generation)
        else:
            self._store.append(action.index, action.command)

    def _job_of(self, member_id: int) -> MemberJob:
        return MemberJob(
            member_id,
            self._host,
            self._server.port,
            self._prefix,
            str(self._checkpoint.path),
            self._options,
            (*self._faults.get(member_id, ()), *self._faults.get(-1, ())),
            self._secret,
        )

    def _plan(self, action: MakePlan) -> None:
        try:
            self._plans[action.number] = make_plan(action)
        except Exception as error:
            logger.exception("no plan")
            self._plans[action.number] = sentence_of(error)
        self._tell({"kind": "planned", "number": action.number})

    def _tell(self, report: Document) -> None:
        if report.get("kind") == "deadline":
            report = {**report, "started": self._processes.has_started(report["member"])}
        if not self._is_deaf:
            with suppress(ServiceEndedError):
                self._store.report(report)

    def _connect(self) -> ServiceStore:
        return ServiceStore.connect(self._host, self._server.port, self._prefix, self._secret)
