"""Compiled loops over routing traces: one pass, no temporaries.

Shape letters: T tokens, L MoE layers, E experts per layer, K top-k. Compiled by numba at first use and cached on disk.
"""

import numpy as np

from moeplace.profiling.kernel_cache import njit


@njit(cache=True, nogil=True)
def find_bad_assignment(ids_TLK: np.ndarray, limit_L: np.ndarray) -> tuple[int, int, int, int]:
    """First (kind, token, layer, slot) that breaks a rule: kind 1 = id out of -1..limit-1, 2 = twice, 0 = all well."""
    tokens, layers, top_k = ids_TLK.shape
    for t in range(tokens):
        for layer in range(layers):
            limit = limit_L[layer]
            for k in range(top_k):
                e = ids_TLK[t, layer, k]
                if e < -1 or e >= limit:
                    return 1, t, layer, k
                if e >= 0:
                    for j in range(k):
                        if ids_TLK[t, layer, j] == e:
                            return 2, t, layer, k
    return 0, 0, 0, 0


@njit(cache=True, nogil=True)
def count_load(ids_TLK: np.ndarray, experts_L: np.ndarray, load_LE: np.ndarray) -> None:
    """Add the assignments of every expert to `load_LE` (int64); -1 and null experts are skipped."""
    tokens, layers, top_k = ids_TLK.shape
    for t in range(tokens):
        for layer in range(layers):
            for k in range(top_k):
                e = ids_TLK[t, layer, k]
                if 0 <= e < experts_L[layer]:
                    load_LE[layer, e] += 1


@njit(cache=True, nogil=True)
def count_transitions(ids_TLK: np.ndarray, experts_L: np.ndarray, transitions_LEE: np.ndarray) -> None:
    """Add the primary-expert pairs of consecutive MoE layers to `transitions_LEE` (L-1, E, E)."""
    tokens, layers, _ = ids_TLK.shape
    for t in range(tokens):
        for layer in range(layers - 1):
            i, j = ids_TLK[t, layer, 0], ids_TLK[t, layer + 1, 0]
            if 0 <= i < experts_L[layer] and 0 <= j < experts_L[layer + 1]:
                transitions_LEE[layer, i, j] += 1


@njit(cache=True, nogil=True)
def count_coactivation(ids_TLK: np.ndarray, experts_L: np.ndarray, coactivation_LEE: np.ndarray) -> None:
    """Add the pairs of experts that serve one token in one layer to `coactivation_LEE` (L, E, E), symmetric."""
    tokens, layers, top_k = ids_TLK.shape
    for t in range(tokens):
        for layer in range(layers):
            limit = experts_L[layer]
            for k in range(top_k):
                e = ids_TLK[t, layer, k]
                if e < 0 or e >= limit:
                    continue
                for j in range(k):
                    f = ids_TLK[t, layer, j]
                    if 0 <= f < limit:
                        coactivation_LEE[layer, e, f] += 1
                        coactivation_LEE[layer, f, e] += 1


@njit(cache=True, nogil=True)
def count_layers(
    ids_TLK: np.ndarray,
    experts_L: np.ndarray,
    first: int,
    last: int,
    load_LE: np.ndarray,
    transitions_LEE: np.ndarray,
    pairs_LEE: np.ndarray,
) -> None:
    """Add load, transitions (layer to layer + 1) and ordered pairs of layers `first`..`last` - 1 to the int64 tables.

    Layers outermost: the table of one layer stays in cache, and threads that take different layers share no table.
    `pairs_LEE[l, e, f]` counts tokens that list f before e; co-activation is this plus its transpose.
    """
    tokens, layers, top_k = ids_TLK.shape
    for layer in range(first, last):
        limit = experts_L[layer]
        has_next = layer + 1 < layers
        for t in range(tokens):
            for k in range(top_k):
                e = ids_TLK[t, layer, k]
                if e < 0 or e >= limit:
                    continue
                load_LE[layer, e] += 1
                for j in range(k):
                    f = ids_TLK[t, layer, j]
                    if 0 <= f < limit:
                        pairs_LEE[layer, e, f] += 1
            if has_next:
                i, j = ids_TLK[t, layer, 0], ids_TLK[t, layer + 1, 0]
                if 0 <= i < limit and 0 <= j < experts_L[layer + 1]:
                    transitions_LEE[layer, i, j] += 1


@njit(cache=True, nogil=True)
def sort_rows(ids_MK: np.ndarray, weights_MK: np.ndarray) -> None:
    """Order every row in place: -1 last, else by falling weight; stable. Without weights (no rows) only -1 moves."""
    rows, top_k = ids_MK.shape
    weighted = len(weights_MK) == rows
    for m in range(rows):
        for k in range(1, top_k):
            e = ids_MK[m, k]
            if e < 0:
                continue
            w = weights_MK[m, k] if weighted else weights_MK.dtype.type(0)
            j = k
            while j > 0 and (ids_MK[m, j - 1] < 0 or (weighted and weights_MK[m, j - 1] < w)):
                ids_MK[m, j] = ids_MK[m, j - 1]
                if weighted:
                    weights_MK[m, j] = weights_MK[m, j - 1]
                j -= 1
            ids_MK[m, j] = e
            if weighted:
                weights_MK[m, j] = w


@njit(cache=True, nogil=True)
def count_weighted(
    ids_TLK: np.ndarray,
    weights_T: np.ndarray,
    experts_L: np.ndarray,
    load_LE: np.ndarray,
    transitions_LEE: np.ndarray,
) -> None:
    """Add load and primary transitions with every token counted `weights_T` times (int64)."""
    tokens, layers, top_k = ids_TLK.shape
    for t in range(tokens):
        weight = weights_T[t]
        if weight == 0:
            continue
        for layer in range(layers):
            for k in range(top_k):
                e = ids_TLK[t, layer, k]
                if 0 <= e < experts_L[layer]:
                    load_LE[layer, e] += weight
            if layer + 1 < layers:
                i, j = ids_TLK[t, layer, 0], ids_TLK[t, layer + 1, 0]
                if 0 <= i < experts_L[layer] and 0 <= j < experts_L[layer + 1]:
                    transitions_LEE[layer, i, j] += weight


@njit(cache=True, nogil=True)
def count_grouped(
    ids_TLK: np.ndarray, group_T: np.ndarray, experts_L: np.ndarray, first: int, last: int, load_GLE: np.ndarray
) -> None:
    """Add the load of layers `first`..`last` - 1 to the table of each token's group; groups below 0 are skipped."""
    tokens, _, top_k = ids_TLK.shape
    for t in range(tokens):
        group = group_T[t]
        if group < 0:
            continue
        for layer in range(first, last):
            for k in range(top_k):
                e = ids_TLK[t, layer, k]
                if 0 <= e < experts_L[layer]:
                    load_GLE[group, layer, e] += 1
