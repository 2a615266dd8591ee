"""Serving: what a member does within a generation. Steps, and between them the commands of the log, alike on all ranks.

Rank 0 looks how many commands there are; the number travels with the tokens of the step, so that all ranks apply the
same commands at the same boundary. When there is nothing to do, each rank waits for the next command instead.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.engine import Engine, Stepped
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.engine.step_check import check_step
from moeplace.runtime.service.faults import FaultPlan
from moeplace.runtime.service.generation import Generation, slots_of
from moeplace.runtime.service.member.heartbeat import Heartbeat
from moeplace.runtime.service.member.slot_change import SlotChange
from moeplace.runtime.service.options import ServiceOptions
from moeplace.runtime.service.routing_text import to_text
from moeplace.runtime.service.store import Document, ServiceStore

COUNTERS_EVERY = 1.0
"""Seconds between two reports of a member's counters."""


@dataclass(frozen=True)
class Outcome:
    """Why a generation ended: `generation` follows (as prepared, or because a rank was lost), or the service stops."""

    kind: Literal["switch", "lost", "stop"]
    generation: int = 0


class Serving:
    """One member at work.

    Attributes:
        engine: this rank's.
        generation: number of the one in force.
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
        heartbeat: Heartbeat,
    ) -> None:
        """`prepare` lets the group of a generation that is to follow connect, beside the steps."""
        self.engine = engine
        self._prepare = prepare
        self.applied = self.progress = self.generation = 0
        self._store, self._member, self._faults, self._heartbeat = store, member, faults, heartbeat
        self._options = options
        self._replacing = SlotChange(engine, options, faults)
        self._last_counters = self._turn_ended = 0.0
        self._is_counted = True  # whether all that was done has been reported

    def run(self) -> Outcome | None:
        """One turn: a step and what follows it, or one command. None = there is more to do in this generation.

        Raises:
            PeerLostError: a rank is gone; the state is that of the last boundary, up to what `Snapshot` says.
        """
        if self._is_idle:
            return self._await_command()
        self._heartbeat.begin()
        is_leader = self.engine.group.rank == 0
        note = self._store.log_length() if is_leader else 0
        applied_before, moving = self.applied, self._replacing.is_moving
        begin = self._turn_ended or time.perf_counter()
        self._announce_pass(is_leader)
        self._faults.reach("step")
        stepped = self.engine.step_with_note(note)
        self.progress += 1
        self._is_counted = False
        self._faults.reach("step", after=True)
        self._advance()
        if self._options.check_steps:
            check_step(self.engine, applied=self.applied, progress=self.progress)
        self._turn_ended = time.perf_counter()
        if is_leader:
            seconds = self._turn_ended - begin
            self._report_step(stepped, applied_before, seconds=seconds, moving=moving)
        if time.monotonic() - self._last_counters >= COUNTERS_EVERY:
            self.report_counters()
        while self.applied < stepped.note:
            outcome = self._apply(self._store.read(f"log/{self.applied}"))
            if outcome is not None:
                return outcome
        return None

    def _await_command(self) -> Outcome | None:
        """With nothing to do: what there is to be known is told, then the next command is waited for."""
        self._turn_ended = 0.0
        self.report_counters()
        self._report_queue()
        self._heartbeat.rest()
        command = self._store.read(f"log/{self.applied}")
        self._heartbeat.begin()
        return self._apply(command)

    def _announce_pass(self, is_leader: bool) -> None:
        """Let the coordinator know whose prompts run in this pass: if it ends badly, it may be because of one."""
        tickets = self.engine.foresee().prompt_ids
        if is_leader and tickets:
            self._store.report({"kind": "pass", "generation": self.generation, "tickets": tickets})
        if not self._faults.is_empty:
            for ticket in tickets:
                self._faults.reach(f"request:{ticket.partition(':')[2]}")

    def own_slots(self) -> tuple[tuple[int, ...], ...]:
        """See `SlotChange`."""
        return self._replacing.own_slots()

    def drop_replacement(self) -> None:
        """A rank is gone, and so is what was on its way."""
        self._replacing.drop()
        self.engine.executor.forget_unsettled()

    def settle(self) -> None:
        """Let what is on its way arrive, on all ranks together: they leave the generation in order."""
        self.engine.executor.settle()

    def take_over(self, generation: int, *, applied: int, progress: int) -> None:
        """Begin a generation."""
        self.generation, self._turn_ended = generation, 0.0
        if self.engine.window.recent is not None:
            self.engine.window.recent.restart()  # ranks that are new begin with pass 0
        self.applied, self.progress = applied, progress
        self._replacing.forget()

    @property
    def _is_idle(self) -> bool:
        return self.engine.scheduler.is_idle and not self._replacing.is_moving

    def _apply(self, command: Document) -> Outcome | None:
        self.applied += 1
        self.progress += 1
        kind = command["kind"]
        if kind == "add":
            self._add(command)
        elif kind == "cancel":
            self.engine.scheduler.cancel(command["request_id"])
        elif kind == "replace":
            if command["generation"] == self.generation:  # else it is for ranks that are no more
                self._report_replaced(self._replacing.begin(command))
        elif kind == "routing":
            self._report_routing(command["number"])
        elif kind == "prepare":
            generation = Generation.from_json(command["generation"])
            if generation.number > self.generation:
                self._prepare(generation)
        elif kind == "stop" or command["generation"] > self.generation:  # older ones have been followed already
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

    def _advance(self) -> None:
        self._report_replaced(self._replacing.advance())

    def _report_step(self, stepped: Stepped, applied: int, *, seconds: float, moving: bool) -> None:
        reasons = {completion.request_id: completion.finish_reason for completion in stepped.completions}
        tokens = [[name, index, token, reasons.get(name)] for name, index, token in stepped.drawn]
        scheduler, migration = self.engine.scheduler, self._replacing.figures()
        self._store.report(
            {
                "kind": "step",
                "generation": self.generation,
                "ranks": self.engine.group.size,
                "applied": applied,
                "tokens": tokens,
                "logprobs": {name: found.to_json() for name, found in stepped.logprobs.items()},
                "waiting": len(scheduler.waiting),
                "running": len(scheduler.running),
                "migration": migration,
                "seconds": seconds,
                "moving": moving,
                "phase": stepped.phase,
                "kv": [scheduler.kv_used, scheduler.kv_room],
            }
        )

    def _report_queue(self) -> None:
        if self.engine.group.rank == 0:
            scheduler = self.engine.scheduler
            told = {"waiting": len(scheduler.waiting), "running": len(scheduler.running)}
            self._store.report({"kind": "queue", "generation": self.generation, **told})

    def _report_replaced(self, ended: Document | None) -> None:
        """A re-placement has ended, or None = it has not."""
        if ended is not None and self.engine.group.rank == 0:
            self._store.report({"kind": "replaced", **self.describe_placement(), **ended})

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

    def report_counters(self) -> None:
        """What this rank has counted, unless that is known."""
        if self._is_counted:
            return
        self._last_counters, self._is_counted = time.monotonic(), True
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
