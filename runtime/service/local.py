"""LocalService: a service of one rank, its engine in a thread of this process.

    service = LocalService(Engine("checkpoint"))
    service.submit(Request("a", (1, 2, 3)), print)
    service.close()

It is what `moeplace serve --http` runs on one rank, and the oracle of services with several.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from moeplace.placement.migration.plan import plan_migration
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.errors import MigrationError
from moeplace.runtime.event import Event
from moeplace.runtime.migration.live import LiveMigration
from moeplace.runtime.service.api import FinishReason, RequestRecord, ServiceStatus
from moeplace.runtime.service.local_requests import LocalRequests, OnEvent

logger = logging.getLogger(__name__)

_MEMBER = 0
_BYTES_PER_STEP = 8 << 20
_LAST_STEP = 5.0
"""Seconds that a step under way has to end when nothing else is waited for."""
_COUNTERS_EVERY = 0.25
"""Seconds between two looks at the engine's counters: they are many, and a step may be short."""


class LocalService:
    """See the module. The engine belongs to the service's thread from here on.

    Args:
        engine: of a group of one; with staging rows it can `replace` its placement.

    Raises:
        InputError: the engine is one of several ranks.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.group.size != 1:
            raise InputError(f"a local service has one rank, but the engine is one of {engine.group.size}")
        self._engine = engine
        self._changed = threading.Condition()
        # Guarded by the condition: what other threads ask for, and who is to be told.
        self._submitted: list[Request] = []
        self._cancelled: list[str] = []
        self._replacement: Placement | None = None
        self._log: list[Event] = []
        self._closing, self._abandon, self._reason = False, False, ""
        self._requests = LocalRequests()
        # Of the service's thread alone.
        self._migration: LiveMigration | None = None
        self._counted_at = 0.0
        self._passes: defaultdict[str, int] = defaultdict(int)
        self._pass_seconds: defaultdict[str, float] = defaultdict(float)
        self._status = self._first_status()
        self._note("started", "one rank serves in this process")
        self._thread = threading.Thread(target=self._run, name="moeplace-service", daemon=True)
        self._thread.start()

    @property
    def placement(self) -> Placement:
        """In force."""
        return self._engine.placement

    def submit(self, request: Request, on_event: OnEvent) -> str:
        """See `Service`."""
        engine = self._engine  # what is looked at here does not change, whatever its thread does
        request.require_fit(positions=engine.scheduler.positions, vocabulary=engine.executor.decoder.vocabulary)
        with self._changed:
            if self._closing or self._reason:
                raise MoeplaceError(f"request {request.request_id!r} is not served: {self._reason or 'it is closing'}")
            known = self._requests.take(request, on_event)
            self._submitted.append(known)
            self._changed.notify_all()
        return known.request_id

    def find(self, request_id: str) -> RequestRecord | None:
        """See `Service`; 1,000 that have ended are kept."""
        return self._requests.find(request_id)

    def follow(self, request_id: str, on_event: OnEvent, *, first: int = 0) -> bool:
        """See `Service`; what is known already is told in the thread of the caller."""
        return self._requests.follow(request_id, on_event, first=first)

    def cancel(self, request_id: str, *, ticket: str | None = None) -> None:
        """See `Service`."""
        with self._changed:
            self._cancelled += self._requests.tickets_of(request_id, ticket)
            self._changed.notify_all()

    def scale(self, num_ranks: int, *, leaving: Sequence[int] | None = None) -> None:
        if num_ranks != 1 or leaving:
            raise InputError(f"a local service has one rank and cannot have {num_ranks}")

    def replace(self, placement: Placement) -> None:
        if placement.num_ranks != 1:
            raise InputError(f"the placement is for {placement.num_ranks} ranks, but a local service has one")
        self._engine.checkpoint.check_placement(placement)
        with self._changed:
            if self._replacement is not None or self._status.migration is not None:
                raise InputError("another re-placement is under way; only one at a time is possible")
            self._replacement = placement
            self._changed.notify_all()

    def status(self) -> ServiceStatus:
        with self._changed:
            waiting = self._status.waiting + len(self._submitted)
            ended = not self._thread.is_alive()
            reason = self._reason or ("it is closing" if self._closing else "")
        if ended and not reason:
            reason = "internal error: the thread of the service has ended"
        serving = not reason
        return replace(self._status, waiting=waiting, serving=serving, reason=reason, ended=ended)

    def events(self) -> list[Event]:
        with self._changed:
            return list(self._log)

    def close(self, *, drain: bool = True, timeout: float = 60.0) -> None:
        """See Service; what has not finished in time is cancelled.

        Raises:
            MoeplaceError: a step does not end.
        """
        with self._changed:
            self._closing = True
            self._abandon = not drain
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive() and drain:
            with self._changed:
                self._abandon = True
                self._changed.notify_all()
            self._thread.join(max(timeout, _LAST_STEP))
        if self._thread.is_alive():
            raise MoeplaceError(f"the engine did not end its step within {timeout:g} s")

    def _run(self) -> None:
        try:
            while self._take_orders():
                started = time.perf_counter()
                stepped = self._engine.step_with_note(0)
                completions = stepped.completions
                if stepped.phase is not None:
                    self._passes[stepped.phase] += 1
                    self._pass_seconds[stepped.phase] += time.perf_counter() - started
                self._advance_migration()
                for sequence in self._engine.scheduler.running:
                    self._tell(sequence.request.request_id, sequence.added, logprobs=sequence.logprobs)
                for completion in completions:
                    known = {index: found for index, found in enumerate(completion.logprobs) if found is not None}
                    self._tell(completion.request_id, completion.token_ids, completion.finish_reason, logprobs=known)
                self._publish()
        except Exception as error:  # whatever broke the engine: its requests hear of it, and the front says so
            logger.debug("the engine failed", exc_info=True)
            sentence = " ".join(f"{error}".split()) or type(error).__name__
            self._end_all("failed", sentence if isinstance(error, MoeplaceError) else f"internal error: {sentence}")
        else:
            self._end_all("cancelled", "it is closed")

    def _take_orders(self) -> bool:
        """Wait until there is something to do, and take over what was asked for; False = end."""
        scheduler = self._engine.scheduler
        with self._changed:
            while not (self._submitted or self._cancelled or self._replacement or self._closing):
                if not scheduler.is_idle or self._migration is not None:
                    break
                self._changed.wait()
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
            replacement, self._replacement = self._replacement, None
            if self._abandon:
                return False
        for request in submitted:
            self._engine.add_request(request)  # what cannot fit was refused, and tickets are never used twice
        for request_id in cancelled:
            self._drop(request_id)
        if replacement is not None:
            self._start_migration(replacement)
        return not (scheduler.is_idle and self._migration is None and self._closing)

    def _drop(self, ticket: str) -> None:
        """Nothing happens when it has finished meanwhile."""
        self._engine.scheduler.cancel(ticket)
        self._requests.tell(ticket, None, "cancelled")

    def _tell(
        self,
        ticket: str,
        token_ids: Sequence[int],
        reason: FinishReason | None = None,
        *,
        logprobs: Mapping[int, TokenLogprob],
    ) -> None:
        if not self._requests.tell(ticket, token_ids, reason, logprobs=logprobs):
            with self._changed:
                self._cancelled.append(ticket)

    def _end_all(self, reason: FinishReason, sentence: str) -> None:
        with self._changed:
            self._reason = sentence
            self._note("failed" if reason == "failed" else "closed", sentence)
            self._changed.notify_all()
        self._requests.end_all(reason, sentence if reason == "failed" else None)
        self._status = replace(
            self._status, waiting=0, running=0, active=(), routable=(), allocated=(), tokens=self._requests.num_tokens
        )

    def _start_migration(self, placement: Placement) -> None:
        try:
            size = self._engine.executor.runtime.experts.expert_bytes
            plan = plan_migration(self._engine.placement, placement, expert_bytes=size(0), staging_bytes=size(0))
            self._migration = LiveMigration(self._engine, plan, bytes_per_step=_BYTES_PER_STEP)
        except MoeplaceError as error:
            self._note("re-placement refused", str(error))

    def _advance_migration(self) -> None:
        if self._migration is None:
            return
        with suppress(MigrationError):  # the placement before it serves on; the state says "failed"
            self._migration.advance()
        progress = self._migration.progress
        if progress.state != "moving":
            sentence = f"the re-placement is {progress.state}: placement version {progress.version} serves"
            self._note(f"re-placement {progress.state}", sentence, bytes_moved=progress.bytes_moved)
            self._migration = None

    def _note(self, kind: str, sentence: str, **figures: Any) -> None:
        with self._changed:  # re-entrant
            self._log.append(Event(time.time(), kind, sentence, figures))

    def _first_status(self) -> ServiceStatus:
        engine = self._engine
        return ServiceStatus(
            generation=1,
            placement_version=engine.executor.version,
            placement_digest=engine.placement.digest,
            desired=1,
            allocated=(_MEMBER,),
            active=(_MEMBER,),
            routable=(_MEMBER,),
            waiting=0,
            running=0,
            steps=0,
            tokens=0,
            changing=False,
            migration=None,
            counters=engine.group.counters.totals(),
            imbalance_per_layer=(1.0,) * engine.checkpoint.num_layers,
            serving=True,
            reason="",
        )

    def _publish(self) -> None:
        """A new snapshot, in one assignment: readers in other threads see the old one or the new one."""
        engine, scheduler, counters = self._engine, self._engine.scheduler, self._status.counters
        now = time.monotonic()
        if now - self._counted_at > _COUNTERS_EVERY or scheduler.is_idle:
            engine.flush_counts()
            counters, self._counted_at = engine.group.counters.totals(), now
        progress = None if self._migration is None else self._migration.progress
        self._status = replace(
            self._status,
            placement_version=engine.executor.version,
            placement_digest=engine.placement.digest,
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            steps=engine.group.counters.steps,
            passes=dict(self._passes),
            pass_seconds=dict(self._pass_seconds),
            kv_used=scheduler.kv_used,
            kv_room=scheduler.kv_room,
            tokens=self._requests.num_tokens,
            changing=progress is not None,
            migration=None
            if progress is None
            else {
                "bytes_moved": progress.bytes_moved,
                "bytes_planned": progress.bytes_total,
                "commits": progress.commits,
            },
            counters=counters,
        )
