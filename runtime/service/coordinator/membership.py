"""Membership: which processes there are, which of them are ranks, and what has to happen next.

    desired    ranks wanted
    allocated  started, and alive
    active     in the generation in force
    routable   active, and experts are there

The conductor does what `next_step` says, and asks again when that is done or has failed: so a change of width that is
interrupted by a loss is taken up again from whatever is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from moeplace.placement.cluster import even_slots
from moeplace.placement.placement import EMPTY_SLOT, Placement, index_order
from moeplace.profiling.errors import InputError
from moeplace.runtime.service.generation import Generation


@dataclass(eq=False)
class MemberState:
    """A member.

    Attributes:
        node: where it is.
        ready: whether it has read the dense weights and can be a rank.
        leaving: whether it shall go.
        doomed: why it was told to end at once, "" = it was not; that it has ended will be reported.
        assigned: how often it was told to be in a generation while it was in none.
    """

    node: int
    ready: bool = False
    leaving: bool = False
    doomed: str = ""
    assigned: int = 0


class NextStep(NamedTuple):
    """What has to happen next.

    Attributes:
        kind: change the members of the generation; move experts to or from ranks; nothing.
        members: for "regroup", who is in it; for "rebalance", who holds experts afterwards.
    """

    kind: Literal["regroup", "rebalance", "none"]
    members: tuple[int, ...] = ()


@dataclass(eq=False)
class Membership:
    """Members and generations.

    Attributes:
        placement: in force; before anything is, that of the start.
        desired: ranks wanted.
        members: those that are alive, by id.
        current: generation in force, None = none yet, or all its ranks were lost.
    """

    placement: Placement
    desired: int
    members: dict[int, MemberState] = field(default_factory=dict)
    current: Generation | None = None
    _started: int = 0

    def __post_init__(self) -> None:
        self._nodes = self.placement.node_of_rank.tolist()  # those of the start, whoever is lost later

    def add(self) -> int:
        """A new member, on the node that the placement of the start names or else where the fewest are; its number."""
        member, self._started = self._started, self._started + 1
        nodes, taken = self._nodes, [state.node for state in self.members.values()]
        node = nodes[member] if member < len(nodes) else min(set(nodes), key=lambda n: (taken.count(n), n))
        self.members[member] = MemberState(node)
        return member

    @property
    def active(self) -> tuple[int, ...]:
        """Members of the generation in force, by rank."""
        return () if self.current is None else self.current.members

    @property
    def routable(self) -> tuple[int, ...]:
        """Active members that hold experts."""
        placement = self.placement
        if self.current is None:
            return ()
        filled_S = (placement.slot_to_expert != EMPTY_SLOT).any(axis=0)
        holding = np.bincount(placement.rank_of_slot[filled_S], minlength=placement.num_ranks)
        return tuple(member for member, slots in zip(self.active, holding, strict=True) if slots)

    @property
    def staying(self) -> list[int]:
        """Members that were not asked to leave, those that are about to be lost among them."""
        return [member for member, state in self.members.items() if not state.leaving]

    @property
    def wanted(self) -> list[int]:
        """Members that shall stay."""
        return [member for member, state in self.members.items() if not state.leaving and not state.doomed]

    @property
    def joining(self) -> list[int]:
        """Members that shall stay and are in no generation yet."""
        return [member for member in self.wanted if member not in self.active]

    def choose_leaving(self, num_ranks: int, leaving: Sequence[int] | None) -> list[int]:
        """Who has to go for `num_ranks` to stay.

        Raises:
            InputError: there would be no rank, or a member named is not there, or the numbers do not fit.
        """
        wanted = self.wanted
        require_ranks(num_ranks, self.placement)
        if leaving is None:
            newest = sorted(wanted, key=lambda member: (member in self.active, -member))
            return newest[: max(len(wanted) - num_ranks, 0)]
        unknown = sorted(set(leaving) - set(wanted))
        if unknown:
            raise InputError(f"member {unknown[0]} cannot leave: the members are {sorted(wanted)}")
        if len(wanted) - len(set(leaving)) > num_ranks:
            raise InputError(
                f"when {len(set(leaving))} of {len(wanted)} ranks leave, {len(wanted) - len(set(leaving))} stay, which "
                f"must be at most the {num_ranks} asked for"
            )
        return sorted(set(leaving))

    def next_step(self) -> NextStep:
        """What brings the ranks closer to what is wanted."""
        active, routable = set(self.active), set(self.routable)
        joining = [member for member in self.joining if self.members[member].ready]
        if len(joining) < len(self.joining):
            joining = []  # all at once
        gone = [m for m in active if m in self.members and self.members[m].leaving and m not in routable]
        if joining or gone:
            return NextStep("regroup", tuple(sorted((active - set(gone)) | set(joining))))
        holders = [member for member in self.active if member in self.wanted]
        if holders and (routable - set(holders) or set(holders) - routable):
            return NextStep("rebalance", tuple(holders))
        return NextStep("none")

    def keep(self, count: int) -> None:
        """Let so many of those that were to leave stay, ranks first."""
        going = [member for member, state in self.members.items() if state.leaving and not state.doomed]
        for member in sorted(going, key=lambda member: (member not in self.active, member))[:count]:
            self.members[member].leaving = False

    def stay_as_it_is(self) -> None:
        """After a change of width that failed: those that hold experts stay, the others go."""
        routable = self.routable
        for member, state in self.members.items():
            state.leaving = member not in routable
        self.desired = len(self.staying)

    def nodes(self, members: Sequence[int]) -> dict[int, int]:
        """Node of some members."""
        return {member: self.members[member].node for member in members}


def most_ranks(placement: Placement) -> int:
    """Ranks of which each can hold an expert of some layer."""
    return int((placement.slot_to_expert != EMPTY_SLOT).sum(axis=1).max())


def require_ranks(num_ranks: int, placement: Placement) -> None:
    """Whether so many ranks can hold what a placement holds.

    Raises:
        InputError: there would be no rank, or one without an expert.
    """
    if num_ranks < 1:
        raise InputError(f"ranks ({num_ranks}) must be at least 1")
    most = most_ranks(placement)
    if num_ranks > most:
        raise InputError(f"ranks ({num_ranks}) must be at most {most}, so that each holds an expert of some layer")


def start_placement(placement: Placement, nodes: Sequence[int]) -> Placement:
    """The placement of a start: this one where it is for these ranks, else the same experts in index order.

    Args:
        placement: of the start before, or the last in force.
        nodes: node of each rank.
    """
    if placement.node_of_rank.tolist() == list(nodes):
        return placement
    return index_order(
        placement.experts_per_layer,
        even_slots(int(placement.experts_per_layer.max()), len(nodes)),
        np.array(nodes, np.int64),
        layer_ids=placement.layer_ids,
        num_hidden_layers=placement.num_hidden_layers,
        mode=placement.mode,
    )
