"""Coordinator: the process of a service that is no rank.

    with Coordinator("checkpoint", ranks=4, spawner=LocalSpawner()) as service:
        service.wait_until_serving(timeout=120)
        service.submit(Request("a", (1, 2, 3)), print)

It hosts the store, starts members, and passes what happens to its `Conductor`, which knows what was asked and delivered
and forms the next generation when members come, go or die. So no rank is special, and any may be lost.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace as with_changes
from datetime import timedelta
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import numpy as np
import torch.distributed as dist

from moeplace.placement.cluster import even_slots
from moeplace.placement.placement import Placement, index_order
from moeplace.placement.replacement.width_plan import WidthPlan
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.profiling.traces.trace import RoutingTrace
from moeplace.runtime.engine.modes import choose_mode_rule
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.routing_window import join_rows
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.service.api import Member, MemberJob, ServiceEvent, ServiceOptions, ServiceStatus, Spawner
from moeplace.runtime.service.coordinator.conductor import Conductor
from moeplace.runtime.service.coordinator.membership import MemberState
from moeplace.runtime.service.coordinator.requests import Deliver
from moeplace.runtime.service.member.serving import sentence_of
from moeplace.runtime.service.store import Document, ServiceEndedError, ServiceStore

logger = logging.getLogger(__name__)

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
        faults: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
        on_step: Callable[[Document], None] | None = None,
    ) -> None:
        """Start `ranks` members; returns at once, `wait_until_serving` waits.

        Args:
            placement: None = experts in index order.
            host: address of this process that members can reach.
            faults: per member id, what it shall do to itself; see `moeplace.runtime.service.faults`.
            on_step: called, from the thread of the coordinator, with what rank 0 reports of every step.

        Raises:
            InputError: the model is dense, or the placement is for another model or number of ranks.
        """
        self._checkpoint, self._spawner, self._host = Checkpoint(checkpoint), spawner, host
        first = _first_placement(self._checkpoint, placement, ranks)
        self._options = _options(options or ServiceOptions(), first, ranks)
        self._faults = dict(faults or {})
        self._server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self._prefix = f"moeplace/{uuid4().hex[:8]}"
        self._store = self._connect()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._plans: dict[int, WidthPlan | str] = {}
        self._nodes = first.node_of_rank.tolist()
        self._conductor = Conductor(self._store, self._checkpoint, first, self._options, self, ranks=ranks)
        self._conductor.on_step = on_step
        self._thread = threading.Thread(target=self._handle_reports, name="coordinator", daemon=True)
        self._tell({"kind": "wish"})
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(drain=False)

    def wait_until_serving(self, *, timeout: float) -> None:
        """Wait for the first generation.

        Raises:
            MoeplaceError: it does not serve within `timeout` seconds, or a member failed; says why.
        """
        conductor = self._conductor
        with self._changed:
            self._changed.wait_for(lambda: conductor.is_serving or conductor.is_over, timeout)
            if not conductor.is_serving:
                raise MoeplaceError(f"the service does not answer: {conductor.reason}")

    def wait_for(self, condition: Callable[[ServiceStatus], bool], *, timeout: float) -> bool:
        """Whether the status comes to meet a condition within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self.status()), timeout)

    def submit(self, request: Request, on_event: Deliver) -> None:
        """See `Service`."""
        with self._lock:
            if self._conductor.is_over:
                raise MoeplaceError(f"request {request.request_id!r} is not served: {self._conductor.reason}")
            self._check(request)
            entry = self._conductor.ledger.add(request, on_event)
            entry.command = self._conductor.log.append({"kind": "add", "request": request.to_json()})

    def cancel(self, request_id: str) -> None:
        """See `Service`."""
        self._tell({"kind": "cancel", "request_id": request_id})

    def scale(self, num_ranks: int, *, leaving: Sequence[int] | None = None) -> None:
        """See `Service`."""
        with self._lock:
            members = self._conductor.members
            if not self._conductor.is_serving:
                raise MoeplaceError(f"the ranks cannot change: {self._conductor.reason}")
            going = members.choose_leaving(num_ranks, leaving)
            for member in going:
                members.members[member].leaving = True
                if member not in members.active:
                    members.members[member].process.kill()
            members.desired = num_ranks
            self._conductor.note("scale", f"{num_ranks} ranks are wanted", ranks=num_ranks, leaving=going)
        self._tell({"kind": "wish"})

    def replace(self, placement: Placement) -> None:
        """See `Service`."""
        self._checkpoint.check_placement(placement)
        with self._lock:
            active = self._conductor.members.active
            if placement.num_ranks != len(active):
                raise InputError(f"the placement is for {placement.num_ranks} ranks, but {len(active)} are active")
            self._conductor.replacements.append(placement)
        self._tell({"kind": "wish"})

    def status(self) -> ServiceStatus:
        """See `Service`."""
        with self._lock:
            conductor, members = self._conductor, self._conductor.members
            return ServiceStatus(
                generation=0 if members.current is None else members.current.number,
                placement_version=conductor.version,
                placement_digest="" if members.placement is None else members.placement.digest,
                desired=members.desired,
                allocated=tuple(sorted(members.members)),
                active=members.active,
                routable=members.routable,
                waiting=conductor.waiting,
                running=conductor.running,
                steps=conductor.steps,
                tokens=conductor.ledger.num_tokens,
                migration=conductor.migration,
                counters=conductor.figures.counters(),
                imbalance_per_layer=conductor.figures.imbalance_per_layer(members.active),
                changing=conductor.is_changing,
                serving=conductor.is_serving,
                reason=conductor.reason,
            )

    def events(self) -> list[ServiceEvent]:
        """See `Service`."""
        with self._lock:
            return list(self._conductor.events)

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        with self._lock:
            assert self._conductor.members.placement is not None
            return self._conductor.members.placement

    def load(self) -> np.ndarray | None:
        """(L, E) int64 routed assignments per expert since the start, a second old at most; None = none yet."""
        with self._lock:
            return self._conductor.figures.load()

    def recent_routing(self) -> RoutingTrace | None:
        """Recent tokens of all ranks; None = they have been asked for and are not there yet, ask again.

        Raises:
            InputError: the limits of the engines keep no ids.
        """
        if not self._options.limits.recent_ids:
            raise InputError("recent routing is not kept: recent_ids (0) must be at least 1")
        with self._lock:
            conductor = self._conductor
            parts = conductor.routing.collect()
            if parts is None:
                conductor.routing.ask(conductor.members.active)
                return None
            size = conductor.limits["expert_bytes"]
        checkpoint = self._checkpoint
        return join_rows(
            parts,
            checkpoint.experts_per_layer,
            layer_ids=checkpoint.layer_ids,
            num_hidden_layers=checkpoint.num_hidden_layers,
            expert_bytes=np.full(checkpoint.num_layers, size),
            hidden_size=int(checkpoint.config.get("hidden_size", 0)),
        )

    def member(self, member_id: int) -> Member:
        """The process of a member that is alive."""
        with self._lock:
            return self._conductor.members.members[member_id].process

    def close(self, *, drain: bool = True, timeout: float = 60.0) -> None:
        """See `Service`."""
        conductor = self._conductor
        with self._changed:
            if drain:
                self._changed.wait_for(lambda: not conductor.ledger.entries or conductor.is_over, timeout)
            conductor.end("the service was closed")
            processes = self._stop_ranks()
        for process in processes:
            process.wait(_STOPPING)
        self._spawner.close()
        self._tell({"kind": "end"})
        if threading.current_thread() is not self._thread:
            self._thread.join(_STOPPING)

    def _stop_ranks(self) -> list[Member]:
        """Let active members end in order, the others at once."""
        conductor, members = self._conductor, self._conductor.members
        active = set(members.active) & set(members.members)
        for member, state in members.members.items():
            if member not in active:
                state.process.kill()
        if active:
            conductor.log.append({"kind": "stop"})
            self._changed.wait_for(lambda: active & set(members.members) <= conductor.stopped, _STOPPING)
            self._store.put("stopped", True)
        return [members.members[member].process for member in active & set(members.members)]

    # What takes time (see `Helper`)

    def start_member(self) -> None:
        """See `Helper`."""
        members = self._conductor.members
        member_id = members.next_id()
        job = MemberJob(
            member_id,
            self._host,
            self._server.port,
            self._prefix,
            str(self._checkpoint.path),
            self._options,
            tuple(self._faults.get(member_id, ())),
        )
        node = self._nodes[member_id] if member_id < len(self._nodes) else self._emptiest_node()
        process = self._spawner.start(member_id, job)
        members.members[member_id] = MemberState(process, node)
        threading.Thread(target=self._watch, args=(process,), name=f"watch-{member_id}", daemon=True).start()
        self.remind(self._options.start_timeout, {"kind": "deadline", "member": member_id})

    def remind(self, seconds: float, report: Document) -> None:
        """See `Helper`."""
        timer = threading.Timer(seconds, self._tell, (report,))
        timer.daemon = True
        timer.start()

    def plan(self, number: int, make: Callable[[], WidthPlan]) -> None:
        """See `Helper`."""

        def work() -> None:
            try:
                self._plans[number] = make()
            except Exception as error:
                logger.exception("no plan")
                self._plans[number] = sentence_of(error)
            self._tell({"kind": "planned", "number": number})

        threading.Thread(target=work, name=f"plan-{number}", daemon=True).start()

    def _watch(self, process: Member) -> None:
        """Tell when a member has ended: what it reported before is in the queue already."""
        while (code := process.wait(3600.0)) is None:
            pass
        self._tell({"kind": "died", "member": process.member_id, "code": code})

    def _emptiest_node(self) -> int:
        nodes = [state.node for state in self._conductor.members.members.values()]
        return min(set(self._nodes), key=lambda node: (nodes.count(node), node))

    def _handle_reports(self) -> None:
        store = self._connect()
        while True:
            report = store.next_report()
            if report["kind"] == "end":
                self._deliver()
                return
            if report["kind"] == "planned":
                report["plan"] = self._plans.pop(report["number"])
            with self._changed:
                try:
                    self._conductor.handle(report)
                except Exception as error:
                    logger.exception("the coordinator failed")
                    self._conductor.end(f"the coordinator failed: {sentence_of(error)}")
                self._changed.notify_all()
            self._deliver()

    def _deliver(self) -> None:
        """Tell those who asked, without the lock."""
        with self._lock:
            deliveries = list(self._conductor.deliveries)
            self._conductor.deliveries.clear()
        for on_event, event in deliveries:
            try:
                on_event(event)
            except Exception:
                logger.exception("who asked for request %r could not take an event", event.request_id)

    def _check(self, request: Request) -> None:
        limits = self._conductor.limits
        if not limits:
            raise MoeplaceError(f"request {request.request_id!r} is not served: {self._conductor.reason}")
        request.require_fit(positions=limits["positions"], vocabulary=limits["vocabulary"])

    def _tell(self, report: Document) -> None:
        with suppress(ServiceEndedError):
            self._store.report(report)

    def _connect(self) -> ServiceStore:
        return ServiceStore.connect(self._host, self._server.port, self._prefix)


def _first_placement(checkpoint: Checkpoint, placement: Placement | None, ranks: int) -> Placement:
    """The placement of the start, with the layers of the checkpoint."""
    if ranks < 1:
        raise InputError(f"ranks ({ranks}) must be at least 1")
    fields: dict[str, Any] = {
        "layer_ids": checkpoint.layer_ids,
        "num_hidden_layers": checkpoint.num_hidden_layers,
    }
    if placement is None:
        slots = even_slots(int(checkpoint.experts_per_layer.max()), ranks)
        return index_order(checkpoint.experts_per_layer, slots, np.zeros(ranks, np.int64), **fields)
    if placement.num_ranks != ranks:
        raise InputError(f"the placement is for {placement.num_ranks} ranks, but {ranks} are to be started")
    checkpoint.check_placement(placement)
    return placement.replace(**fields)


def _options(options: ServiceOptions, placement: Placement, ranks: int) -> ServiceOptions:
    """Options whose K/V memory per rank does not depend on how many ranks there are."""
    limits = options.limits
    if choose_mode_rule(options.mode, placement).may_be_coherent or limits.rank_sequences is not None:
        return options
    return with_changes(options, limits=with_changes(limits, rank_sequences=-(-limits.max_sequences // ranks)))
