"""WidthPlan: a re-placement in which ranks may have other numbers of slots afterwards, none before or none after.

Experts migrate between two placements with the slots of before and after together; only then are slots cut off.
"""

from dataclasses import dataclass

import numpy as np

from moeplace.placement.cluster import Cluster
from moeplace.placement.migration.plan import MigrationPlan, plan_migration
from moeplace.placement.migration.relabel import ExpertBytes, least_bytes
from moeplace.placement.placement import EMPTY_SLOT, Placement, with_slots


@dataclass(frozen=True, eq=False)
class WidthPlan:
    """A plan among ranks with the slots of before and after together.

    Attributes:
        plan: between the widened placements.
        goal: the placement wanted.
        least_bytes: proven least for any placement with the slots of `goal` that fills as many of them, and in layers
            that the goal fills evenly as evenly.
    """

    plan: MigrationPlan
    goal: Placement
    least_bytes: int


def plan_width(old: Placement, goal: Placement, *, expert_bytes: ExpertBytes, staging_bytes: int) -> WidthPlan:
    """Plan the fewest transfers from `old` to `goal`, on the same ranks.

    Args:
        old: in force.
        goal: wanted; its ranks may have more or fewer slots.
        expert_bytes: (L, E) bytes, or one number.
        staging_bytes: most bytes a rank may stage.

    Raises:
        InputError: the placements are for different models or numbers of ranks.
    """
    slots_R = np.maximum(old.slots_of_rank, goal.slots_of_rank)
    wide = with_slots(goal, slots_R)
    plan = plan_migration(with_slots(old, slots_R), wide, expert_bytes=expert_bytes, staging_bytes=staging_bytes)
    cluster = Cluster(goal.node_of_rank, goal.slots_of_rank, np.ones(goal.num_ranks))
    filled_L = (goal.slot_to_expert != EMPTY_SLOT).sum(axis=1)
    fewest_LR, most_LR = _even_shares(goal)
    limits = {"filled": filled_L, "fewest": fewest_LR, "most": most_LR}
    return WidthPlan(plan, goal, least_bytes(old, cluster, expert_bytes=expert_bytes, **limits))


def _even_shares(goal: Placement) -> tuple[np.ndarray, np.ndarray]:
    """(L, R) fewest and (L, R) most slots that each rank fills where ranks with slots differ by one at most, as those
    of the goal do; 0 and all in layers in which they do not."""
    filled_LR = goal.copies_LER.sum(axis=1)
    holding_R = goal.slots_of_rank > 0
    held_LR = filled_LR[:, holding_R]
    even_L1 = (held_LR.max(axis=1) - held_LR.min(axis=1) <= 1)[:, None]
    floor_L1, rest_L1 = np.divmod(held_LR.sum(axis=1, keepdims=True), int(holding_R.sum()))
    fewest_LR = np.where(even_L1 & holding_R, floor_L1, 0)
    most_LR = np.where(even_L1, np.minimum(floor_L1 + (rest_L1 > 0), goal.slots_of_rank), goal.slots_of_rank)
    return fewest_LR, most_LR
