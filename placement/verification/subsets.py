"""Minorants of the parts of a token that a certificate picks from subsets of its k-set, looked up in whole numbers.

For experts A of a token, Q within A, and pairs y that are served together: parts >= |A \\ Q| - (pairs in A beyond those
in Q) + (a - s pairs in Q), where a - s p is a line below the least number of parts of |Q| experts with p pairs on one.
Which A, Q and line follow from the certificate's z, 16320 z being whole: the greatest value at z; then the smallest A,
the smallest Q (as binary numbers over the token's experts in rising order; no Q is 0) and the line of most parts.

Shape letters: U distinct k-sets, K experts of one, A their subsets, P their pairs.
"""

from itertools import combinations, pairwise

import numpy as np

WHOLE, SLOPES = 16320, 720
"""z is a whole number of 1 / WHOLE, slopes are whole numbers of 1 / SLOPES."""
LARGEST = 8
_ROWS = 2048


def subset_pieces(sets_UK: np.ndarray, share_U: np.ndarray, z_8: np.ndarray, capacity: int) -> tuple[float, np.ndarray]:
    """(a, G): mean parts per token >= a - <G, Z>.

    Args:
        sets_UK: (U, K) experts in rising order, with -1 (none) anywhere.
        share_U: (U,) of tokens.
        z_8: (E, E) uint8 of the certificate, which stands for (z + 1/64) / 255.
        capacity: most experts of a part.

    Raises:
        ValueError: a token has more than `LARGEST` experts.
    """
    weight_EE = 64 * z_8.astype(np.int64) + 1
    constant, gain = 0.0, np.zeros(z_8.shape)
    size_U = (sets_UK >= 0).sum(axis=1)
    if size_U.max(initial=0) > LARGEST:
        raise ValueError(f"tokens have {size_U.max()} experts, subsets are for {LARGEST}")
    for size in sorted(set(size_U[size_U > 0].tolist())):
        rows = np.flatnonzero(size_U == size)
        experts = sets_UK[rows]
        experts = experts[experts >= 0].reshape(len(rows), size)
        table = _Subsets(size, capacity)
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            constant += table.add(experts[part], share_U[rows[part]], weight_EE, gain)
    return constant, (gain + gain.T) / 2


def lines_below(size: int, capacity: int) -> list[tuple[int, int]]:
    """`SLOPES` times (a, s) of the lines below the least parts of `size` experts, by pairs; by falling parts."""
    few = -(-size // capacity)
    points = []
    for parts in range(size, few - 1, -1):
        sizes = [size // parts + (number < size % parts) for number in range(parts)]
        points.append((parts, sum(n * (n - 1) // 2 for n in sizes)))
    lines = []
    for (parts, pairs), (_, then) in pairwise(points):
        slope = SLOPES // (then - pairs)
        lines.append((SLOPES * parts + pairs * slope, slope))
    return [*lines, (SLOPES * few, 0)]


class _Subsets:
    """All subsets of k-sets of one size."""

    def __init__(self, size: int, capacity: int) -> None:
        self.first_P, self.second_P = np.array(list(combinations(range(size), 2)), np.int64).reshape(-1, 2).T
        number = np.arange(1 << size)
        self.member_AK = (number[:, None] >> np.arange(size)) & 1
        self.count_A = self.member_AK.sum(axis=1)
        self.within_AP = self.member_AK[:, self.first_P] * self.member_AK[:, self.second_P]
        self.lines = {count: lines_below(count, capacity) for count in range(3, size + 1)}

    def add(self, experts_UK: np.ndarray, share_U: np.ndarray, weight_EE: np.ndarray, gain: np.ndarray) -> float:
        """Constant of the minorants of these k-sets; their slopes are added to `gain`."""
        near_UP = weight_EE[experts_UK[:, self.first_P], experts_UK[:, self.second_P]]
        pairs_UA = near_UP @ self.within_AP.T
        alone_UA = SLOPES * (WHOLE * self.count_A - pairs_UA)
        chosen_U = alone_UA[:, 1:].argmax(axis=1) + 1
        best_U = np.take_along_axis(alone_UA, chosen_U[:, None], axis=1)[:, 0]
        inner_U, base_U, slope_U = np.zeros_like(chosen_U), np.zeros_like(chosen_U), np.zeros_like(chosen_U)
        for inner in range(1, len(self.count_A)):
            for base, slope in self.lines.get(int(self.count_A[inner]), []):
                bonus_U = WHOLE * base - slope * pairs_UA[:, inner] - alone_UA[:, inner]
                holds = np.flatnonzero((self.member_AK >= self.member_AK[inner]).all(axis=1))
                value_UA = alone_UA[:, holds] + bonus_U[:, None]
                at = value_UA.argmax(axis=1)
                value_U, outer_U = value_UA[np.arange(len(at)), at], holds[at]
                better = (value_U > best_U) | ((value_U == best_U) & (outer_U < chosen_U))
                best_U, chosen_U = np.where(better, value_U, best_U), np.where(better, outer_U, chosen_U)
                inner_U = np.where(better, inner, inner_U)
                base_U, slope_U = np.where(better, base, base_U), np.where(better, slope, slope_U)
        paid_UP = self.within_AP[chosen_U] + self.within_AP[inner_U] * (slope_U / SLOPES - 1.0)[:, None]
        np.add.at(gain, (experts_UK[:, self.first_P], experts_UK[:, self.second_P]), share_U[:, None] * paid_UP)
        constant_U = self.count_A[chosen_U] - self.count_A[inner_U] + base_U / SLOPES
        return float(share_U @ constant_U)
