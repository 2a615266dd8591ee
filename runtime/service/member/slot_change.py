"""SlotChange: a re-placement as a member carries it out: among ranks with the slots of before and after together."""

import time
from dataclasses import dataclass

import numpy as np

from moeplace.placement.migration.file import plan_from_json
from moeplace.placement.placement import EMPTY_SLOT, with_slots
from moeplace.profiling.errors import InputError
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.errors import DisagreementError, MigrationError
from moeplace.runtime.migration.live import LiveMigration
from moeplace.runtime.service.faults import FaultPlan
from moeplace.runtime.service.options import ServiceOptions
from moeplace.runtime.service.store import Document


@dataclass(eq=False)
class Replacement:
    """A re-placement under way.

    Attributes:
        number: of its plan.
        migration: what moves the experts.
        before, after: (R,) slots per rank.
        begun: by the monotonic clock.
        bytes_planned: of the plan.
    """

    number: int
    migration: LiveMigration
    before: np.ndarray
    after: np.ndarray
    begun: float
    bytes_planned: int


class SlotChange:
    """See the module. At most one at a time is under way."""

    def __init__(self, engine: Engine, options: ServiceOptions, faults: FaultPlan) -> None:
        self._engine, self._options, self._faults = engine, options, faults
        self._current: Replacement | None = None
        self._slots_before: np.ndarray | None = None  # while empty slots are there for it

    @property
    def is_moving(self) -> bool:
        """Whether one is under way."""
        return self._current is not None

    def figures(self) -> Document | None:
        """How far it is, None = there is none."""
        current = self._current
        if current is None:
            return None
        progress = current.migration.progress
        moved = {"bytes_moved": progress.bytes_moved, "commits": progress.commits}
        return {**moved, "bytes_planned": current.bytes_planned}

    def own_slots(self) -> tuple[tuple[int, ...], ...]:
        """(L, C) the experts of this rank's slots, without the empty ones that a re-placement added."""
        placement, rank = self._engine.placement, self._engine.group.rank
        own = placement.slot_to_expert[:, placement.slots_on(rank)]
        used = np.flatnonzero((own != EMPTY_SLOT).any(axis=0))
        count = int(used[-1]) + 1 if len(used) else 0
        if self._slots_before is not None:
            own = own[:, : max(count, int(self._slots_before[rank]))]
        return tuple(map(tuple, own.tolist()))

    def begin(self, command: Document) -> Document | None:
        """Make room for the slots of before and after together, then migrate in it; what came of it at once."""
        plan, number = plan_from_json(command["plan"]), command["number"]
        before, after = self._engine.placement.slots_of_rank, np.array(command["slots_of_rank"])
        self._slots_before = before
        try:
            self._take_slots(plan.layout.old_slots_of_rank)
            limit = self._options.bytes_per_step
            migration = LiveMigration(self._engine, plan, bytes_per_step=limit, probe=self._probe())
        except (InputError, DisagreementError) as error:
            self._take_slots(before)
            self._slots_before = None
            return {"number": number, "error": str(error)}
        self._current = Replacement(number, migration, before, after, time.monotonic(), migration.progress.bytes_total)
        return None

    def advance(self) -> Document | None:
        """After a step; what came of it, None = it goes on, or there is none."""
        current = self._current
        if current is None:
            return None
        self._faults.reach("migration")
        error = ""
        try:
            progress = current.migration.advance()
        except (MigrationError, DisagreementError) as failure:
            error, progress = str(failure), current.migration.progress
        self._faults.reach("migration", after=True)
        if progress.state == "moving":
            return None
        self._current = self._slots_before = None
        self._take_slots(current.after if progress.state == "done" else current.before)
        figures = {"bytes_moved": progress.bytes_moved, "commits": progress.commits}
        seconds = time.monotonic() - current.begun
        return {"number": current.number, "error": error, "seconds": seconds, **figures}

    def drop(self) -> None:
        """A rank is gone, and so is what was on its way; `own_slots` still knows which slots were there before."""
        if self._current is not None:
            self._current.migration.discard()
            self._current = None

    def forget(self) -> None:
        """Another generation has begun, with slots of its own."""
        self._slots_before = None

    def _probe(self) -> list[list[int]]:
        """A token sequence for the checks of a re-placement, the same on all ranks; none where none is wanted."""
        length = min(self._options.probe_tokens, self._engine.scheduler.positions)
        vocabulary = self._engine.executor.decoder.vocabulary
        return [np.random.default_rng(length).integers(vocabulary, size=length).tolist()] if length else []

    def _take_slots(self, slots_of_rank: np.ndarray) -> None:
        """Serve the same experts with more or fewer slots, empty ones: this rank's business alone."""
        engine = self._engine
        if np.array_equal(engine.placement.slots_of_rank, slots_of_rank):
            return
        placement, rank = with_slots(engine.placement, slots_of_rank), engine.group.rank
        if slots_of_rank[rank] != engine.placement.slots_of_rank[rank]:
            engine.executor.runtime.experts.resize(int(slots_of_rank[rank]))
        engine.executor.install(placement, version=engine.executor.version)
