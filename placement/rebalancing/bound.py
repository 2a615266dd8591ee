"""Lower bounds on the load of the busiest rank of a layer.

Shape letters: E experts of a layer, R ranks, C slots per rank, S slots per layer.
P_(1) >= P_(2) >= ... are the loads in falling order.
"""

import numpy as np


def busiest_without_replicas(load_E: np.ndarray, slots_R: np.ndarray, *, whole: bool = False) -> float:
    """max over ranks of load, every expert on one rank and every slot used.

    The larger of the mean (rounded up where loads are `whole` numbers) and, for j = 0, 1, ..., of

        P_(jR+1) + ... + P_(jR+1-j) + the C - 1 - j smallest loads:

    of the jR + 1 heaviest experts, j + 1 share a rank, and that rank holds C experts (C = the fewest slots of any rank,
    at least j + 1). Source: the pigeonhole bound of number partitioning with cardinalities.

    Args:
        load_E: (E,) loads.
        slots_R: (R,) slots of each rank, E in all.
        whole: loads are integers.
    """
    falling, ranks = np.sort(load_E)[::-1], len(slots_R)
    rising_sums = np.concatenate([[0.0], np.cumsum(falling[::-1])])
    mean = falling.sum() / ranks
    best = float(np.ceil(mean - 1e-9) if whole else mean)
    fewest = int(slots_R.min())
    for j in range((len(falling) - 1) // ranks + 1):
        top = falling[j * ranks - j : j * ranks + 1].sum()
        best = max(best, float(top + rising_sums[max(fewest - 1 - j, 0)]))
    return best


def slowest_with_replicas(load_E: np.ndarray, num_slots: int, speed_R: np.ndarray) -> float:
    """max over ranks of load / speed, loads split over replicas in any way.

    The larger over j of (sum of the j largest loads) / (sum of the min(R, S - E + j) largest speeds): j experts have at
    most S - E + j replicas in all, hence at most that many ranks serve them.

    Args:
        load_E: (E,) loads.
        num_slots: S; with S = E there are no replicas.
        speed_R: (R,) relative speeds.
    """
    sums = np.cumsum(np.sort(load_E)[::-1])
    speeds = np.cumsum(np.sort(speed_R)[::-1])
    holders = np.minimum(len(speed_R), num_slots - len(load_E) + np.arange(1, len(load_E) + 1))
    return float((sums / speeds[holders - 1]).max())
