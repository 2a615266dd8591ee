"""Succession: how one generation follows another, as the coordinator sees it.

    planned:  propose -> members connect in the background -> open, and the command "switch"        -> settled
    loss:     succeed, at once: those that wait in the old generation go to the new one by themselves -> settled
    start:    propose, with the experts of each rank, to members that are in none -> open            -> settled

A member may be lost at any moment, also while a generation forms: then the next one follows. `successor/n` leads from
every generation that somebody may still be in to the newest. When nobody is left that has served, there is another
start.
"""

from collections.abc import Mapping

from moeplace.placement.modes import Mode
from moeplace.runtime.service.coordinator.actions import CommandLog, Delete, DropGroup, Outbox, Put
from moeplace.runtime.service.generation import Generation


class Succession:
    """Generations that were begun.

    Attributes:
        settled: the one in force; None = none yet, or all of its ranks were lost.
        proposed: connects, and may still be given up.
        opened: has taken over, or is about to: members are on their way to it.
    """

    def __init__(self, log: CommandLog, mode: Mode, out: Outbox) -> None:
        self._log, self._mode, self._out = log, mode, out
        self._number = 0
        self.settled: Generation | None = None
        self.proposed: Generation | None = None
        self.opened: Generation | None = None
        self._prepared: set[int] = set()
        self._oldest = 0  # generation of which the keys are there
        self._last_settled = 0

    @property
    def is_changing(self) -> bool:
        """Whether a generation is on its way."""
        return self.proposed is not None or self.opened is not None

    @property
    def newest(self) -> Generation | None:
        """The generation that members are in, or on their way to."""
        return self.opened or self.settled

    def propose(
        self,
        nodes: Mapping[int, int],
        assignments: Mapping[int, int],
        *,
        slots: list[list[list[int]]] | None = None,
    ) -> Generation:
        """Let members connect beside the steps.

        Args:
            nodes: node of each member.
            assignments: per member that is in no generation, how often it was assigned before.
            slots: see `Generation`.
        """
        generation = self._make(nodes, slots=slots, applied=self._log.length)
        self.proposed, self._prepared = generation, set()
        if self.settled is not None:
            self._log.append({"kind": "prepare", "generation": generation.to_json()})
        for member, count in assignments.items():
            self._out.add(Put(f"assign/{member}/{count}", generation.number))
        return generation

    def note_prepared(self, member: int, number: int) -> None:
        """A member has connected; once all have, the generation takes over at the next step boundary."""
        generation = self.proposed
        if generation is None or generation.number != number:
            return
        self._prepared.add(member)
        if self._prepared >= set(generation.members):
            self.proposed, self.opened = None, generation
            self._out.add(Put(f"open/{number}", True))
            if self.settled is not None:
                self._log.append({"kind": "switch", "generation": number})

    def withdraw(self) -> None:
        """Give the proposed generation up; members that are in none wait for another assignment."""
        if self.proposed is not None:
            self._out.add(Put(f"open/{self.proposed.number}", False))
            self.proposed = None

    def succeed(self, nodes: Mapping[int, int], delivered: Mapping[str, list[int]]) -> Generation:
        """The generation of those that are left; members of generations that failed follow by themselves."""
        first = 0 if self.settled is None else self.settled.number
        generation = self._make(nodes, delivered=delivered)
        self.opened = generation
        for number in range(first, generation.number):
            self._out.add(Put(f"successor/{number}", generation.number))
            self._out.add(Put(f"loaded/{number}", False))  # for those who wait for others that read experts
        self._log.append({"kind": "lost", "generation": generation.number})  # wakes those that have nothing to do
        return generation

    def end(self) -> None:
        """Nobody is left in any generation."""
        self.withdraw()
        self.settled = self.opened = None

    def settle(self, number: int) -> bool:
        """All members of a generation have begun; whether it is the newest."""
        if self.opened is None or self.opened.number != number:
            return False
        first = self._last_settled
        self.settled, self.opened, self._last_settled = self.opened, None, number
        # Generations that never came to serve are over as well: a member that left with one of them waits for it.
        for begun in range(first + 1, number + 1):
            self._out.add(Put(f"settled/{begun}", True))
        # What belongs to the generation before is kept until the next one, because some members may look late.
        for gone in range(self._oldest, first):
            kinds = ("generation", "successor", "open", "settled", "loaded")
            self._out.add(Delete(tuple(f"{kind}/{gone}" for kind in kinds)))
            self._out.add(DropGroup(gone))
        self._oldest = first
        return True

    def _make(self, nodes: Mapping[int, int], **fields: object) -> Generation:
        self._number += 1
        generation = Generation.of(self._number, nodes, mode=self._mode, **fields)
        self._out.add(Put(f"generation/{generation.number}", generation.to_json()))
        return generation
