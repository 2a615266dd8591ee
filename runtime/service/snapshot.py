"""Snapshot: what a member knows of the service, and what all members go on with when their ranks change.

When a rank is lost in the middle of a step, some survivors may have finished it and others not. They exchange
snapshots; from all of them each computes the same `Continuation`: the tokens of the one that got farthest, the places
of sequences whose K/V survive, and a new turn for the others.

Pure functions of the snapshots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from moeplace.runtime.engine.logprobs import TokenLogprob
from moeplace.runtime.engine.requests import Request, RunningSequence
from moeplace.runtime.engine.scheduler import Scheduler


@dataclass(frozen=True)
class HeldSequence:
    """A sequence in flight as a member sees it.

    Attributes:
        request: what it serves.
        added: tokens that it has got.
        home: member that keeps its attention state; -1 = it waits.
        row: of the K/V cache, -1 = it waits.
        cached, replicated: positions whose K/V exist at home, on every rank.
        logprobs: (index among the added tokens, log-probabilities), where the request wants them.
        overtaken: how many that came later have got a place before it while it waited; one that has lost its place
            counts as overtaken as often as may be.
    """

    request: Request
    added: tuple[int, ...]
    home: int = -1
    row: int = -1
    cached: int = 0
    replicated: int = 0
    logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
    overtaken: int = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def held_by(self, member: int) -> int:
        """Positions whose K/V the member that saw this has."""
        return self.cached if member == self.home else self.replicated


@dataclass(frozen=True)
class Snapshot:
    """What a member brings along.

    Attributes:
        member: who.
        progress: steps and commands that it has finished, 0 = it is new.
        applied: commands among them.
        version: placement switches.
        slots: (L, C) experts of its slots.
        has_reference: whether it knows the checksums of all experts.
        sequences: running ones, then waiting ones, in their order.
        rewinds: whether a position that is in the cache already can be run again; recurrent states cannot.
    """

    member: int
    progress: int = 0
    applied: int = 0
    version: int = 0
    slots: tuple[tuple[int, ...], ...] = ()
    has_reference: bool = False
    sequences: tuple[HeldSequence, ...] = ()
    rewinds: bool = True

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "sequences": [{**vars(s), "request": s.request.to_json()} for s in self.sequences]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """From plain data."""
        sequences = tuple(
            HeldSequence(
                **{
                    **s,
                    "request": Request.from_json(s["request"]),
                    "added": tuple(s["added"]),
                    "logprobs": tuple((index, TokenLogprob.from_json(found)) for index, found in s["logprobs"]),
                }
            )
            for s in document["sequences"]
        )
        return cls(**{**document, "slots": tuple(map(tuple, document["slots"])), "sequences": sequences})


@dataclass(frozen=True)
class Continuation:
    """What all members of a generation start with.

    Attributes:
        applied: commands that are done.
        progress: see `Snapshot`.
        version: placement switches.
        running: sequences that keep their place; homes are ranks. `replicated` positions are on all but newcomers.
        waiting: the others, with the tokens they have got.
        newcomers: ranks that hold no K/V.
    """

    applied: int
    progress: int
    version: int
    running: tuple[HeldSequence, ...]
    waiting: tuple[HeldSequence, ...]
    newcomers: tuple[int, ...] = ()

    def fill(self, scheduler: Scheduler, *, rank: int) -> None:
        """Give the sequences to a scheduler that has none; newcomers have no K/V yet."""
        for held in self.running:
            tokens, logprobs = [*held.request.token_ids, *held.added], dict(held.logprobs)
            replicated = 0 if rank in self.newcomers else held.replicated
            sequence = RunningSequence(held.request, held.home, held.row, tokens, held.cached, replicated, logprobs)
            scheduler.seat(sequence)
        for held in self.waiting:
            scheduler.resume(held.request, held.added, dict(held.logprobs), overtaken=held.overtaken)


def take_snapshot_of(scheduler: Scheduler, members: Sequence[int]) -> tuple[HeldSequence, ...]:
    """The sequences of a scheduler; homes become members."""
    running = [
        HeldSequence(
            s.request,
            s.added,
            members[s.home],
            s.row,
            s.cached,
            s.replicated,
            tuple(sorted(s.logprobs.items())),
            overtaken=scheduler.order.most_overtaken,
        )
        for s in scheduler.running
    ]
    waiting = [
        HeldSequence(
            request,
            scheduler.added(request),
            logprobs=tuple(sorted(scheduler.logprobs(request).items())),
            overtaken=scheduler.order.overtaken(request.request_id),
        )
        for request in scheduler.waiting
    ]
    return (*running, *waiting)


def continue_from(
    snapshots: Sequence[Snapshot],
    *,
    replicated: bool,
    delivered: Mapping[str, Sequence[int]] | None,
    applied: int = 0,
) -> Continuation:
    """What follows from the snapshots of all members of a generation.

    Args:
        snapshots: by rank.
        replicated: whether a sequence has its row on all ranks; then it can get another home.
        delivered: tokens that were made known of each request in flight, which cannot be taken back; sequences that
            are not named have ended. None = as the snapshots say.
        applied: commands that are done where all members are new.
    """
    if not any(snapshot.progress for snapshot in snapshots):
        return Continuation(applied, 1, 0, (), (), tuple(range(len(snapshots))))
    first = max(snapshots, key=lambda snapshot: snapshot.progress)  # the lowest rank of equals
    running: list[HeldSequence] = []
    again: list[HeldSequence] = []
    waiting: list[HeldSequence] = []
    homes = _Homes(snapshots)
    for sequence in first.sequences:
        if delivered is not None and sequence.request_id not in delivered:
            continue
        known = () if delivered is None else tuple(delivered[sequence.request_id])
        sequence = _with(sequence, added=max(sequence.added, known, key=len))
        if sequence.home < 0:
            waiting.append(sequence)
            continue
        placed = homes.place(sequence, replicated=replicated)
        (again if placed is None else running).append(placed or _with(sequence, home=-1, row=-1))
    return Continuation(
        first.applied, first.progress, first.version, tuple(running), (*again, *waiting), homes.newcomers
    )


class _Homes:
    """Where K/V of sequences are among the members of a generation."""

    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._rank_of_member = {snapshot.member: rank for rank, snapshot in enumerate(snapshots)}
        self._members = [snapshot.member for snapshot in snapshots]
        self.newcomers = tuple(rank for rank, snapshot in enumerate(snapshots) if not snapshot.progress)
        self._rewinds = all(snapshot.rewinds for snapshot in snapshots)
        self._seen = [{s.request_id: s for s in snapshot.sequences} for snapshot in snapshots]
        self._load = [0] * len(snapshots)
        for sequence in max(snapshots, key=lambda snapshot: snapshot.progress).sequences:
            if sequence.home in self._rank_of_member:
                self._load[self._rank_of_member[sequence.home]] += 1

    def place(self, sequence: HeldSequence, *, replicated: bool) -> HeldSequence | None:
        """The sequence at a rank that has its K/V, None = nobody has."""
        last = len(sequence.request.token_ids) + len(sequence.added) - 1  # the last token is never cached
        held = [
            self._usable(seen[sequence.request_id].held_by(member), last) if sequence.request_id in seen else 0
            for seen, member in zip(self._seen, self._members, strict=True)
        ]
        old = [positions for rank, positions in enumerate(held) if rank not in self.newcomers]
        everywhere = min(old, default=0) if replicated else 0
        rank = self._rank_of_member.get(sequence.home)
        if rank is not None and held[rank]:
            return _with(sequence, home=rank, cached=held[rank], replicated=everywhere)
        if not replicated or not max(held):
            return None
        # Any holder can be its home.
        holders = [rank for rank in range(len(held)) if held[rank] == max(held)]
        rank = min(holders, key=lambda r: (self._load[r], r))
        self._load[rank] += 1
        return _with(sequence, home=rank, cached=held[rank], replicated=everywhere)

    def _usable(self, positions: int, last: int) -> int:
        """Of the positions that a member holds, those with which a sequence can go on at position `last` or before."""
        return min(positions, last) if self._rewinds or positions <= last else 0


def _with(sequence: HeldSequence, **changes: Any) -> HeldSequence:
    return HeldSequence(**{**vars(sequence), **changes})
