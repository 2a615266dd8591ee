"""MigrationPlan: how to get from one placement to another while serving goes on.

Rounds of transfers. In a round a rank talks to at most one peer, at most one expert travels in each direction, and all
reads happen before all writes. What arrives is staged and lands at the end of a round (its own, unless a cycle of ranks
has to land at once), which is where serving may switch: after every round each expert still has a slot that serves it.

Shape letters: L MoE layers, E experts per layer, R ranks, S slots per layer, P places per layer, U members.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from moeplace.placement.cluster import INTER_NODE, INTRA_NODE, Cluster
from moeplace.placement.migration.copies import CHECKPOINT, Bundle, bundle_copies, list_copies, places
from moeplace.placement.migration.cost import CHECKPOINT_BANDWIDTH, CopyCost
from moeplace.placement.migration.layout import Layout, default_origin
from moeplace.placement.migration.relabel import ExpertBytes, bytes_per_expert, least_bytes
from moeplace.placement.migration.rounds import Scheduled, schedule_rounds
from moeplace.placement.modes import Mode
from moeplace.placement.placement import EMPTY_SLOT, Placement
from moeplace.profiling.errors import InputError


class Transfer(NamedTuple):
    """One expert from a slot to a slot."""

    layer: int
    """MoE layer."""
    expert: int
    source: int
    """Slot of the old placement that holds the expert when the round starts; CHECKPOINT (-1) = read it from disk."""
    target: int
    """Slot of the new placement."""
    lands: int
    """Round at whose end the target holds the expert; staged until then."""


@dataclass(frozen=True, eq=False)
class MigrationPlan:
    """Ordered rounds of transfers from the placement `old_digest` to `new_digest`.

    Attributes:
        rounds: transfers of each round; local ones (both slots on one rank) stand in an order in which each can be
            written before the next, after everything sent to other ranks has left.
        emptied: (layer, new slot) that hold an expert before and none after.
        layout: ranks and slots of both sides, and which rank is which.
        node_of_rank: (R',) nodes after the change.
        mode, layer_ids, num_hidden_layers: of the new placement.
        old_digest, new_digest: of the two placements.
        staging_bytes: most bytes that any rank stages at a time.
        bytes: bytes that ranks fetch, from other ranks and from the checkpoint.
        inter_node_bytes, checkpoint_bytes: the parts of it that cross nodes and that come from disk.
        local_bytes: bytes copied inside ranks.
        least_bytes: proven least for any placement on the new cluster that fills as many slots.
        round_seconds: predicted seconds of each round.
        tier: (L, S') int8 memory of the new placement's slots, None = all resident.
    """

    rounds: tuple[tuple[Transfer, ...], ...]
    emptied: tuple[tuple[int, int], ...]
    layout: Layout
    node_of_rank: np.ndarray
    mode: Mode
    layer_ids: np.ndarray
    num_hidden_layers: int
    old_digest: str
    new_digest: str
    staging_bytes: int
    bytes: int
    inter_node_bytes: int
    checkpoint_bytes: int
    local_bytes: int
    least_bytes: int
    round_seconds: tuple[float, ...]
    tier: np.ndarray | None = None

    @property
    def seconds(self) -> float:
        """Predicted seconds of all rounds, one after the other."""
        return sum(self.round_seconds)

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """All transfers, in order."""
        return tuple(transfer for transfers in self.rounds for transfer in transfers)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is copied."""
        return not self.rounds

    def members(self, transfer: Transfer) -> tuple[int, int]:
        """(sender, receiver) members of the layout; sender CHECKPOINT = none."""
        layout = self.layout
        receiver = int(layout.member_of_place[layout.place_of_new[transfer.target]])
        if transfer.source == CHECKPOINT:
            return CHECKPOINT, receiver
        return int(layout.member_of_place[layout.place_of_old[transfer.source]]), receiver


def plan_migration(
    old: Placement,
    new: Placement,
    *,
    cluster: Cluster | None = None,
    expert_bytes: ExpertBytes = None,
    staging_bytes: int | None = None,
    lost_ranks: Sequence[int] = (),
    origin: np.ndarray | None = None,
    checkpoint_bandwidth: float = CHECKPOINT_BANDWIDTH,
) -> MigrationPlan:
    """Plan the fewest transfers that turn `old` into `new`, slot by slot (`relabel_to` first makes them fewer still).

    Args:
        old: placement in force.
        new: placement wanted; same model, any cluster shape.
        cluster: links for the predicted seconds; None = the defaults of `cluster.py`.
        expert_bytes: (L, E) bytes, one number, or None to count experts.
        staging_bytes: most bytes a rank may stage; None = the largest expert.
        lost_ranks: ranks of `old` whose memory is gone; experts only they held are read from the checkpoint.
        origin: (R',) old rank that each new rank is, -1 = it joined; None = `default_origin`.
        checkpoint_bandwidth: bytes per second at which a rank reads from the checkpoint.

    Raises:
        InputError: the placements are for different models, the budget does not hold an expert, or ranks do not exist.
    """
    if not np.array_equal(old.experts_per_layer, new.experts_per_layer):
        raise InputError("the two placements are for different models: their experts per layer differ")
    lost = tuple(lost_ranks)
    chosen = default_origin(old.num_ranks, new.num_ranks, lost) if origin is None else np.asarray(origin)
    layout = Layout(old.slots_of_rank, new.slots_of_rank, chosen, lost)
    size_LE = bytes_per_expert(old, expert_bytes)
    budget = int(size_LE.max()) if staging_bytes is None else int(staging_bytes)
    node_U = layout.nodes(old.node_of_rank, new.node_of_rank)
    rounds = schedule_rounds(_bundles(old, new, layout, size_LE, node_U, budget), layout.num_members, budget)
    links = (INTRA_NODE, INTER_NODE) if cluster is None else (cluster.intra, cluster.inter)
    cost = CopyCost(node_U, *links, checkpoint_bandwidth)
    filled_L = (new.slot_to_expert != EMPTY_SLOT).sum(axis=1)
    shape = Cluster(new.node_of_rank, new.slots_of_rank, np.ones(new.num_ranks))
    return MigrationPlan(
        rounds=_number_slots(rounds, layout),
        emptied=_emptied(old, new, layout),
        layout=layout,
        node_of_rank=new.node_of_rank,
        mode=new.mode,
        layer_ids=np.arange(new.num_layers) if new.layer_ids is None else new.layer_ids,
        num_hidden_layers=new.num_hidden_layers,
        old_digest=old.digest,
        new_digest=new.digest,
        staging_bytes=budget,
        least_bytes=least_bytes(old, shape, expert_bytes=expert_bytes, origin=layout.origin, filled=filled_L),
        tier=new.tier,
        **_sums(rounds, cost),
    )


def apply_plan(old: Placement, plan: MigrationPlan) -> Placement:
    """The placement that the plan ends in, transfer by transfer.

    Raises:
        InputError: the plan is for another placement, a source does not hold its expert when its round starts, or the
            end is not the placement that the plan promises.
    """
    *_, served_LP = replay(old, plan)
    slots_LS = served_LP[:, plan.layout.place_of_new].copy()
    for layer, slot in plan.emptied:
        slots_LS[layer, slot] = EMPTY_SLOT
    new = Placement(
        slots_LS,
        plan.layout.new_slots_of_rank,
        plan.node_of_rank,
        old.experts_per_layer,
        plan.layer_ids,
        plan.num_hidden_layers,
        plan.mode,
        plan.tier,
    )
    if new.digest != plan.new_digest:
        raise InputError(f"the plan ends in the placement {new.digest}, not in {plan.new_digest} as it says")
    return new


def replay(old: Placement, plan: MigrationPlan) -> Iterator[np.ndarray]:
    """(L, P) int32 expert served from each place (-1 = none), before the first round and after every round.

    An expert that changed its slot inside a rank is served from its new slot only; the old one may still be read.

    Raises:
        InputError: the plan is for another placement, or a source does not hold its expert when its round starts.
    """
    if plan.old_digest != old.digest:
        raise InputError(f"the plan starts from the placement {plan.old_digest}, this one is {old.digest}")
    layout = plan.layout
    held_LP = np.full((old.num_layers, len(layout.member_of_place)), EMPTY_SLOT, np.int32)
    held_LP[:, layout.place_of_old] = old.slot_to_expert
    held_LP[:, layout.lost_places] = EMPTY_SLOT
    served_LP = held_LP.copy()
    staged: list[Transfer] = []
    yield served_LP.copy()
    for index, transfers in enumerate(plan.rounds):
        for transfer in transfers:
            if transfer.source != CHECKPOINT:
                held = held_LP[transfer.layer, layout.place_of_old[transfer.source]]
                if held != transfer.expert:
                    raise InputError(
                        f"round {index} reads expert {transfer.expert} of MoE layer {transfer.layer} from slot "
                        f"{transfer.source}, which holds {held}"
                    )
        staged += transfers
        landing = [transfer for transfer in staged if transfer.lands == index]
        staged = [transfer for transfer in staged if transfer.lands != index]
        for transfer in landing:
            sender, receiver = plan.members(transfer)
            if sender == receiver:
                served_LP[transfer.layer, layout.place_of_old[transfer.source]] = EMPTY_SLOT
        for transfer in landing:
            place = layout.place_of_new[transfer.target]
            held_LP[transfer.layer, place] = served_LP[transfer.layer, place] = transfer.expert
        yield served_LP.copy()


def _bundles(
    old: Placement, new: Placement, layout: Layout, size_LE: np.ndarray, node_U: np.ndarray, budget: int
) -> list[Bundle]:
    """The copies of all layers in bundles that land at once; what must be read from disk comes first."""
    before_LP, _ = places(old, new, layout)
    bundles = [
        bundle
        for copies, before_P, size_E in zip(
            list_copies(old, new, layout, size_LE, node_U), before_LP, size_LE, strict=True
        )
        for bundle in bundle_copies(copies, before_P, size_E, budget)
    ]
    return sorted(bundles, key=lambda bundle: bundle.copies[0].sender != CHECKPOINT)


def _number_slots(rounds: list[list[Scheduled]], layout: Layout) -> tuple[tuple[Transfer, ...], ...]:
    """Transfers in the numbers of old and new slots."""
    old_slot = {int(place): slot for slot, place in enumerate(layout.place_of_old)}
    new_slot = {int(place): slot for slot, place in enumerate(layout.place_of_new)}
    return tuple(
        tuple(
            Transfer(
                scheduled.copy.layer,
                scheduled.copy.expert,
                CHECKPOINT if scheduled.copy.source == CHECKPOINT else old_slot[scheduled.copy.source],
                new_slot[scheduled.copy.target],
                scheduled.lands,
            )
            for scheduled in scheduled_copies
        )
        for scheduled_copies in rounds
    )


def _emptied(old: Placement, new: Placement, layout: Layout) -> tuple[tuple[int, int], ...]:
    """(layer, new slot) that hold something before and nothing after."""
    before_LP, _ = places(old, new, layout)
    gone_LS = (new.slot_to_expert == EMPTY_SLOT) & (before_LP[:, layout.place_of_new] != EMPTY_SLOT)
    return tuple((int(layer), int(slot)) for layer, slot in np.argwhere(gone_LS))


def _sums(rounds: list[list[Scheduled]], cost: CopyCost) -> dict[str, Any]:
    """Bytes by kind and the predicted seconds of each round."""
    copies = [scheduled.copy for scheduled_copies in rounds for scheduled in scheduled_copies]
    return {
        "bytes": sum(copy.size for copy in copies if copy.is_staged),
        "inter_node_bytes": sum(copy.size for copy in copies if cost.crosses(copy)),
        "checkpoint_bytes": sum(copy.size for copy in copies if copy.sender == CHECKPOINT),
        "local_bytes": sum(copy.size for copy in copies if not copy.is_staged),
        "round_seconds": tuple(cost.round_seconds([item.copy for item in items]) for items in rounds),
    }
