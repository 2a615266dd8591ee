"""Entrance: how a member enters a generation: what all bring along, the experts it is to have, where it goes on.

snapshots of all -> the same placement and continuation on every rank -> experts read -> "serving" is reported

Ranks agree first and read then, each as long as it takes, and wait for each other outside of collectives.
"""

import json
from collections.abc import Callable, Sequence

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.placement.replacement.width import Adoption, adopt
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.engine.engine import Engine
from moeplace.runtime.engine.modes import RecordedRouting
from moeplace.runtime.errors import MigrationError, PeerLostError
from moeplace.runtime.models.checkpoint import Checkpoint
from moeplace.runtime.models.opening import ServedModel
from moeplace.runtime.service.faults import FaultPlan
from moeplace.runtime.service.generation import Generation
from moeplace.runtime.service.member.heartbeat import Heartbeat
from moeplace.runtime.service.member.serving import Serving
from moeplace.runtime.service.options import MemberJob
from moeplace.runtime.service.snapshot import Continuation, Snapshot, continue_from, take_snapshot_of
from moeplace.runtime.service.store import ServiceStore


class Entrance:
    """See the module. It keeps what a member has from one generation to the next."""

    def __init__(
        self,
        job: MemberJob,
        checkpoint: Checkpoint,
        decoder: ServedModel,
        store: ServiceStore,
        faults: FaultPlan,
        heartbeat: Heartbeat,
        prepare: Callable[[Generation], None],
    ) -> None:
        """`prepare` lets the group of a generation that is to follow connect, beside the steps."""
        self._job, self._checkpoint, self._decoder, self._store = job, checkpoint, decoder, store
        self._faults, self._heartbeat, self._prepare = faults, heartbeat, prepare
        self._members: tuple[int, ...] = ()
        self._serving: Serving | None = None

    def exchange_snapshots(self, group: RankGroup) -> list[Snapshot]:
        """What every member brings along, by rank.

        Raises:
            PeerLostError: a member was lost.
        """
        content = json.dumps(self._snapshot().to_json()).encode()
        gathered = group.all_gather_bytes(content, kind="snapshots")
        return [Snapshot.from_json(json.loads(content)) for content in gathered]

    def enter(self, generation: Generation, group: RankGroup, snapshots: Sequence[Snapshot]) -> Serving:
        """Take the experts that this rank is to have, and the sequences.

        Raises:
            PeerLostError: a member was lost.
        """
        adoption = self._adopt(generation, snapshots)
        version = max(snapshot.version for snapshot in snapshots) + (generation.slots is None)
        serving = self._take_experts(generation, adoption, group, version)
        start = self._fill(serving, generation, group, snapshots)
        self._share_reference(serving, group, snapshots)
        if group.rank == 0:
            self._report(generation, serving, len(adoption.adopted), start)
        return serving

    def drop_replacement(self) -> None:
        """A rank is gone, and so is what was on its way."""
        if self._serving is not None:
            self._serving.drop_replacement()

    def _snapshot(self) -> Snapshot:
        serving, member = self._serving, self._job.member_id
        if serving is None:
            return Snapshot(member)
        engine = serving.engine
        return Snapshot(
            member,
            progress=serving.progress,
            applied=serving.applied,
            version=engine.executor.version,
            slots=serving.own_slots(),
            has_reference=engine.executor.runtime.experts.contents.reference is not None,
            sequences=take_snapshot_of(engine.scheduler, self._members),
            rewinds=engine.executor.rewinds,
        )

    def _adopt(self, generation: Generation, snapshots: Sequence[Snapshot]) -> Adoption:
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

    def _take_experts(self, generation: Generation, adoption: Adoption, group: RankGroup, version: int) -> Serving:
        """Agree with the others, read what fell to this rank, and go on when all have done so."""
        placement, is_read = adoption.placement, generation.slots is not None or bool(adoption.adopted)
        if is_read:
            self._faults.reach("loading")
            self._heartbeat.load()
        is_new = self._serving is None
        if self._serving is None:
            self._serving = self._start_serving(placement, group)
        else:
            self._serving.engine.agree(group, placement)
            self._read_experts(self._serving, adoption, group.rank)
        if is_read:
            self._await_others(generation.number)
        if is_new:
            self._serving.engine.executor.install(placement, version=version)
        else:
            self._serving.engine.regroup(group, placement, version=version)
        return self._serving

    def _start_serving(self, placement: Placement, group: RankGroup) -> Serving:
        """The engine, with the experts that the placement gives to this rank read from the checkpoint."""
        options = self._job.options
        engine = Engine(
            self._checkpoint,
            placement,
            mode=options.mode,
            group=group,
            limits=options.limits,
            node_aware=options.node_aware,
            decoder=self._decoder,
            replica_rule=options.replica_rule,
            recorded=None if options.trace is None else RecordedRouting.load(options.trace, options.calibration),
        )
        return Serving(
            engine,
            self._store,
            member=self._job.member_id,
            options=options,
            prepare=self._prepare,
            faults=self._faults,
            heartbeat=self._heartbeat,
        )

    def _read_experts(self, serving: Serving, adoption: Adoption, rank: int) -> None:
        store, placement = serving.engine.executor.runtime.experts, adoption.placement
        here = placement.slots_on(rank)
        store.resize(here.stop - here.start)
        # What was read for a generation that did not come about may have fallen to others since.
        for layer, slot in np.argwhere(placement.slot_to_expert[:, here] == EMPTY_SLOT).tolist():
            store.vacate(layer, int(store.row_of_slot[layer, slot]))
        is_known = store.contents.reference is not None  # else a rank was lost while all were about to learn it
        for layer, expert in [(layer, expert) for layer, expert, taker in adoption.adopted if taker == rank]:
            slot = placement.slot_to_expert[layer, here].tolist().index(expert)
            parts, row = self._checkpoint.expert(layer, expert), int(store.row_of_slot[layer, slot])
            store.load(layer, row, expert, parts)
            if is_known and not store.contents.is_intact(layer, row, expert):
                raise MigrationError(f"expert {expert} of MoE layer {layer} reads from the checkpoint with other bytes")

    def _fill(
        self, serving: Serving, generation: Generation, group: RankGroup, snapshots: Sequence[Snapshot]
    ) -> Continuation:
        """Take the sequences; give K/V to ranks that have none, where all are to have them."""
        scheduler = serving.engine.scheduler
        start = continue_from(
            snapshots, replicated=scheduler.replicated, delivered=generation.delivered, applied=generation.applied
        )
        start.fill(scheduler, rank=group.rank)
        serving.take_over(generation.number, applied=start.applied, progress=start.progress)
        self._members = generation.members
        if scheduler.replicated and start.newcomers and start.running:
            replicated = [held.replicated for held in start.running]
            serving.engine.executor.give_kv(scheduler.running, replicated, start.newcomers)
            for sequence, count in zip(scheduler.running, replicated, strict=True):
                sequence.replicated = count
        return start

    def _share_reference(self, serving: Serving, group: RankGroup, snapshots: Sequence[Snapshot]) -> None:
        """Let all members know the checksums of all experts."""
        contents = serving.engine.executor.runtime.experts.contents
        knowing = [rank for rank, snapshot in enumerate(snapshots) if snapshot.has_reference]
        if len(knowing) == len(snapshots):
            return
        if knowing:
            contents.receive_reference(group, serving.engine.placement, root=knowing[0])
            return
        contents.share_reference(group, serving.engine.placement)

    def _await_others(self, number: int) -> None:
        """Until all have read their experts. Who takes too long is given up by the coordinator, which sees by signs of
        life who still reads.

        Raises:
            PeerLostError: a member was lost meanwhile.
        """
        self._heartbeat.rest()
        self._store.report({"kind": "loaded", "member": self._job.member_id, "generation": number})
        if not self._store.read(f"loaded/{number}"):
            raise PeerLostError("a member was lost while others read experts")
        self._heartbeat.begin()

    def _report(self, generation: Generation, serving: Serving, adopted: int, start: Continuation) -> None:
        """The generation has begun on all its members: they have met since they took their sequences."""
        self._store.report(
            {
                "kind": "serving",
                "generation": generation.number,
                "applied": serving.applied,
                "known": {held.request_id: list(held.added) for held in (*start.running, *start.waiting)},
                "logprobs": {
                    held.request_id: [[index, found.to_json()] for index, found in held.logprobs]
                    for held in (*start.running, *start.waiting)
                    if held.logprobs
                },
                "seated": [held.request_id for held in start.running],
                "running": len(start.running),
                "waiting": len(start.waiting),
                "adopted": adopted,
                **serving.describe_placement(),
            }
        )
