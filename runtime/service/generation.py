"""Generation: who the ranks are, from one change of membership to the next.

Rank i is the i-th member in the order of (node, member id). A generation has a process group of its own, on a store
prefix of its own; two may be alive at once, so that the next one connects while the one before serves.
"""

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import numpy as np
import torch

from moeplace.placement.modes import Mode
from moeplace.placement.placement import Placement
from moeplace.runtime.comm.group import RankGroup
from moeplace.runtime.counters import Counters
from moeplace.runtime.errors import PeerLostError
from moeplace.runtime.service.errors import sentence_of
from moeplace.runtime.service.store import ServiceEndedError, ServiceStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """A membership.

    Attributes:
        number: counts up; some numbers never come to serve.
        members: ids by rank.
        nodes: node of each rank, consecutive from 0.
        mode: execution mode of the placement.
        slots: per rank (L, C) the experts of its slots, at the start; None = ranks go on with what they hold.
        delivered: tokens that the coordinator has of each request in flight, after a loss; None = nobody was lost.
        applied: commands of the log that a generation of members which have served nothing begins after.
    """

    number: int
    members: tuple[int, ...]
    nodes: tuple[int, ...]
    mode: Mode = "dispatch-combine"
    slots: list[list[list[int]]] | None = None
    delivered: Mapping[str, list[int]] | None = None
    applied: int = 0

    @classmethod
    def of(cls, number: int, node_of_member: Mapping[int, int], **fields: Any) -> Self:
        """The generation of some members, given their nodes (any numbers)."""
        members = sorted(node_of_member, key=lambda member: (node_of_member[member], member))
        order = {node: index for index, node in enumerate(sorted(set(node_of_member.values())))}
        nodes = tuple(order[node_of_member[member]] for member in members)
        return cls(number, tuple(members), nodes, **fields)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """From plain data."""
        lists = {name: tuple(document[name]) for name in ("members", "nodes")}
        return cls(**{**document, **lists})

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dict(vars(self))

    @property
    def node_of_rank(self) -> np.ndarray:
        """(R,) int64."""
        return np.array(self.nodes, np.int64)

    def connect(
        self, store: ServiceStore, member: int, *, timeout: float, counters: Counters, device: torch.device
    ) -> RankGroup:
        """The process group, once all members have come.

        Raises:
            PeerLostError: not all came within the timeout.
        """
        place = store.for_group(self.number)
        place.set_timeout(timedelta(seconds=timeout))  # back ends ask it for what a rank that has gone never wrote
        return RankGroup(
            place,
            rank=self.members.index(member),
            size=len(self.members),
            timeout=timeout,
            node_of_rank=self.node_of_rank,
            device=device,
            counters=counters,
        )


@dataclass(eq=False)
class Forming:
    """A generation whose group connects in the background.

    Attributes:
        generation: which.
        group: once it is connected.
        error: why it could not be.
    """

    generation: Generation
    group: RankGroup | None = None
    error: str = ""
    _thread: threading.Thread | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _is_abandoned: bool = field(default=False, repr=False)

    def start(
        self, store: ServiceStore, member: int, *, timeout: float, counters: Counters, device: torch.device
    ) -> None:
        """Connect; `store` must be a connection of its own, which the group keeps."""

        def connect() -> None:
            try:
                self._take(self._open(store, member, timeout=timeout, counters=counters, device=device))
            except Exception as error:  # nobody else can tell that this one has failed
                if not isinstance(error, PeerLostError):
                    logger.exception("generation %d could not be connected", self.generation.number)
                self.error = sentence_of(error)
            number = self.generation.number
            with suppress(ServiceEndedError):  # the member itself notices
                store.report({"kind": "prepared", "member": member, "generation": number, "error": self.error})

        self._thread = threading.Thread(target=connect, name=f"generation-{self.generation.number}", daemon=True)
        self._thread.start()

    def _open(self, store: ServiceStore, member: int, **options: Any) -> RankGroup:
        """The group with all that is made from it; one that is not whole is closed."""
        group = self.generation.connect(store, member, **options)
        try:
            group.open_all()  # here nobody waits for it
        except BaseException:
            group.close()
            raise
        return group

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, well or not, within some seconds."""
        assert self._thread is not None
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """This member goes on without it. Others may be in its group already, and wait for what will not come: it is
        closed, now or as soon as it is connected."""
        with self._lock:
            self._is_abandoned = True
            group, self.group = self.group, None
        if group is not None:
            group.close()

    def _take(self, group: RankGroup) -> None:
        with self._lock:
            if not self._is_abandoned:
                self.group = group
                return
        self.error = "it was given up"
        group.close()


def slots_of(placement: Placement, rank: int) -> list[list[int]]:
    """(L, C) the experts of a rank's slots, as plain data."""
    slots: list[list[int]] = placement.slot_to_expert[:, placement.slots_on(rank)].tolist()
    return slots
