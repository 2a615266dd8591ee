"""One rank of the elastic benchmark: serves seeded requests and changes the placement meanwhile.

python -m torch.distributed.run --standalone --nproc-per-node 4 -m moeplace.launch.elastic_worker FOLDER
"""

import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from moeplace.launch.elastic_load import ElasticJob
from moeplace.launch.quickstart_job import PROGRESS, failure_path, result_path
from moeplace.placement.migration import MigrationPlan, plan_migration
from moeplace.profiling.errors import MoeplaceError
from moeplace.profiling.files import write_json
from moeplace.runtime.engine import Engine, EngineLimits
from moeplace.runtime.group import RankGroup
from moeplace.runtime.migrate import LiveMigration

SERVED = torch.float64
"""So that no tie between two tokens depends on the order of a sum: another token is then a fault."""
WARM_UP = 20
"""Steps that are not counted: the first ones allocate."""


@dataclass
class Record:
    """What one rank saw.

    Attributes:
        step_seconds: of decode steps, what a migration does between them included.
        step_tokens: sequences of each.
        moving: whether a migration was under way.
        boundary_seconds: that migrations took between two passes.
        tokens: token ids per request number.
        added: requests added.
        versions: placement version after every re-placement.
        bytes_moved: bytes that arrived with re-placements, over all ranks.
        bytes_planned: bytes of the plans.
    """

    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    moving: list[bool] = field(default_factory=list)
    boundary_seconds: list[float] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    added: int = 0
    versions: list[int] = field(default_factory=list)
    bytes_moved: int = 0
    bytes_planned: int = 0


def main(arguments: list[str]) -> int:
    """Do the job in the folder; 0 = done, 1 = failed, with the reason in a file."""
    folder, rank = Path(arguments[0]), int(os.environ.get("RANK", "0"))
    try:
        record = ElasticServer(folder).run()
        write_json(result_path(folder, rank), vars(record) if rank == 0 else {"versions": record.versions})
    except Exception as error:
        sentence = str(error) if isinstance(error, MoeplaceError) else f"{type(error).__name__}: {error}"
        traceback.print_exc()
        failure_path(folder, rank).write_text(" ".join(sentence.split()))
        return 1
    return 0


class ElasticServer:
    """Serves until all steps and re-placements are done and no request is in flight."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self._folder, self._job = folder, ElasticJob.load(folder)
        group = RankGroup.from_environment(timeout=self._job.timeout, device="cpu")
        self._engine = make_engine(self._job, group)
        self._plans = self._plan()
        self._due = self._job.moments()
        self._migration: LiveMigration | None = None
        self._record = Record(bytes_planned=sum(plan.bytes for plan in self._plans))

    def run(self) -> Record:
        """Serve."""
        for _ in range(WARM_UP):
            self._refill()
            self._pass()
        while len(self._record.step_seconds) < self._job.steps or self._plans or self._migration is not None:
            self._refill()
            self._timed_pass()
            self._report()
        while not self._engine.scheduler.is_idle:
            self._pass()
        return self._record

    def _plan(self) -> list[MigrationPlan]:
        """One plan per re-placement, made before serving: a controller plans in another process."""
        size = self._engine.executor.runtime.experts.expert_bytes(0)
        pairs = pairwise(self._job.placements(self._engine.placement))
        return [plan_migration(old, new, expert_bytes=size, staging_bytes=size) for old, new in pairs]

    def _refill(self) -> None:
        """Add requests when a quarter of the batch is free."""
        scheduler, batch = self._engine.scheduler, self._job.batch
        in_flight = len(scheduler.running) + len(scheduler.waiting)
        if in_flight > batch - batch // 4:
            return
        vocabulary = self._engine.executor.decoder.vocabulary
        for _ in range(batch - in_flight):
            self._engine.add_request(self._job.request(self._record.added, vocabulary=vocabulary))
            self._record.added += 1

    def _pass(self) -> None:
        for completion in self._engine.step():
            self._record.tokens[int(completion.request_id)] = list(completion.token_ids)

    def _timed_pass(self) -> None:
        """One pass and what a migration does at its boundary; counted if it decodes."""
        scheduler, moving = self._engine.scheduler, self._migration is not None
        is_decode, tokens = not scheduler.waiting, len(scheduler.running)
        begin = time.perf_counter()
        self._pass()
        passed = time.perf_counter()
        moving |= self._move()
        end = time.perf_counter()
        if moving:
            self._record.boundary_seconds.append(end - passed)
        if is_decode:
            self._record.step_seconds.append(end - begin)
            self._record.step_tokens.append(tokens)
            self._record.moving.append(moving)

    def _move(self) -> bool:
        """Start a migration that is due, or advance the one under way; whether there is one."""
        if self._migration is None:
            if not self._plans or len(self._record.step_seconds) < self._due[0]:
                return False
            self._due.pop(0)
            limit = self._job.bytes_per_step
            self._migration = LiveMigration(self._engine, self._plans.pop(0), bytes_per_step=limit)
        progress = self._migration.advance()
        if progress.state == "done":
            self._record.bytes_moved += progress.bytes_moved
            self._record.versions.append(progress.version)
            self._migration = None
        return True

    def _report(self) -> None:
        if self._engine.group.rank == 0:
            share = min(len(self._record.step_seconds) / self._job.steps, 1.0)
            (self._folder / PROGRESS).write_text(f"{share:.3f}")


def make_engine(job: ElasticJob, group: RankGroup | None) -> Engine:
    """The engine of a rank, or with `group` None that of the undisturbed process."""
    limits = EngineLimits(max_sequences=job.batch, max_length=job.max_length, staging_rows=job.staging_rows)
    return Engine(job.model, mode=job.mode, group=group, dtype=SERVED, limits=limits)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
