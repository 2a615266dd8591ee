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
        least_bytes: proven least for any placement with the slots of `goal` that fills as many of them.
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
    return WidthPlan(plan, goal, least_bytes(old, cluster, expert_bytes=expert_bytes, filled=filled_L))
