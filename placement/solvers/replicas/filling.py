"""Empty slots filled with replicas: those that save most, or those of the heaviest experts.

Shape letters: E experts, R ranks, S slots.
"""

import numpy as np

from moeplace.placement.solvers.replicas.rule import Rule, gain_of_replicas
from moeplace.placement.solvers.replicas.seats import find_holders


def fill_with_replicas(rule: Rule, slots_S: np.ndarray, rank_S: np.ndarray, num_entries: int, count: int) -> None:
    """Give up to `count` empty slots to the replicas that save most, one after another, in place.

    Args:
        rule: tokens and the price of their ranks and nodes.
        slots_S, rank_S: (S,) slot -> expert, and rank of each slot.
        num_entries: experts, with entries behind them that stand for empty slots.
    """
    for _ in range(count):
        empty = np.flatnonzero(slots_S < 0)
        if not len(empty):
            return
        holders = find_holders(slots_S, rank_S, num_entries, len(rule.node_R))
        gain_ER = np.zeros(holders.held_ER.shape)
        gain_of_replicas(rule, holders, gain_ER)
        gain_ER[holders.held_ER] = -1
        gain_ER[holders.count_E == 0] = -1
        open_ranks = np.unique(rank_S[empty])
        expert, position = np.unravel_index(int(gain_ER[:, open_ranks].argmax()), (num_entries, len(open_ranks)))
        if gain_ER[expert, open_ranks[position]] < 0:
            return
        slots_S[empty[rank_S[empty] == open_ranks[position]][0]] = expert
