"""Affine minorants of the ranks that a k-set needs: the best of its subsets, which is close to the best there is.

Let y_ef = 1 if experts e and f of a token are served on one rank. For any subset A of its k-set, and Q within A,

    d  >=  |A| - |Q| - (sum of y over pairs in A, but not within Q) + (a - s sum of y over pairs within Q)

as each expert of A \\ Q is alone, or meets one of Q or an earlier one; (a, s) is a line below the least number of parts
of |Q| experts with that many pairs on one part (even splits are best), or Q is empty. Without Q: representatives, of
which each pair costs one rank. Placements in which experts have several slots are covered too: y may only be smaller
than what shares a rank somewhere, and no slope is negative.

At which subset a token's minorant is taken follows from a matrix of whole numbers, exactly, so that anybody who has
the matrix finds the same: of equal values the smallest A counts, then the smallest Q, read as binary numbers over the
token's experts in rising order, then the line of more parts.

Shape letters: E experts of a layer, K top-k, U distinct k-sets.
"""

import numpy as np

from moeplace.profiling.kernel_cache import njit

LARGEST_SET = 8
"""Experts of a token: 2 to that power are the subsets looked through."""
UNIT = 255 * 64
"""Of the matrix: 1 is written as so much; (z + 1/64) / 255 of a certificate is a whole number of it."""
PARTS = 720
"""All slopes are whole numbers of its inverse."""


def set_lines(top_k: int, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Lines below the least number of parts of m experts, as a function of the pairs that share one.

    Args:
        top_k: K.
        capacity: most experts on a part.

    Returns:
        (K + 1, K + 1, 2) int64: `PARTS` times (a, s) of each line a - s pairs of m experts, by falling number of parts,
        without those of slope 1, which representatives are as good as; (K + 1,) int64 number of them.
    """
    lines, number = np.zeros((top_k + 1, top_k + 1, 2), np.int64), np.zeros(top_k + 1, np.int64)
    for size in range(3, top_k + 1):
        found = []
        fewest = -(-size // capacity)
        for parts in range(size, fewest, -1):
            pairs = _even_pairs(size, parts)
            slope = PARTS // (_even_pairs(size, parts - 1) - pairs)
            if slope < PARTS:
                found.append((parts * PARTS + pairs * slope, slope))
        found.append((fewest * PARTS, 0))
        number[size] = len(found)
        lines[size, : len(found)] = found
    return lines, number


def _even_pairs(size: int, parts: int) -> int:
    """Pairs on one part when so many experts are split evenly."""
    small, rest = divmod(size, parts)
    return (rest * (small + 1) * small + (parts - rest) * small * (small - 1)) // 2


@njit(cache=True, nogil=True)
def set_pieces(sets_UK, share_U, near_EE, lines, number, gain_EE):  # type: ignore[no-untyped-def]
    """Sum of the minorants that `near_EE` picks: the constant is returned, slopes are added to `gain_EE`.

    Args:
        sets_UK: (U, K) int64 distinct k-sets, experts in rising order, -1 = none.
        share_U: (U,) float64 weight of each.
        near_EE: (E, E) int64, `UNIT` times how much experts share a part.
        lines, number: of `set_lines`.
        gain_EE: (E, E) float64; both halves get half of a pair's slope.
    """
    top_k = sets_UK.shape[1]
    size, lowest = _subsets(top_k)
    pairs, beside = np.zeros(1 << top_k, np.int64), np.zeros(1 << top_k, np.int64)
    ids, constant = np.zeros(top_k, np.int64), 0.0
    for u in range(len(sets_UK)):
        k = 0
        for a in range(top_k):
            if sets_UK[u, a] >= 0:
                ids[k] = sets_UK[u, a]
                k += 1
        if k == 0:
            continue
        best, chosen = _best_representatives(ids[:k], near_EE, size, lowest, beside, pairs)
        chosen, within, line = _best_inner_set(k, best, chosen, size, pairs, lines, number)
        slope, base = 1.0, 0.0
        if within:
            slope = lines[size[within], line, 1] / PARTS
            base = lines[size[within], line, 0] / PARTS - size[within]
        constant += share_U[u] * (size[chosen] + base)
        for a in range(k):
            for b in range(a):
                if chosen >> a & 1 and chosen >> b & 1:
                    paid = share_U[u] / 2
                    if within >> a & 1 and within >> b & 1:
                        paid *= slope
                    gain_EE[ids[a], ids[b]] += paid
                    gain_EE[ids[b], ids[a]] += paid
    return constant


@njit(cache=True, nogil=True)
def _subsets(top_k):  # type: ignore[no-untyped-def]
    """(2^K,) each: members of a subset, and the lowest of them."""
    size, lowest = np.zeros(1 << top_k, np.int64), np.zeros(1 << top_k, np.int64)
    for subset in range(1, 1 << top_k):
        size[subset] = size[subset >> 1] + (subset & 1)
        lowest[subset] = 0 if subset & 1 else lowest[subset >> 1] + 1
    return size, lowest


@njit(cache=True, nogil=True)
def _best_representatives(ids, near_EE, size, lowest, beside, pairs):  # type: ignore[no-untyped-def]
    """(`PARTS` times the greatest value, its subset A) without a Q. `pairs` gets y of all pairs within each subset.

    Args:
        ids: (k,) the token's experts.
        near_EE: see `set_pieces`.
        size, lowest: of `_subsets`.
        beside: (2^K,) room.
        pairs: (2^K,), [0] = 0.
    """
    best, chosen = 0, 0
    for last in range(len(ids)):
        for rest in range(1 << last):
            if rest:  # pairs of the last expert with the others
                beside[rest] = beside[rest & (rest - 1)] + near_EE[ids[last], ids[lowest[rest]]]
            subset = rest | 1 << last
            pairs[subset] = pairs[rest] + beside[rest]
            value = UNIT * size[subset] - pairs[subset]
            if value > best:
                best, chosen = value, subset
    return PARTS * best, chosen


@njit(cache=True, nogil=True)
def _best_inner_set(k, best, chosen, size, pairs, lines, number):  # type: ignore[no-untyped-def]
    """(A, Q, line) of the greatest value, Q = 0 where representatives alone have it.

    Args:
        k: experts of the token.
        best, chosen: of `_best_representatives`.
        size: of `_subsets`.
        pairs: (2^K,) y of all pairs within each subset.
        lines, number: of `set_lines`.
    """
    within, at = 0, 0
    for inner in range(1, 1 << k):
        if pairs[inner] <= UNIT or not number[size[inner]]:  # no line is above representatives
            continue
        alone = PARTS * (UNIT * size[inner] - pairs[inner])
        bonus, line = 0, 0
        for x in range(number[size[inner]]):
            value = UNIT * lines[size[inner], x, 0] - lines[size[inner], x, 1] * pairs[inner] - alone
            if value > bonus:
                bonus, line = value, x
        if not bonus:
            continue
        others = (1 << k) - 1 ^ inner
        more = others
        while True:  # each superset keeps what it has beyond the inner set
            subset = inner | more
            value = PARTS * (UNIT * size[subset] - pairs[subset]) + bonus
            if value > best or (value == best and subset < chosen):
                best, chosen, within, at = value, subset, inner, line
            if not more:
                break
            more = (more - 1) & others
    return chosen, within, at
