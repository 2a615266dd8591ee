"""LiveMigration: change the placement of an engine between steps, while it serves.

    migration = LiveMigration(engine, plan, bytes_per_step=1 << 20)
    while not engine.scheduler.is_idle:
        engine.step()
        migration.advance()

Every rank makes the same migration and calls `advance` at the same step boundaries. Experts travel piece by piece on a
process group of their own into rows from which nothing is served: steps go on under the placement in force. When all of
a commit's experts are there, one `advance` switches the slot tables of all ranks. It then checks what they name: each
rank holds, with the bytes of the checkpoint, the experts that the placement names, all ranks have the same placement,
and (where asked for) some logits are those from before. Only then does the next step run; otherwise all goes back.

Where the staging rows do not hold the whole plan, it is committed in several steps, each a valid placement.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from moeplace.placement.migration.copies import CHECKPOINT
from moeplace.placement.migration.plan import MigrationPlan
from moeplace.placement.placement import Placement
from moeplace.profiling.errors import InputError, MoeplaceError
from moeplace.runtime.engine.requests import Request
from moeplace.runtime.errors import DisagreementError, MigrationError
from moeplace.runtime.migration.pieces import Arrival, Commit, Piece, cut_pieces, list_commits
from moeplace.runtime.migration.staging import Staging

if TYPE_CHECKING:
    from moeplace.runtime.engine.engine import Engine

logger = logging.getLogger(__name__)

State = Literal["moving", "done", "aborted", "failed"]

PROBE_TOLERANCE = 1e-3
"""Largest change of a probe's logits, as a share of the largest logit: other placements add in another order."""
_NONE = -1


@dataclass(frozen=True)
class MigrationProgress:
    """Where a migration stands, alike on all ranks.

    Attributes:
        state: moving; done; aborted (by `abort`); failed (a check said no).
        bytes_moved: bytes that ranks have got so far, all together.
        bytes_total: of the whole plan.
        rounds_done: rounds of the plan of which everything has arrived.
        commits: switches so far.
        version: placement version in force.
    """

    state: State
    bytes_moved: int
    bytes_total: int
    rounds_done: int
    commits: int
    version: int


class LiveMigration:
    """See the module.

    Attributes:
        commits: what is still to be committed; with one, nothing is visible before everything is.
    """

    def __init__(
        self,
        engine: "Engine",
        plan: MigrationPlan,
        *,
        bytes_per_step: int,
        probe: Sequence[Sequence[int]] = (),
        probe_tolerance: float = PROBE_TOLERANCE,
    ) -> None:
        """Check the plan and agree with the other ranks. Nothing is sent yet.

        Args:
            engine: its limits must give staging rows.
            bytes_per_step: most bytes that a rank sends, and most that it receives, between two calls of `advance`;
                an expert from the checkpoint is read whole.
            probe: token sequences whose logits are compared before and after every switch; each switch then takes as
                long as `engine.score` of them. A row of the K/V cache is kept free for them: the first switch waits
                until one is.
            probe_tolerance: see PROBE_TOLERANCE.

        Raises:
            InputError: the plan starts from another placement, changes the ranks, or needs more staging rows; another
                migration is under way.
            DisagreementError: ranks were given different plans.
        """
        self._engine, self._store = engine, engine.executor.runtime.experts
        self._probe, self._tolerance = probe, probe_tolerance
        try:
            self.commits = _checked_commits(engine, plan, bytes_per_step)
        except MoeplaceError as error:  # raised on all ranks alike, or known to all
            engine.group.agree({"migration plan": f"refused, {error}"})
            raise
        engine.group.agree({"migration plan": f"{_plan_digest(plan)} in pieces of {bytes_per_step} bytes"})
        self._store.contents.share_reference(engine.group, engine.placement)
        self._logits: list[torch.Tensor] | None = None
        engine.scheduler.kept_free = 1 if probe else 0
        self._staging = Staging(self._store, engine.group)
        self._bytes_per_step = bytes_per_step
        self._bytes_total = sum(arrival.size for commit in self.commits for arrival in commit.arrivals)
        self._missing = Counter(arrival.round for commit in self.commits for arrival in commit.arrivals)
        self._bytes_moved = self._commits_done = self._rounds_done = 0
        self._steps: Iterator[list[Piece]] = iter(())
        self._state: State = "moving"
        self._store.is_migrating = True
        self._begin()

    @property
    def progress(self) -> MigrationProgress:
        """Where it stands."""
        return MigrationProgress(
            self._state,
            self._bytes_moved,
            self._bytes_total,
            self._rounds_done,
            self._commits_done,
            self._engine.executor.version,
        )

    @property
    def is_moving(self) -> bool:
        """Whether there is something left to do."""
        return self._state == "moving"

    def advance(self) -> MigrationProgress:
        """Between two steps, on every rank: take what came, switch if that was all, send the next piece.

        The piece travels during the next step. Does nothing when the migration has ended.

        Raises:
            MigrationError: a check after a switch failed; the placement before the switch serves on.
            DisagreementError: ranks would switch to different placements; likewise.
            PeerLostError: a rank is gone; the placement in force is the last that was committed.
        """
        if not self.is_moving:
            return self.progress
        self._take()
        if self._probe and self._logits is None and self._has_room_for_probe():
            self._logits = self._engine.score(self._probe)
        pieces = next(self._steps, None)
        if pieces is None and (not self._probe or (self._logits is not None and self._has_room_for_probe())):
            self._commit(self.commits[0])
            self.commits.pop(0)
            self._begin()
            pieces = next(self._steps, None)
        if pieces:
            self._send(pieces)
        return self.progress

    def abort(self) -> MigrationProgress:
        """Give up, on every rank at the same step boundary: the placement in force stays, staging rows are free."""
        if self.is_moving:
            self._staging.finish()
            self._end("aborted")
        return self.progress

    def discard(self) -> None:
        """Give up without the other ranks, one of which is gone: what is on its way is left alone."""
        if self.is_moving:
            self._end("aborted")

    def _begin(self) -> None:
        """Reserve rows for the next commit, or end."""
        if not self.commits:
            self._end("done")
            return
        arrivals = self.commits[0].arrivals
        self._staging.reserve(arrivals)
        ranks = self._engine.group.size
        self._steps = cut_pieces(arrivals, num_ranks=ranks, bytes_per_step=self._bytes_per_step)

    def _end(self, state: State) -> None:
        self._staging.release()
        self._store.is_migrating = False
        self._engine.scheduler.kept_free = 0
        self._state = state

    def _send(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.arrival.sender == CHECKPOINT and piece.arrival.receiver == self._engine.group.rank:
                self._read(piece.arrival)
        self._staging.start(pieces)

    def _read(self, arrival: Arrival) -> None:
        layer, expert = arrival.layer, arrival.expert
        self._store.load(layer, self._staging.row_of(arrival), expert, self._engine.checkpoint.expert(layer, expert))

    def _take(self) -> None:
        """End the exchange under way, and count."""
        for piece in self._staging.finish():
            self._bytes_moved += piece.stop - piece.start
            self._missing[piece.arrival.round] -= piece.stop == piece.arrival.size
        while self._rounds_done < self.commits[0].end and not self._missing[self._rounds_done]:
            self._rounds_done += 1

    def _has_room_for_probe(self) -> bool:
        """Whether the scheduler, which is alike on all ranks, has a place for a sequence."""
        sequence = self._engine.scheduler.place(Request("probe", tuple(self._probe[0])))
        if sequence is not None:
            self._engine.scheduler.release(sequence)
        return sequence is not None

    def _commit(self, commit: Commit) -> None:
        """Switch, check, and go back if a check fails."""
        executor = self._engine.executor
        before, version, table = executor.placement, executor.version, self._store.row_of_slot
        new_table = self._staging.slot_table(before, commit.placement)
        exchanges = self._staging.exchanges(new_table, commit.placement)
        self._exchange(exchanges)
        self._store.commit_table(new_table)
        executor.install(commit.placement)
        try:
            self._check_ranks(before, commit.placement)
            self._check_probe()
        except MoeplaceError:
            self._exchange(exchanges)
            self._staging.undo(exchanges)
            self._store.commit_table(table)
            executor.install(before, version=version)
            self._end("failed")
            raise
        self._staging.settle(commit.placement)
        self._commits_done += 1
        if self._engine.group.rank == 0:
            logger.info("placement version %d serves: %s", executor.version, commit.placement.digest)

    def _exchange(self, rows: Sequence[tuple[int, int, int]]) -> None:
        for layer, one, other in rows:
            self._store.exchange(layer, one, other)

    def _check_ranks(self, before: Placement, after: Placement) -> None:
        """Compare digests and what every rank finds in its slots: one collective of four numbers."""
        group = self._engine.group
        layer, expert = self._staging.first_damaged(before, after) or (_NONE, _NONE)
        mine = torch.tensor([_short(after.digest), layer, expert], device=group.device)
        everyone = mine.new_empty(group.size, len(mine))
        if group.size > 1:
            group.all_gather(everyone, mine, kind="commit")
        else:
            everyone[0] = mine
        digests, layers, experts = everyone.T.tolist()
        group.raise_if_lost()
        if len(set(digests)) > 1:
            raise DisagreementError("ranks would switch to different placements; the one before the switch serves on")
        damaged = [(rank, layers[rank], experts[rank]) for rank in range(group.size) if layers[rank] != _NONE]
        if damaged:
            rank, layer, expert = damaged[0]
            raise MigrationError(
                f"expert {expert} of MoE layer {layer} is damaged on rank {rank}: its bytes are not those of the "
                f"checkpoint; the placement before the switch ({before.digest[:19]}) serves on"
            )

    def _check_probe(self) -> None:
        """Compare the probe's logits, which all ranks have alike."""
        if self._logits is None:
            return
        pairs = zip(self._logits, self._engine.score(self._probe), strict=True)
        changes = torch.stack([(a - b).abs().max() / a.abs().max() for a, b in pairs])
        worst = changes.max().item()  # NaN where any of them is
        if not worst <= self._tolerance:
            raise MigrationError(
                f"the logits of the probe changed by {worst:.2g} of the largest one with the switch, more than "
                f"{self._tolerance:g}; the placement before it serves on"
            )


def _checked_commits(engine: "Engine", plan: MigrationPlan, bytes_per_step: int) -> list[Commit]:
    store = engine.executor.runtime.experts
    if bytes_per_step < 1:
        raise InputError(f"bytes per step ({bytes_per_step}) must be at least 1")
    if store.is_migrating:
        raise InputError("another migration is under way; only one at a time has the staging rows")
    rows = store.staging_rows
    return list_commits(engine.placement, plan, staging_rows=rows, expert_bytes=store.expert_bytes)


def _plan_digest(plan: MigrationPlan) -> str:
    content = repr((plan.old_digest, plan.new_digest, plan.rounds, plan.emptied))
    return "sha256:" + hashlib.sha256(content.encode()).hexdigest()


def _short(digest: str) -> int:
    """The first 60 bits of a digest."""
    return int(digest.removeprefix("sha256:")[:15], 16)
