"""Serving: what a member does within a generation. Steps, and between them the commands of the log, alike on all ranks.

Rank 0 looks how many commands there are; the number travels with the tokens of the step, so that all ranks apply the
same commands at the same boundary. When there is nothing to do, each rank waits for the next command instead.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from moeplace.placement.migration.file import plan_from_json
from moeplace.placement.placement import EMPTY_SLOT, Placement, with_slots
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.engine import Engine, Stepped
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.step_check import check_step
from moeplace.runtime.errors import DisagreementError, MigrationError
from moeplace.runtime.migration.live import LiveMigration
from moeplace.runtime.service.api import ServiceOptions
from moeplace.runtime.service.faults import FaultPlan
from moeplace.runtime.service.generation import Generation
from moeplace.runtime.service.routing_request import to_text
from moeplace.runtime.service.store import Document, ServiceStore

COUNTERS_EVERY = 1.0
"""Seconds between two reports of a member's counters."""


@dataclass(frozen=True)
class Outcome:
    """Why a generation ended: `generation` follows (as prepared, or because a rank was lost), or the service stops."""

    kind: Literal["switch", "lost", "stop"]
    generation: int = 0


@dataclass(eq=False)
class Replacement:
    """A re-placement under way.

    Attributes:
        migration: what moves the experts, among ranks with the slots of before and after together.
        before, after: (R,) slots per rank.
        begun: by the monotonic clock.
        bytes_planned: of the plan.
    """

    migration: LiveMigration
    before: np.ndarray
    after: np.ndarray
    begun: float
    bytes_planned: int


class Serving:
    """One member at work.

    Attributes:
        engine: this rank's.
        applied: commands that are done.
        progress: steps and commands that are done.
    """

    def __init__(
        self,
        engine: Engine,
        store: ServiceStore,
        *,
        member: int,
        options: ServiceOptions,
        prepare: Callable[[Generation], None],
        faults: FaultPlan,
    ) -> None:
        """`prepare` lets the group of a generation that is to follow connect, beside the steps."""
        self.engine = engine
        self._prepare = prepare
        self.applied = self.progress = 0
        self._store, self._member, self._faults = store, member, faults
        self._options, self._generation = options, 0
        self._replacement: Replacement | None = None
        self._slots_before: np.ndarray | None = None  # while a re-placement adds empty slots
        self._last_counters = self._turn_ended = 0.0

    def run(self) -> Outcome | None:
        """One turn: a step and what follows it, or one command. None = there is more to do in this generation.

        Raises:
            PeerLostError: a rank is gone; the state is that of the last boundary, up to what `Snapshot` says.
        """
        if self._is_idle:
            self._turn_ended = 0.0
            return self._apply(self._store.read(f"log/{self.applied}"))
        is_leader = self.engine.group.rank == 0
        note = self._store.log_length() if is_leader else 0
        applied_before, moving = self.applied, self._replacement is not None
        begin = self._turn_ended or time.perf_counter()
        self._faults.reach("step")
        stepped = self.engine.step_with_note(note)
        self.progress += 1
        self._faults.reach("step", after=True)
        self._advance()
        if self._options.check_steps:
            check_step(self.engine, applied=self.applied, progress=self.progress)
        self._turn_ended = time.perf_counter()
        if is_leader:
            seconds = self._turn_ended - begin
            self._report_step(stepped, applied_before, seconds=seconds, moving=moving)
        self._report_counters()
        while self.applied < stepped.note:
            outcome = self._apply(self._store.read(f"log/{self.applied}"))
            if outcome is not None:
                return outcome
        return None

    def own_slots(self) -> tuple[tuple[int, ...], ...]:
        """(L, C) the experts of this rank's slots, without the empty ones that a re-placement added."""
        placement, rank = self.engine.placement, self.engine.group.rank
        own = placement.slot_to_expert[:, placement.slots_on(rank)]
        used = np.flatnonzero((own != EMPTY_SLOT).any(axis=0))
        count = int(used[-1]) + 1 if len(used) else 0
        if self._slots_before is not None:
            own = own[:, : max(count, int(self._slots_before[rank]))]
        return tuple(map(tuple, own.tolist()))

    def drop_replacement(self) -> None:
        """A rank is gone, and so is what was on its way."""
        if self._replacement is not None:
            self._replacement.migration.discard()
            self._replacement = None

    def take_over(self, generation: int, *, applied: int, progress: int) -> None:
        """Begin a generation."""
        self._generation, self._turn_ended = generation, 0.0
        if self.engine.window.recent is not None:
            self.engine.window.recent.restart()  # ranks that are new begin with pass 0
        self.applied, self.progress = applied, progress
        self._slots_before = None

    @property
    def _is_idle(self) -> bool:
        return self.engine.scheduler.is_idle and self._replacement is None

    def _apply(self, command: Document) -> Outcome | None:
        self.applied += 1
        self.progress += 1
        kind = command["kind"]
        if kind == "add":
            self._add(command)
        elif kind == "cancel":
            self.engine.scheduler.cancel(command["request_id"])
        elif kind == "replace":
            self._begin_replacement(command)
        elif kind == "routing":
            self._report_routing(command["number"])
        elif kind == "prepare":
            self._prepare(Generation.from_json(command["generation"]))
        elif kind == "stop" or command["generation"] > self._generation:  # older ones have been followed already
            return Outcome(kind, command.get("generation", 0))
        return None

    def _add(self, command: Document) -> None:
        request = Request.from_json(command["request"])
        try:
            self.engine.check_request(request)
        except InputError as error:
            if self.engine.group.rank == 0:
                self._store.report({"kind": "refused", "request_id": request.request_id, "error": str(error)})
            return
        self.engine.scheduler.resume(request, command.get("added", ()))

    def _begin_replacement(self, command: Document) -> None:
        """Make room for the slots of before and after together, then migrate in it."""
        plan = plan_from_json(command["plan"])
        before, after = self.engine.placement.slots_of_rank, np.array(command["slots_of_rank"])
        self._slots_before = before
        try:
            self._take_slots(plan.layout.old_slots_of_rank)
            limit = self._options.bytes_per_step
            migration = LiveMigration(self.engine, plan, bytes_per_step=limit, probe=self._probe())
        except (InputError, DisagreementError) as error:
            self._take_slots(before)
            self._slots_before = None
            self._report_replaced(str(error))
            return
        self._replacement = Replacement(migration, before, after, time.monotonic(), plan.bytes)

    def _probe(self) -> list[list[int]]:
        """A token sequence for the checks of a re-placement, the same on all ranks; none where none is wanted."""
        length = min(self._options.probe_tokens, self.engine.scheduler.positions)
        vocabulary = self.engine.executor.decoder.vocabulary
        return [np.random.default_rng(length).integers(vocabulary, size=length).tolist()] if length else []

    def _advance(self) -> None:
        replacement = self._replacement
        if replacement is None:
            return
        self._faults.reach("migration")
        error = ""
        try:
            progress = replacement.migration.advance()
        except (MigrationError, DisagreementError) as failure:
            error, progress = str(failure), replacement.migration.progress
        self._faults.reach("migration", after=True)
        if progress.state == "moving":
            return
        self._replacement = self._slots_before = None
        self._take_slots(replacement.after if progress.state == "done" else replacement.before)
        figures = {"bytes_moved": progress.bytes_moved, "commits": progress.commits}
        self._report_replaced(error, seconds=time.monotonic() - replacement.begun, **figures)

    def _take_slots(self, slots_of_rank: np.ndarray) -> None:
        """Serve the same experts with more or fewer slots, empty ones: this rank's business alone."""
        engine = self.engine
        if np.array_equal(engine.placement.slots_of_rank, slots_of_rank):
            return
        placement, rank = with_slots(engine.placement, slots_of_rank), engine.group.rank
        if slots_of_rank[rank] != engine.placement.slots_of_rank[rank]:
            engine.executor.runtime.experts.resize(int(slots_of_rank[rank]))
        engine.executor.install(placement, version=engine.executor.version)

    def _report_step(self, stepped: Stepped, applied: int, *, seconds: float, moving: bool) -> None:
        reasons = {completion.request_id: completion.finish_reason for completion in stepped.completions}
        tokens = [[name, index, token, reasons.get(name)] for name, index, token in stepped.drawn]
        scheduler, migration = self.engine.scheduler, None
        if self._replacement is not None:
            progress = self._replacement.migration.progress
            planned = self._replacement.bytes_planned
            migration = {"bytes_moved": progress.bytes_moved, "bytes_planned": planned, "commits": progress.commits}
        self._store.report(
            {
                "kind": "step",
                "generation": self._generation,
                "ranks": self.engine.group.size,
                "applied": applied,
                "tokens": tokens,
                "waiting": len(scheduler.waiting),
                "running": len(scheduler.running),
                "migration": migration,
                "seconds": seconds,
                "moving": moving,
                "phase": stepped.phase,
            }
        )

    def _report_replaced(self, error: str, **figures: Any) -> None:
        if self.engine.group.rank == 0:
            self._store.report({"kind": "replaced", "error": error, **self.describe_placement(), **figures})

    def _report_routing(self, number: int) -> None:
        recent = self.engine.window.recent
        if recent is not None:
            rows = to_text(recent.snapshot())
            self._store.report({"kind": "routing", "member": self._member, "number": number, "rows": rows})

    def describe_placement(self) -> Document:
        """The placement in force, as plain data."""
        placement = self.engine.placement
        slots = [slots_of(placement, rank) for rank in range(placement.num_ranks)]
        return {"slots": slots, "version": self.engine.executor.version, "digest": placement.digest}

    def _report_counters(self) -> None:
        now = time.monotonic()
        if now - self._last_counters < COUNTERS_EVERY:
            return
        self._last_counters = now
        engine = self.engine
        engine.flush_counts()
        counters = engine.group.counters
        tokens = [counters.tokens[layer] for layer in range(engine.checkpoint.num_layers)]
        self._store.report(
            {
                "kind": "counters",
                "member": self._member,
                "counters": counters.totals(),
                "tokens_per_layer": tokens,
                "load": engine.window.load.tolist(),
            }
        )


def slots_of(placement: Placement, rank: int) -> list[list[int]]:
    """(L, C) the experts of a rank's slots, as plain data."""
    return placement.slot_to_expert[:, placement.slots_on(rank)].tolist()


def sentence_of(error: BaseException) -> str:
    """One sentence for a failure."""
    text = str(error) if isinstance(error, MoeplaceError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())
