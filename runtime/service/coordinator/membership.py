"""Membership: which processes there are, which of them are ranks, and what has to happen next.

    desired    ranks wanted
    allocated  started, and alive
    active     in the generation in force
    routable   active, and experts are there

The coordinator does what `next_step` says, and asks again when that is done or has failed: so a change of width that is
interrupted by a loss is taken up again from whatever is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.errors import InputError
from moeplace.runtime.service.api import Member
from moeplace.runtime.service.generation import Generation


@dataclass(eq=False)
class MemberState:
    """A member.

    Attributes:
        process: what the spawner started.
        node: where it is.
        ready: whether it has read the dense weights and can be a rank.
        leaving: whether it shall go.
    """

    process: Member
    node: int
    ready: bool = False
    leaving: bool = False


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
        members: those that are alive, by id.
        desired: ranks wanted.
        current: generation in force, None = none yet.
        placement: in force there.
    """

    members: dict[int, MemberState] = field(default_factory=dict)
    desired: int = 0
    current: Generation | None = None
    placement: Placement | None = None
    _started: int = 0

    def next_id(self) -> int:
        """A number for a new member."""
        self._started += 1
        return self._started - 1

    @property
    def active(self) -> tuple[int, ...]:
        """Members of the generation in force, by rank."""
        return () if self.current is None else self.current.members

    @property
    def routable(self) -> tuple[int, ...]:
        """Active members that hold experts."""
        placement = self.placement
        if placement is None:
            return ()
        filled_S = (placement.slot_to_expert != EMPTY_SLOT).any(axis=0)
        holding = np.bincount(placement.rank_of_slot[filled_S], minlength=placement.num_ranks)
        return tuple(member for member, slots in zip(self.active, holding, strict=True) if slots)

    @property
    def wanted(self) -> list[int]:
        """Members that shall stay."""
        return [member for member, state in self.members.items() if not state.leaving]

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
        if num_ranks < 1:
            raise InputError(f"ranks ({num_ranks}) must be at least 1")
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

    def nodes(self, members: Sequence[int]) -> dict[int, int]:
        """Node of some members."""
        return {member: self.members[member].node for member in members}
