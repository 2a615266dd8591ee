"""Member: one rank of a service, from its start to its end.

`python -m moeplace.runtime.service.member.loop JSON` runs one.

start -> read the dense weights -> wait to be assigned -> connect -> open -> serve -> (next generation) -> end
"""

import json
import logging
import os
import sys
import traceback
from contextlib import suppress

import numpy as np
import torch

from moeplace.placement.placement import Placement
from moeplace.placement.replacement.width import Adoption, adopt
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.counters import Counters
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.errors import MigrationError, PeerLostError
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opening import open_model
from moeplace.runtime.service.api import MemberJob
from moeplace.runtime.service.faults import FaultPlan
from moeplace.runtime.service.generation import Forming, Generation
from moeplace.runtime.service.member.serving import Outcome, Serving, sentence_of
from moeplace.runtime.service.snapshot import Snapshot, continue_from, take_snapshot_of
from moeplace.runtime.service.store import ServiceEndedError, ServiceStore

logger = logging.getLogger(__name__)

_POLL = 0.01
"""Seconds between two looks whether a group has connected or its generation is over."""


class MemberLoop:
    """The life of a member.

    Attributes:
        job: what it was told.
    """

    def __init__(self, job: MemberJob) -> None:
        torch.set_num_threads(1)
        self.job = job
        self._store = self._connect()
        self._faults = FaultPlan(job.faults)
        self._checkpoint = Checkpoint(job.checkpoint)
        dtype = job.options.dtype
        self._decoder = open_model(self._checkpoint, dtype=getattr(torch, dtype) if dtype else None)
        self._counters = Counters()  # of all generations
        self._assignments = 0
        self._members: tuple[int, ...] = ()
        self._adopted = 0
        self._group: RankGroup | None = None
        self._serving: Serving | None = None
        self._prepared: Forming | None = None

    def run(self) -> None:
        """Serve until the service stops or goes on without this member."""
        self._store.report({"kind": "ready", "member": self.job.member_id, "limits": self._limits()})
        forming: Forming | None = self._await_assignment()
        while forming is not None:
            forming = self._take_part(forming)
        self._close_group()

    def _limits(self) -> dict[str, int]:
        """What requests and plans have to keep to."""
        limit, parts = self.job.options.limits.max_length, self._checkpoint.expert(0, 0)
        positions = min(self._decoder.max_positions, 2048) if limit is None else limit
        size = sum(part.numel() for part in parts.values()) * self._decoder.dtype.itemsize
        return {"vocabulary": self._decoder.vocabulary, "positions": positions, "expert_bytes": size}

    def _take_part(self, forming: Forming) -> Forming | None:
        """Serve in a generation, until the next one or the end (None)."""
        number = forming.generation.number
        try:
            outcome = self._serve(forming.generation, self._await_group(forming))
        except PeerLostError as error:
            sentence = str(error)  # nothing more is kept: a traceback would keep the group alive
        else:
            return self._follow(number, outcome)
        return self._follow_loss(number, sentence)

    def _follow_loss(self, number: int, sentence: str) -> Forming | None:
        """The generation after a loss, None = it goes on without this member, which was about to leave."""
        self._leave_broken_group(number, sentence)
        generation = self._read_generation(self._store.read(f"successor/{number}"))
        return self._start_forming(generation) if self.job.member_id in generation.members else None

    def _follow(self, number: int, outcome: Outcome) -> Forming | None:
        if outcome.kind == "switch":
            prepared = self._prepared
            if prepared is not None and prepared.generation.number == outcome.generation:
                return prepared
            self._store.read(f"settled/{outcome.generation}")  # others may still be busy in this generation
            return None
        if outcome.kind == "lost":
            return self._follow_loss(number, "the coordinator said so")
        self._store.report({"kind": "stopped", "member": self.job.member_id})
        self._store.read("stopped")
        return None

    def _await_assignment(self) -> Forming:
        """The generation in which this member is to be, once it may begin."""
        while True:
            number = self._store.read(f"assign/{self.job.member_id}/{self._assignments}")
            self._assignments += 1
            forming = self._start_forming(self._read_generation(number))
            if self._store.read(f"open/{number}"):
                return forming

    def _read_generation(self, number: int) -> Generation:
        return Generation.from_json(self._store.read(f"generation/{number}"))

    def _start_forming(self, generation: Generation) -> Forming:
        """Connect in the background, by a connection to the store that serves this group alone."""
        forming = Forming(generation)
        self._faults.reach("forming")
        timeout = self.job.options.timeout
        forming.start(self._connect(), self.job.member_id, timeout=timeout, counters=self._counters)
        return forming

    def _await_group(self, forming: Forming) -> RankGroup:
        """The group, once it is there.

        Raises:
            PeerLostError: it failed, or a member was lost meanwhile.
        """
        while not forming.wait(_POLL):
            if self._store.find(f"successor/{forming.generation.number}") is not None:
                raise PeerLostError("a member was lost while the generation formed")
        if forming.group is None:
            raise PeerLostError(forming.error)
        forming.group.observer = self._faults.reach
        return forming.group

    def _serve(self, generation: Generation, group: RankGroup) -> Outcome:
        """Go on where the members were, in their new group.

        Raises:
            PeerLostError: a member was lost.
        """
        content = json.dumps(self._snapshot().to_json()).encode()
        gathered = group.all_gather_bytes(content, kind="snapshots")
        snapshots = [Snapshot.from_json(json.loads(content)) for content in gathered]
        self._close_group()  # everybody has left the generation before
        self._group = group
        serving = self._continue(generation, snapshots)
        self._share_reference(snapshots)
        if group.rank == 0:
            self._report_serving(generation, serving)
        while True:
            outcome = serving.run()
            if outcome is not None:
                return outcome

    def _snapshot(self) -> Snapshot:
        serving, member = self._serving, self.job.member_id
        if serving is None:
            return Snapshot(member)
        engine, group = serving.engine, self._members
        return Snapshot(
            member,
            progress=serving.progress,
            applied=serving.applied,
            version=engine.executor.version,
            slots=serving.own_slots(),
            has_reference=engine.executor.runtime.experts.contents.reference is not None,
            sequences=take_snapshot_of(engine.scheduler, group),
        )

    def _continue(self, generation: Generation, snapshots: list[Snapshot]) -> Serving:
        """Take the experts that this rank is to have, and the sequences."""
        adoption, group = self._adopt(generation, snapshots), self._group
        assert group is not None
        version = max(snapshot.version for snapshot in snapshots) + (generation.slots is None)
        if self._serving is None:
            self._serving = self._start_serving(adoption.placement)
            self._serving.engine.executor.install(adoption.placement, version=version)
        else:
            self._take_experts(adoption, group.rank)
            self._serving.engine.regroup(group, adoption.placement, version=version)
        serving, scheduler = self._serving, self._serving.engine.scheduler
        start = continue_from(snapshots, replicated=scheduler.replicated, delivered=generation.delivered)
        start.fill(scheduler, rank=group.rank)
        serving.take_over(generation.number, applied=start.applied, progress=start.progress)
        self._members = generation.members
        self._adopted = len(adoption.adopted)
        if scheduler.replicated and start.newcomers and start.running:
            replicated = [held.replicated for held in start.running]
            serving.engine.executor.give_kv(scheduler.running, replicated, start.newcomers)
            for sequence, count in zip(scheduler.running, replicated, strict=True):
                sequence.replicated = count
        return serving

    def _adopt(self, generation: Generation, snapshots: list[Snapshot]) -> Adoption:
        """The placement that follows from what each member holds, or that of the start."""
        checkpoint = self._checkpoint
        slots = generation.slots if generation.slots is not None else [snapshot.slots for snapshot in snapshots]
        held = [np.array(own, np.int32).reshape(checkpoint.num_layers, -1) for own in slots]
        return adopt(
            held,
            checkpoint.experts_per_layer,
            generation.node_of_rank,
            layer_ids=checkpoint.layer_ids,
            num_hidden_layers=checkpoint.num_hidden_layers,
            mode=generation.mode,
        )

    def _start_serving(self, placement: Placement) -> Serving:
        """The engine, with the experts that the placement gives to this rank read from the checkpoint."""
        options = self.job.options
        engine = Engine(
            self._checkpoint,
            placement,
            mode=options.mode,
            group=self._group,
            limits=options.limits,
            node_aware=options.node_aware,
            decoder=self._decoder,
        )
        return Serving(
            engine,
            self._store,
            member=self.job.member_id,
            options=options,
            prepare=self._prepare_next,
            faults=self._faults,
        )

    def _take_experts(self, adoption: Adoption, rank: int) -> None:
        """Read from the checkpoint what fell to this rank."""
        assert self._serving is not None
        store, placement = self._serving.engine.executor.runtime.experts, adoption.placement
        here = placement.slots_on(rank)
        store.resize(here.stop - here.start)
        for layer, expert in [(layer, expert) for layer, expert, taker in adoption.adopted if taker == rank]:
            slot = placement.slot_to_expert[layer, here].tolist().index(expert)
            parts = self._checkpoint.expert(layer, expert)
            store.load(layer, int(store.row_of_slot[layer, slot]), expert, parts)
            if not store.contents.is_intact(layer, int(store.row_of_slot[layer, slot]), expert):
                raise MigrationError(f"expert {expert} of MoE layer {layer} reads from the checkpoint with other bytes")

    def _share_reference(self, snapshots: list[Snapshot]) -> None:
        """Let all members know the checksums of all experts."""
        group, serving = self._group, self._serving
        assert group is not None
        assert serving is not None
        contents = serving.engine.executor.runtime.experts.contents
        knowing = [rank for rank, snapshot in enumerate(snapshots) if snapshot.has_reference]
        if len(knowing) == len(snapshots):
            return
        if knowing:
            contents.receive_reference(group, serving.engine.placement, root=knowing[0])
            return
        self._store.report({"kind": "loaded", "member": self.job.member_id})
        self._store.read("loaded")  # reading the experts takes members different times: no collective waits for it
        contents.share_reference(group, serving.engine.placement)

    def _report_serving(self, generation: Generation, serving: Serving) -> None:
        scheduler = serving.engine.scheduler
        known = [(s.request.request_id, s.added) for s in scheduler.running]
        known += [(request.request_id, scheduler.added(request)) for request in scheduler.waiting]
        self._store.report(
            {
                "kind": "serving",
                "generation": generation.number,
                "applied": serving.applied,
                "known": {name: list(added) for name, added in known},
                "running": len(scheduler.running),
                "waiting": len(scheduler.waiting),
                "adopted": self._adopted,
                **serving.describe_placement(),
            }
        )

    def _prepare_next(self, generation: Generation) -> None:
        if self.job.member_id in generation.members:
            self._prepared = self._start_forming(generation)

    def _leave_broken_group(self, number: int, reason: str) -> None:
        """Close the group at once, so that others who wait on it fail as well instead of waiting for the timeout."""
        if self._serving is not None:
            self._serving.drop_replacement()
        if self._prepared is not None and self._prepared.group is not None:
            self._prepared.group.close()
        self._prepared = None
        self._close_group()
        self._store.report({"kind": "lost", "member": self.job.member_id, "generation": number, "error": reason})

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def _connect(self) -> ServiceStore:
        return ServiceStore.connect(self.job.host, self.job.port, self.job.prefix)


def run_member(job: MemberJob) -> int:
    """Be a member; 0 = left or stopped in order, 1 = failed (the coordinator knows why) or the coordinator is gone."""
    loop = None
    try:
        loop = MemberLoop(job)
        loop.run()
    except ServiceEndedError:
        return 1
    except Exception as error:
        traceback.print_exc()
        with suppress(ServiceEndedError):
            store = ServiceStore.connect(job.host, job.port, job.prefix)
            store.report({"kind": "failed", "member": job.member_id, "error": sentence_of(error)})
        return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    code = run_member(MemberJob.from_json(json.loads(sys.argv[1])))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of groups that never connected may still wait for their timeout; an ordinary exit would wait for them, or
    # be aborted by them.
    os._exit(code)
