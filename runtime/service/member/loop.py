"""Member: one rank of a service, from its start to its end. `member.start` is its process.

start -> read the dense weights -> wait to be assigned -> connect -> open -> serve -> (next generation) -> end
"""

import logging
import traceback
from contextlib import suppress

import torch

from moeplace.profiling.errors import FormatError, InputError
from moeplace.runtime.comm.devices import ThisMachine, device_of
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.counters import Counters
from moeplace.runtime.errors import PeerLostError
from moeplace.runtime.models.opening import open_model
from moeplace.runtime.models.precisions.precision_checkpoint import open_checkpoint
from moeplace.runtime.service.errors import sentence_of
from moeplace.runtime.service.faults import FaultPlan
from moeplace.runtime.service.generation import Forming, Generation
from moeplace.runtime.service.member.entry import Entrance
from moeplace.runtime.service.member.heartbeat import Heartbeat
from moeplace.runtime.service.member.serving import Outcome
from moeplace.runtime.service.options import MemberJob
from moeplace.runtime.service.store import ServiceEndedError, ServiceStore

logger = logging.getLogger(__name__)

_POLL = 0.01
"""Seconds between two looks whether a group has connected or its generation is over."""
_BEATS_PER_TIMEOUT = 5
_LONGEST_BEAT = 2.0


class MemberLoop:
    """The life of a member.

    Attributes:
        job: what it was told.
    """

    def __init__(self, job: MemberJob) -> None:
        torch.set_num_threads(job.options.threads)
        self.job = job
        self._store = self._connect()
        every = min(job.options.timeout / _BEATS_PER_TIMEOUT, _LONGEST_BEAT)
        self._heartbeat = Heartbeat(self._connect, job.member_id, every=every)
        self._faults = FaultPlan(job.faults)
        self._faults.reach("starting")
        self._checkpoint = open_checkpoint(job.checkpoint, job.options.precision)
        dtype = job.options.dtype
        self._device = device_of(job.options.device, job.place, ThisMachine())
        number_type = getattr(torch, dtype) if dtype else None
        self._decoder = open_model(self._checkpoint, dtype=number_type, device=self._device)
        self._counters = Counters()  # of all generations
        self._entrance = Entrance(
            job, self._checkpoint, self._decoder, self._store, self._faults, self._heartbeat, self._prepare_next
        )
        self._assignments = 0
        self._group: RankGroup | None = None
        self._prepared: Forming | None = None

    def run(self) -> None:
        """Serve until the service stops or goes on without this member."""
        # A sign of life comes first: who becomes a rank and hangs before the thread has given one is missed as well.
        self._store.report(self._heartbeat.sign())
        self._store.report({"kind": "ready", "member": self.job.member_id, "limits": self._limits()})
        forming: Forming | None = self._await_assignment()
        while forming is not None:
            forming = self._take_part(forming)
        self._close_group()
        self._heartbeat.stop()

    def _limits(self) -> dict[str, int]:
        """What requests and plans have to keep to."""
        limit = self.job.options.limits.max_length
        positions = min(self._decoder.max_positions, 2048) if limit is None else limit
        size = self._checkpoint.expert_bytes(self._decoder.dtype)
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
        forming.abandon()
        return self._follow_loss(number, sentence)

    def _serve(self, generation: Generation, group: RankGroup) -> Outcome:
        """Go on where the members were, in their new group.

        Raises:
            PeerLostError: a member was lost.
        """
        self._heartbeat.begin()
        snapshots = self._entrance.exchange_snapshots(group)
        self._close_group()  # everybody has left the generation before
        self._group = group
        serving = self._entrance.enter(generation, group, snapshots)
        while True:
            outcome = serving.run()
            if outcome is not None:
                if outcome.kind == "switch":
                    serving.settle()
                serving.report_counters()
                return outcome

    def _follow_loss(self, number: int, sentence: str) -> Forming | None:
        """The generation after a loss, None = it goes on without this member, which was about to leave."""
        self._leave_broken_group(number, sentence)
        self._heartbeat.rest()
        generation = self._read_generation(self._store.read(f"successor/{number}"))
        return self._start_forming(generation) if self.job.member_id in generation.members else None

    def _follow(self, number: int, outcome: Outcome) -> Forming | None:
        self._heartbeat.rest()
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
            forming.abandon()

    def _read_generation(self, number: int) -> Generation:
        return Generation.from_json(self._store.read(f"generation/{number}"))

    def _start_forming(self, generation: Generation) -> Forming:
        """Connect in the background, by a connection to the store that serves this group alone."""
        forming = Forming(generation)
        self._faults.reach("forming")
        timeout = self.job.options.step_timeout  # slow is not hung: heartbeats tell who is
        options = {"timeout": timeout, "counters": self._counters, "device": self._device}
        forming.start(self._connect(), self.job.member_id, **options)
        return forming

    def _await_group(self, forming: Forming) -> RankGroup:
        """The group, once it is there.

        Raises:
            PeerLostError: it failed, or a member was lost meanwhile.
        """
        number = forming.generation.number
        while not forming.wait(_POLL):
            self._raise_if_succeeded(number, "the generation formed")
        if forming.group is None:
            raise PeerLostError(forming.error)
        forming.group.observer = self._faults.reach
        forming.group.while_waiting = lambda: self._raise_if_succeeded(number, "ranks agreed")
        return forming.group

    def _raise_if_succeeded(self, number: int, doing: str) -> None:
        """Whether the ranks go on in another generation, where nothing else tells this one of a loss."""
        if self._store.find(f"successor/{number}") is not None:
            raise PeerLostError(f"a member was lost while {doing}")

    def _prepare_next(self, generation: Generation) -> None:
        if self.job.member_id in generation.members:
            self._drop_prepared()
            self._prepared = self._start_forming(generation)

    def _drop_prepared(self) -> None:
        """A generation that was prepared and given up."""
        if self._prepared is not None and (self._group is None or self._prepared.group is not self._group):
            self._prepared.abandon()
        self._prepared = None

    def _leave_broken_group(self, number: int, reason: str) -> None:
        """Close the group at once, so that others who wait on it fail as well instead of waiting for the timeout."""
        self._entrance.drop_replacement()
        self._drop_prepared()
        self._close_group()
        self._store.report({"kind": "lost", "member": self.job.member_id, "generation": number, "error": reason})

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
        self._group = None

    def _connect(self) -> ServiceStore:
        job = self.job
        return ServiceStore.connect(job.host, job.port, job.prefix, job.secret)


def run_member(job: MemberJob) -> int:
    """Be a member; 0 = left or stopped in order, 1 = failed (the coordinator knows why) or the coordinator is gone."""
    try:
        MemberLoop(job).run()
    except ServiceEndedError:
        return 1
    except Exception as error:
        traceback.print_exc()
        with suppress(ServiceEndedError):
            store = ServiceStore.connect(job.host, job.port, job.prefix, job.secret)
            final = isinstance(error, InputError | FormatError)  # another member would find the same
            told = {"kind": "failed", "member": job.member_id, "error": sentence_of(error), "final": final}
            store.report(told)
        return 1
    return 0
