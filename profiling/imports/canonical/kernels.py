"""Compiled loops over the ids as a source gives them: what is in them, and how they are mended.

Shape letters: t tokens of a piece, L layers, K top-k, M greatest id counted + 1, F fill candidates.
"""

from typing import NamedTuple

import numpy as np

from moeplace.profiling.kernel_cache import njit


class Tallies(NamedTuple):
    """Sums over all pieces of a source; int64 arrays that `survey_rows` adds to.

    A *row* is the K ids of a token in one layer. A fill candidate that occurs twice in a row counts as no expert.

    Attributes:
        constant_L: rows of one id K times (K > 1).
        none_L: rows without an expert.
        zeros_L: rows, not constant, with id 0 more than once.
        single_zero_L: rows with id 0 once.
        twice_L: rows, not constant, with another id more than once.
        greatest_L: greatest id that is no fill candidate.
        widest_L: most different experts of a row.
        fill_columns_FK: entries equal to a candidate, by column.
        fill_twice_F: rows with a candidate more than once.
        least: (1,) least id.
    """

    constant_L: np.ndarray
    none_L: np.ndarray
    zeros_L: np.ndarray
    single_zero_L: np.ndarray
    twice_L: np.ndarray
    greatest_L: np.ndarray
    widest_L: np.ndarray
    fill_columns_FK: np.ndarray
    fill_twice_F: np.ndarray
    least: np.ndarray


class Mending(NamedTuple):
    """How `mend_rows` changes ids.

    Attributes:
        fills: ids that mean no expert.
        zero_means_none_L: bool, layers in which id 0 also stands for null experts.
        kept_L: share of rows with a single 0 in which that is taken for expert 0, in such layers.
        seen_L: int64, such rows so far; changed.
    """

    fills: np.ndarray
    zero_means_none_L: np.ndarray
    kept_L: np.ndarray
    seen_L: np.ndarray


@njit(cache=True, nogil=True)
def survey_rows(
    ids_tLK: np.ndarray,
    fills_F: np.ndarray,
    tallies: Tallies,
    counts_LM: np.ndarray,
    blank_t: np.ndarray,
    alike_t: np.ndarray,
) -> None:
    """Add a piece to the tallies.

    Args:
        ids_tLK: the ids.
        fills_F: fill candidates.
        tallies: sums; changed.
        counts_LM: (L, M) occurrences of the ids below M, of at most one a row; changed.
        blank_t: bool, set where no row of the token has an expert, a constant row of zeros counting as none.
        alike_t: int64, set to the first row with experts where at least three rows with experts, and all of them,
            have the same ones, else -1.
    """
    tokens, layers, top_k = ids_tLK.shape
    row, first = np.empty(top_k, np.int64), np.empty(top_k, np.int64)
    for t in range(tokens):
        blank, alike, proper, first_layer, width = True, True, 0, -1, 0
        for layer in range(layers):
            valid = _survey_row(ids_tLK, t, layer, fills_F, tallies, counts_LM, row)
            if valid > 0 or (valid == 0 and row[0] > 0):
                blank = False
            if valid > 0:
                proper += 1
                if alike:  # of most tokens, only the first two layers are sorted
                    row[:valid].sort()
                if proper == 1:
                    first_layer, width = layer, valid
                    first[:valid] = row[:valid]
                elif alike:
                    alike = valid == width
                    for k in range(valid if alike else 0):
                        alike = alike and first[k] == row[k]
        blank_t[t] = blank
        alike_t[t] = first_layer if alike and proper >= 3 else -1


@njit(cache=True, nogil=True, inline="always")
def _survey_row(
    ids_tLK: np.ndarray,
    t: int,
    layer: int,
    fills_F: np.ndarray,
    tallies: Tallies,
    counts_LM: np.ndarray,
    row: np.ndarray,
) -> int:
    """Experts of a row, written to the front of `row`; 0 for a constant row (its id in `row[0]`), -1 for none."""
    top_k, first = ids_tLK.shape[2], ids_tLK[t, layer, 0]
    valid, zeros, repeated, constant = 0, 0, False, top_k > 1 and first >= 0
    for k in range(top_k):
        e = ids_tLK[t, layer, k]
        constant = constant and e == first
        zeros += e == 0
        if e < 0:
            tallies.least[0] = min(tallies.least[0], e)
            continue
        seen = False
        for j in range(k):
            seen = seen or ids_tLK[t, layer, j] == e
        candidate = _index_of(e, fills_F)
        if candidate >= 0:
            tallies.fill_columns_FK[candidate, k] += 1
            again = seen
            for j in range(k + 1, top_k):
                again = again or ids_tLK[t, layer, j] == e
            if again:
                tallies.fill_twice_F[candidate] += not seen
                constant = False
                continue
        elif e > tallies.greatest_L[layer]:
            tallies.greatest_L[layer] = e
        if seen:
            repeated = repeated or e != 0
            continue
        row[valid] = e
        valid += 1
    if constant:
        tallies.constant_L[layer] += 1
        row[0] = first
        return 0
    if valid == 0:
        tallies.none_L[layer] += 1
        return -1
    for k in range(valid):
        if row[k] < counts_LM.shape[1]:
            counts_LM[layer, row[k]] += 1
    tallies.zeros_L[layer] += zeros > 1
    tallies.single_zero_L[layer] += zeros == 1
    tallies.twice_L[layer] += repeated
    tallies.widest_L[layer] = max(tallies.widest_L[layer], valid)
    return valid


@njit(cache=True, nogil=True, inline="always")
def _index_of(e: int, fills_F: np.ndarray) -> int:
    """Index of a rising array's entry that equals `e`, -1 for none."""
    if e < fills_F[0]:
        return -1
    for f in range(len(fills_F)):
        if e == fills_F[f]:
            return f
    return -1


@njit(cache=True, nogil=True)
def mend_rows(ids_tLK: np.ndarray, mending: Mending) -> None:
    """Set to -1, in place: fill values, zeros that mean no expert, and repeats of an expert in a row."""
    tokens, layers, top_k = ids_tLK.shape
    for t in range(tokens):
        for layer in range(layers):
            zeros = 0
            for k in range(top_k):
                for f in range(len(mending.fills)):
                    if ids_tLK[t, layer, k] == mending.fills[f]:
                        ids_tLK[t, layer, k] = -1
                zeros += ids_tLK[t, layer, k] == 0
            constant = top_k > 1 and zeros == top_k
            drop_zero = constant or (zeros > 1 and mending.zero_means_none_L[layer])
            if zeros == 1 and mending.zero_means_none_L[layer]:
                seen, kept = mending.seen_L[layer], mending.kept_L[layer]
                drop_zero = np.floor((seen + 1) * kept) == np.floor(seen * kept)
                mending.seen_L[layer] += 1
            for k in range(top_k):
                e = ids_tLK[t, layer, k]
                if e == 0 and drop_zero:
                    ids_tLK[t, layer, k] = -1
                for j in range(k):
                    if e > -1 and ids_tLK[t, layer, j] == e:
                        ids_tLK[t, layer, k] = -1
